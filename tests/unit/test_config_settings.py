"""From the document's fields to what a pool is told: nothing is lost or changes its unit on the way."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from wrapper.config import parse_config
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.settings import PoolSettings, WarmupRules, wire_format_of
from wrapper.runtime.base import CommandSpec, Language
from wrapper.worker_protocol.wire_format import WireFormat

FULL = {
    "name": "full",
    "language": "nodejs",
    "min_warm_workers": 1,
    "max_workers": 3,
    "gc_command": {"argv": ["gc"], "timeout_s": 4},
    "warmup": {
        "commands": [{"argv": ["warm", "up"]}],
        "verification": [{"argv": ["verify"], "timeout_s": 2}],
        "post_job_cleanup": [{"argv": ["clean"]}, {"argv": ["sweep"]}],
        "default_timeout_s": 9,
        "requests": ["a.rec", "b.rec"],
        "warmup_batch_size": 7,
        "preload": False,
        "precompile": False,
        "lazy_loading": True,
        "allow_foreign_requests": True,
        "target_cold_start_ms": 250,
        "max_warmup_ms": 1500,
        "unhealthy_after": 8,
    },
    "lifecycle": {"worker_ttl_seconds": 50, "max_jobs_per_worker": 5, "gc_job_frequency": 2},
    "limits": {
        "max_instances_per_key": 2,
        "max_waiting": 6,
        "max_requests_per_worker_at_once": 4,
        "idle_timeout_s": 40,
        "start_instead_after_ms": 750,
        "acquire_timeout_s": 12,
        "stop_grace_s": 3,
        "frame_timeout_s": 0.5,
        "max_frame_mb": 2,
    },
    "memory": {"max_memory_mb": 300},
}


def settings_of(**pool: object) -> PoolSettings:
    document = {"pools": [{"name": "p", "language": "jvm", **pool}]}
    return parse_config(json.dumps(document), "test").pools[0].settings()


def test_every_setting_of_a_pool_comes_from_the_document() -> None:
    settings = settings_of(**FULL)
    assert settings == PoolSettings(
        name="full",
        limits=PoolLimits(
            min_warm_workers=1,
            max_workers=3,
            max_instances_per_key=2,
            max_waiting=6,
            max_requests_per_worker_at_once=4,
            idle_timeout_s=40,
            worker_ttl_s=50,
            max_jobs_per_worker=5,
            gc_job_frequency=2,
            start_instead_after_s=0.75,
            max_memory_bytes=300 * 1024 * 1024,
            stop_grace_s=3,
            unhealthy_after=8,
        ),
        language=Language.NODEJS,
        warmup=(CommandSpec(("warm", "up"), 9),),
        verification=(CommandSpec(("verify",), 2),),
        warmup_rules=WarmupRules(
            requests=("a.rec", "b.rec"),
            batch_size=7,
            preload=False,
            precompile=False,
            lazy_loading=True,
            allow_foreign_requests=True,
            target_s=0.25,
            max_s=1.5,
        ),
        post_job_cleanup=(CommandSpec(("clean",), 9), CommandSpec(("sweep",), 9)),
        gc_command=CommandSpec(("gc",), 4),
        frame_timeout_s=0.5,
        max_frame_bytes=2 * 1024 * 1024,
        acquire_timeout_s=12,
    )


def test_no_setting_is_left_at_its_default_by_that_document() -> None:
    """So that a field which somebody adds and forgets to pass on is noticed."""
    full, plain = settings_of(**FULL), PoolSettings("p")
    assert [f.name for f in fields(full) if getattr(full, f.name) == getattr(plain, f.name)] == []
    same = [
        f.name for f in fields(PoolLimits) if getattr(full.limits, f.name) == getattr(PoolLimits(), f.name)
    ]
    assert same == ["worker_ttl_jitter"]  # not a user's business
    pairs = zip(WarmupRules._fields, full.warmup_rules, WarmupRules(), strict=True)
    assert [name for name, given, default in pairs if given == default] == []


def test_the_defaults_of_a_warm_up_are_those_of_the_pool() -> None:
    assert settings_of().warmup_rules == WarmupRules()


def test_null_switches_a_limit_off() -> None:
    settings = settings_of(
        lifecycle={"worker_ttl_seconds": None, "max_jobs_per_worker": None, "gc_job_frequency": None},
        limits={"idle_timeout_s": None, "acquire_timeout_s": None},
        memory={"max_memory_mb": None},
    )
    limits = settings.limits
    assert settings.acquire_timeout_s is None
    assert {limits.worker_ttl_s, limits.max_jobs_per_worker, limits.gc_job_frequency} == {None}
    assert {limits.idle_timeout_s, limits.max_memory_bytes} == {None}


def test_the_total_limit_reaches_all_pools() -> None:
    document = '{max_total_workers: 7, max_concurrent_warmups: 5, pools: [{name: "p", language: "jvm"}]}'
    expected = TotalLimits(max_workers=7, max_concurrent_warmups=5)
    assert parse_config(document, "test").total_limits() == expected


@pytest.mark.parametrize("written", ["proto", "json"])
def test_a_protocol_in_the_document_is_a_wire_format(written: str) -> None:
    assert wire_format_of(written) is WireFormat(written)
