"""From the document's fields to what a pool is told: nothing is lost or changes its unit on the way."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest

from wrapper.config import PoolConfig, parse_config
from wrapper.errors import ConfigError
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.pool.settings import ExecrootSettings, PoolSettings, WarmupRules, wire_format_of
from wrapper.runtime.base import CommandSpec, Language, Mount
from wrapper.runtime.cri_container import CriSettings
from wrapper.runtime.isolation import Isolation
from wrapper.runtimes import cri_settings_of, in_place
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
    "execroot": {"strategy": "inplace", "work_root": "/srv/actions"},
}

CONTAINERS = {
    "runtime": "cri",
    "cri_socket": "/run/engine.sock",
    "container_image": "registry.example/worker:1",
    "execroot": {"strategy": "link", "path": "/job"},
    "isolation": {
        "run_as_user": 2000,
        "run_as_group": 3000,
        "read_only_root": False,
        "drop_capabilities": False,
        "no_new_privileges": False,
        "seccomp": False,
        "loopback_only": False,
        "memory_limit_in_bytes": 64 << 20,
        "pids_limit": 99,
        "tmp_limit_mb": 7,
        "mounts": [{"host_path": "/opt/jdk"}, {"host_path": "/srv/tool", "path": "/tool"}],
    },
}


def pool_of(**pool: object) -> PoolConfig:
    document = {"pools": [{"name": "p", "language": "jvm", **pool}]}
    return parse_config(json.dumps(document), "test").pools[0]


def settings_of(**pool: object) -> PoolSettings:
    return pool_of(**pool).settings()


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
        execroot=ExecrootSettings(strategy="inplace", work_root="/srv/actions"),
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


def test_every_setting_of_containers_comes_from_the_document() -> None:
    pool = pool_of(**CONTAINERS)
    settings = cri_settings_of(pool, "/state")
    assert settings == CriSettings(
        pool="p",
        socket="/run/engine.sock",
        image="registry.example/worker:1",
        isolation=Isolation(
            run_as_user=2000,
            run_as_group=3000,
            read_only_root=False,
            drop_capabilities=False,
            no_new_privileges=False,
            seccomp=False,
            loopback_only=False,
            memory_limit_bytes=64 << 20,
            pids_limit=99,
            tmp_limit_bytes=7 << 20,
        ),
        mounts=(Mount("/opt/jdk", "/opt/jdk"), Mount("/srv/tool", "/tool")),
        state_dir="/state",
    )
    plain = Isolation()
    same = [f.name for f in fields(plain) if getattr(settings.isolation, f.name) == getattr(plain, f.name)]
    assert same == []
    assert pool.settings("/state").execroot == ExecrootSettings(
        strategy="link", base="/state/execroots", seen_as="/job", uid=2000, gid=3000, in_container=True
    )


def test_null_switches_a_limit_of_containers_off() -> None:
    limits = {"memory_limit_in_bytes": None, "pids_limit": None, "tmp_limit_mb": None}
    isolation = cri_settings_of(pool_of(**{**CONTAINERS, "isolation": limits}), "/state").isolation
    assert isolation == Isolation(memory_limit_bytes=None, pids_limit=None, tmp_limit_bytes=None)


def test_the_defaults_of_isolation_are_those_of_the_runtime() -> None:
    assert cri_settings_of(pool_of(**{**CONTAINERS, "isolation": {}}), "/state").isolation == Isolation()


@pytest.mark.parametrize("group", [None, 3000])
def test_in_its_host_s_execroot_a_container_runs_as_the_owner_of_that(
    group: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = os.stat(tmp_path)
    own = os.stat_result((*info[:4], 1234, 1235, *info[6:]))
    monkeypatch.setattr("wrapper.runtimes.os.stat", lambda _: own)
    pool = in_place(pool_of(**{**CONTAINERS, "isolation": {"run_as_group": group}}), str(tmp_path))
    assert (pool.isolation.uid, pool.isolation.gid) == (1234, group or 1235)
    assert not pool.has_own_execroots


def test_in_an_execroot_of_root_s_no_container_runs_without_a_user_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"belongs to root.*isolation\.run_as_user"):
        in_place(pool_of(**{**CONTAINERS, "isolation": {}}), "/")
    assert in_place(pool_of(**CONTAINERS), "/").isolation.uid == 2000


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
