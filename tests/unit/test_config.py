"""The pools document: what it means, and that whatever is wrong with it is said by path and in words."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from wrapper.check_config import check_config
from wrapper.config import Config, load_config, parse_config
from wrapper.config_containers import ExecrootConfig, IsolationConfig
from wrapper.config_models import PoolConfig
from wrapper.config_problems import field_paths
from wrapper.errors import ConfigError
from wrapper.pool.limits import PoolLimits, TotalLimits
from wrapper.runtime.base import CommandSpec, Language

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "java-typescript-pools.json5"
CONTAINERS_EXAMPLE = ROOT / "examples" / "crio-pools.json5"


def pool(fields: str = "") -> str:
    return f'{{pools: [{{name: "a", language: "jvm", {fields}}}]}}'


def containers(fields: str = "") -> str:
    """The same in containers."""
    return pool(f'runtime: "cri", cri_socket: "/run/crio/crio.sock", container_image: "worker:1", {fields}')


def pool_of(fields: str = "") -> PoolConfig:
    return parse_config(pool(fields), "test").pools[0]


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "pools.json5")
    assert caught.value.exit_code == 78
    assert caught.value.message.startswith("pools.json5: ")
    return caught.value.message


# What a document means


def test_the_defaults_are_those_of_the_pools_document() -> None:
    a = pool_of()
    assert a.worker_command == ("/usr/local/bin/nativelink-worker",)
    assert (a.min_warm_workers, a.max_workers) == (2, 20)
    assert a.warmup.default_timeout_s == 30
    assert a.lifecycle.worker_ttl_seconds == 3600
    assert a.lifecycle.max_jobs_per_worker == 200
    assert a.lifecycle.gc_job_frequency == 25
    assert a.limits.idle_timeout_s == 300
    assert a.limits.max_instances_per_key == 10


def test_the_defaults_of_a_pool_are_those_of_the_core() -> None:
    assert pool_of("min_warm_workers: 0").pool_limits() == PoolLimits()
    assert parse_config(pool(), "test").total_limits() == TotalLimits()


def test_every_limit_reaches_the_core_in_its_unit() -> None:
    a = pool_of(
        """
        min_warm_workers: 3, max_workers: 7,
        lifecycle: {worker_ttl_seconds: 60, max_jobs_per_worker: 5, gc_job_frequency: null},
        limits: {max_instances_per_key: 4, max_waiting: 0, max_requests_per_worker_at_once: 8,
                 idle_timeout_s: null, start_instead_after_ms: 250, stop_grace_s: 0.5, max_frame_mb: 2},
        memory: {max_memory_mb: 100},
        """
    )
    assert a.pool_limits() == PoolLimits(
        min_warm_workers=3,
        max_workers=7,
        max_instances_per_key=4,
        max_waiting=0,
        max_requests_per_worker_at_once=8,
        idle_timeout_s=None,
        worker_ttl_s=60.0,
        max_jobs_per_worker=5,
        gc_job_frequency=None,
        start_instead_after_s=0.25,
        max_memory_bytes=100 * 1024 * 1024,
        stop_grace_s=0.5,
    )
    assert a.max_frame_bytes() == 2 * 1024 * 1024


def test_commands_get_the_default_time_unless_they_have_their_own() -> None:
    a = pool_of(
        """
        warmup: {
            commands: [{argv: ["w", "1"]}, {argv: ["w2"], timeout_s: 2.5}],
            verification: [{argv: ["v"]}],
            post_job_cleanup: [{argv: ["c"], timeout_s: null}],
            default_timeout_s: 9,
        },
        gc_command: {argv: ["gc"]},
        """
    )
    assert a.warmup_commands() == (CommandSpec(("w", "1"), 9.0), CommandSpec(("w2",), 2.5))
    assert a.verification_commands() == (CommandSpec(("v",), 9.0),)
    assert a.cleanup_commands() == (CommandSpec(("c",), 9.0),)
    assert a.gc_command_spec() == CommandSpec(("gc",), 9.0)
    assert pool_of().gc_command_spec() is None


@pytest.mark.parametrize(
    ("written", "kind"),
    [("jvm", Language.JVM), ("nodejs", Language.NODEJS), ("custom(kotlin-native)", Language.CUSTOM)],
)
def test_a_language_is_known_by_its_kind(written: str, kind: Language) -> None:
    document = f'{{pools: [{{name: "a", language: "{written}"}}]}}'
    assert parse_config(document, "test").pools[0].language_kind is kind


def test_the_default_minimum_of_warm_workers_fits_where_less_is_possible() -> None:
    assert pool_of("max_workers: 1").warm_workers == 1
    assert pool_of("limits: {max_instances_per_key: 1}").warm_workers == 1
    assert pool_of('worker_command: [], keys: ["x"]').warm_workers == 0


def test_the_first_pool_with_a_matching_pattern_serves_a_key() -> None:
    config = parse_config(
        """{pools: [
            {name: "exact", language: "jvm", keys: ["java-special"]},
            {name: "wide", language: "jvm", keys: ["other", "java-*"]},
            {name: "by-name", language: "jvm"},
        ]}""",
        "test",
    )

    def serving(key: str) -> str | None:
        found = config.pool_for_key(key)
        return None if found is None else found.name

    assert serving("java-special") == "exact"
    assert serving("java-17") == "wide"
    assert serving("other") == "wide"
    assert serving("Java-17") is None
    assert serving("") is None
    assert config.pool_named("by-name") is config.pools[2]
    assert config.pool_named("nobody") is None


def test_a_container_image_may_stay_in_a_document_that_asks_for_processes() -> None:
    a = pool_of('runtime: "process", container_image: "x/y:1", cri_socket: "/run/crio.sock"')
    assert a.container_image == "x/y:1"


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError):
        pool_of().max_workers = 3


def test_json5_with_its_liberties_is_read() -> None:
    config = parse_config(
        "\ufeff// hello\n{'pools': [{name: 'a', language: 'jvm', max_workers: 0x10,},],}", "t"
    )
    assert config.pools[0].max_workers == 16


# What is wrong


BROKEN: list[tuple[str, list[str]]] = [
    # (document, lines that the error must contain)
    (pool("max_worker: 3"), ['pools[0].max_worker: unknown name; did you mean "max_workers"?']),
    (pool("maxWorkers: 3"), ['pools[0].maxWorkers: unknown name; did you mean "max_workers"?']),
    (pool('image: "x"'), ['pools[0].image: unknown name; did you mean "container_image"?']),
    (pool("frobnicate: 3"), ["pools[0].frobnicate: unknown name; known here: name, language, keys"]),
    (
        pool("gc_job_frequency: 3"),
        ['pools[0].gc_job_frequency: unknown name; did you mean "pools[0].lifecycle.gc_job_frequency"?'],
    ),
    (
        pool("limits: {max_memory_mb: 3}"),
        ['pools[0].limits.max_memory_mb: unknown name; did you mean "pools[0].memory.max_memory_mb"?'],
    ),
    (
        '{drain_timeout: 3, pools: [{name: "a", language: "jvm"}]}',
        ['drain_timeout: unknown name; did you mean "drain_timeout_s"?'],
    ),
    (
        pool("lifecycle: {gc_job_frequency: 0}"),
        [
            "pools[0].lifecycle.gc_job_frequency: found 0; ",
            "found 0; allowed: a whole number of at least 1, or null for never",
        ],
    ),
    (pool("lifecycle: {max_jobs_per_worker: 1.5}"), ["pools[0].lifecycle.max_jobs_per_worker: found 1.5; "]),
    (
        pool("lifecycle: {worker_ttl_seconds: '3600'}"),
        ['pools[0].lifecycle.worker_ttl_seconds: found "3600"; allowed: a number of seconds above 0'],
    ),
    (pool("max_workers: 0"), ["pools[0].max_workers: found 0; allowed: a whole number from 1 to 10000"]),
    (pool("max_workers: null"), ["pools[0].max_workers: found null; allowed: a whole number from 1"]),
    (pool("max_workers: true"), ["pools[0].max_workers: found true; allowed: a whole number from 1"]),
    (pool("min_warm_workers: -1"), ["pools[0].min_warm_workers: found -1; allowed: a whole number from 0"]),
    (
        pool("min_warm_workers: 5, max_workers: 4"),
        ["pools[0].min_warm_workers: found 5; allowed: at most pools[0].max_workers, which is 4"],
    ),
    (
        pool("min_warm_workers: 15"),
        ["pools[0].min_warm_workers: found 15; allowed: at most pools[0].limits.max_instances_per_key"],
    ),
    (
        pool('worker_command: [], keys: ["x"], min_warm_workers: 1'),
        ["pools[0].min_warm_workers: found 1 while worker_command is empty; allowed: 0, or give"],
    ),
    (pool("worker_command: []"), ["pools[0].keys: found no pattern while worker_command is empty"]),
    (
        pool('worker_command: "worker --persistent_worker"'),
        ['pools[0].worker_command: found "worker --persistent_worker"; allowed: a list of strings'],
    ),
    (pool('worker_command: ["w", 8080]'), ["pools[0].worker_command[1]: found 8080; allowed: a list of str"]),
    (pool('worker_command: [""]'), ['pools[0].worker_command[0]: found ""; allowed: a list of strings']),
    (
        pool('runtime: "cri", container_image: "i"'),
        ['pools[0].cri_socket: must be given with runtime "cri"'],
    ),
    (
        pool('runtime: "cri", cri_socket: "/s"'),
        ['pools[0].container_image: must be given with runtime "cri"'],
    ),
    (
        pool('runtime: "proces"'),
        ['pools[0].runtime: found "proces"; allowed: "process" or "cri"; did you mean "process"?'],
    ),
    (
        pool('container_image: "x/y:1"'),
        ['pools[0].container_image: found without a runtime; allowed: say runtime: "cri" to run the workers'],
    ),
    (
        pool('cri_socket: "/s"'),
        ["pools[0].cri_socket: found without a runtime; allowed: say runtime:"],
    ),
    (
        pool('runtime: "process", isolation: {seccomp: false}'),
        ['pools[0].isolation: found seccomp with runtime "process", which isolates nothing; allowed: run_as'],
    ),
    (
        pool("isolation: {}"),
        ['pools[0].isolation: found nothing with runtime "process", which isolates nothing'],
    ),
    (
        containers("limits: {max_requests_per_worker_at_once: 2}"),
        [
            "pools[0].limits.max_requests_per_worker_at_once: found 2; allowed: 1 for workers with an",
            'execroot of their own, which holds one action at a time, or execroot.strategy "inplace"',
        ],
    ),
    (
        pool('execroot: {work_root: "/w"}, limits: {max_requests_per_worker_at_once: 2}'),
        ["pools[0].limits.max_requests_per_worker_at_once: found 2; allowed: 1 for workers with an"],
    ),
    (
        pool('execroot: {strategy: "renam"}'),
        ['pools[0].execroot.strategy: found "renam"; allowed: "rename", "link" or "inplace"; did you mean'],
    ),
    (
        pool('execroot: {work_root: "w"}'),
        ['pools[0].execroot.work_root: found "w"; allowed: an absolute path'],
    ),
    (pool('execroot: {path: "/"}'), ['pools[0].execroot.path: found "/"; allowed: an absolute path, where']),
    (
        containers("isolation: {run_as_user: 0}"),
        ["pools[0].isolation.run_as_user: found 0; allowed: a user's number, not 0 (root could overwrite"],
    ),
    (
        containers("isolation: {run_as_group: 0}"),
        ["pools[0].isolation.run_as_group: found 0; allowed: a group's number, not 0"],
    ),
    (
        containers("isolation: {memory_limit_in_bytes: 1024}"),
        ["pools[0].isolation.memory_limit_in_bytes: found 1024; allowed: a whole number of bytes from"],
    ),
    (
        containers("isolation: {pids_limit: 0}"),
        ["pools[0].isolation.pids_limit: found 0; allowed: a whole number from 8"],
    ),
    (
        containers("isolation: {tmp_limit_mb: 0}"),
        ["pools[0].isolation.tmp_limit_mb: found 0; allowed: a whole number of MiB"],
    ),
    (
        containers("isolation: {secomp: false}"),
        ['pools[0].isolation.secomp: unknown name; did you mean "seccomp"?'],
    ),
    (
        containers("isolation: {seccomp: null}"),
        ["pools[0].isolation.seccomp: found null; allowed: true or false"],
    ),
    (
        containers('isolation: {mounts: [{host_path: "jdk"}]}'),
        ['pools[0].isolation.mounts[0].host_path: found "jdk"; allowed: an absolute path of the node'],
    ),
    (
        containers('isolation: {mounts: [{path: "/jdk"}]}'),
        ["pools[0].isolation.mounts[0].host_path: must be given; allowed: an absolute path of the node"],
    ),
    (pool('user: "x"'), ["pools[0].user: unknown name; known here:"]),
    (pool('cri_socket: ""'), ['pools[0].cri_socket: found ""; allowed: the path of a CRI socket']),
    (
        '{pools: [{name: "a", language: "node"}]}',
        ['pools[0].language: found "node"; allowed: "jvm", "nodejs" or "custom(NAME)"', 'mean "nodejs"?'],
    ),
    ('{pools: [{name: "a", language: "custom()"}]}', ['pools[0].language: found "custom()"; allowed: "jvm"']),
    ('{pools: [{name: "a"}]}', ['pools[0].language: must be given; allowed: "jvm", "nodejs"']),
    ('{pools: [{language: "jvm"}]}', ["pools[0].name: must be given; allowed: 1 to 63 letters"]),
    ('{pools: [{name: "a b", language: "jvm"}]}', ['pools[0].name: found "a b"; allowed: 1 to 63 letters']),
    ('{pools: [{name: "a\\n", language: "jvm"}]}', ['pools[0].name: found "a\\n"; allowed: 1 to 63 letters']),
    (
        '{pools: [{name: "a", language: "jvm"}, {name: "b", language: "jvm"}, {name: "a", language: "jvm"}]}',
        ['pools[2].name: found "a", which is pools[0]\'s name; allowed: a name of its own'],
    ),
    (
        '{pools: [{name: "a", language: "jvm", keys: ["k"]},{name: "b", language: "jvm", keys: ["j", "k"]}]}',
        ['pools[1].keys[1]: found "k", which pools[0].keys[0] ("k") has taken'],
    ),
    (
        '{pools: [{name: "a", language: "jvm", keys: ["*"]},{name: "b", language: "jvm", keys: ["java-*"]}]}',
        ['pools[1].keys[0]: found "java-*", which pools[0].keys[0] ("*") has taken', "narrower pool first"],
    ),
    (pool('keys: "java-*"'), ['pools[0].keys: found "java-*"; allowed: a list of patterns of persistentWo']),
    (pool("env: {N: 1}"), ["pools[0].env.N: found 1; allowed: strings by name"]),
    (pool('env: {"A=B": "1"}'), ['pools[0].env."A=B": found the name "A=B"; allowed: strings by name']),
    (
        pool('worker_protocol: "jsn"'),
        ['pools[0].worker_protocol: found "jsn"; allowed: "proto" or "json"; did'],
    ),
    (pool("check_health: 'yes'"), ['pools[0].check_health: found "yes"; allowed: true or false']),
    (pool("check_health: 1"), ["pools[0].check_health: found 1; allowed: true or false"]),
    (
        pool('gc_command: ["jcmd"]'),
        ['pools[0].gc_command: found ["jcmd"]; allowed: an object with argv, timeout_s'],
    ),
    (pool("gc_command: {argv: []}"), ["pools[0].gc_command.argv: found []; allowed: a list of strings"]),
    (
        pool('warmup: {commands: [{argv: ["a"]}, {timeout_s: 3}]}'),
        ["pools[0].warmup.commands[1].argv: must be given; allowed: a list of strings"],
    ),
    (
        pool('warmup: {verification: [{argv: ["a"], timeout_s: 0}]}'),
        ["pools[0].warmup.verification[0].timeout_s: found 0; allowed: a number of seconds above 0"],
    ),
    (
        pool('warmup: {post_job_cleanup: [{argv: ["a"], timeout: 3}]}'),
        ['pools[0].warmup.post_job_cleanup[0].timeout: unknown name; did you mean "timeout_s"?'],
    ),
    (
        pool('warmup: {commands: {argv: ["a"]}}'),
        ['pools[0].warmup.commands: found {"argv": ["a"]}; allowed: a list of commands'],
    ),
    (
        pool('warmup: {requests: "javac.rec"}'),
        ['pools[0].warmup.requests: found "javac.rec"; allowed: a list of record files'],
    ),
    (
        pool("warmup: {warmup_batch_size: 0}"),
        ["pools[0].warmup.warmup_batch_size: found 0; allowed: a whole number from 1 to 1000"],
    ),
    (
        pool("warmup: {lazy_loading: 1}"),
        ["pools[0].warmup.lazy_loading: found 1; allowed: true or false"],
    ),
    (
        pool("warmup: {max_warmup_ms: 0}"),
        ["pools[0].warmup.max_warmup_ms: found 0; allowed: a number of milliseconds above 0"],
    ),
    (
        pool("warmup: {unhealthy_after: null}"),
        ["pools[0].warmup.unhealthy_after: found null; allowed: a whole number from 1 to 1000"],
    ),
    (
        '{max_concurrent_warmups: 0, pools: [{name: "a", language: "jvm"}]}',
        ["max_concurrent_warmups: found 0; allowed: a whole number from 1 to 1000, or null"],
    ),
    (pool("limits: 5"), ["pools[0].limits: found 5; allowed: an object with max_instances_per_key, max_wa"]),
    (
        pool("limits: {idle_timeout_s: Infinity}"),
        ["pools[0].limits.idle_timeout_s: found Infinity; allowed:"],
    ),
    (pool("limits: {idle_timeout_s: NaN}"), ["pools[0].limits.idle_timeout_s: found NaN; allowed: a number"]),
    (
        pool("limits: {max_frame_mb: 4096}"),
        ["pools[0].limits.max_frame_mb: found 4096; allowed: a whole num"],
    ),
    (pool("memory: {max_memory_mb: '1g'}"), ['pools[0].memory.max_memory_mb: found "1g"; allowed: a whole']),
    (
        '{max_total_workers: 3, pools: [{name: "a", language: "jvm"}, {name: "b", language: "jvm"}]}',
        ["max_total_workers: found 3; allowed: at least 4, the sum of min_warm_workers of all pools"],
    ),
    (pool('name: "b"'), ["pools[0].name: is given more than once; allowed: once"]),
    (
        pool("limits: {max_waiting: 1, max_waiting: 1}"),
        ["pools[0].limits.max_waiting: is given more than once"],
    ),
    ("{}", ["pools: must be given; allowed: a list of at least one pool"]),
    ("{pools: []}", ["pools: found []; allowed: a list of at least one pool"]),
    ('{pools: {name: "a"}}', ['pools: found {"name": "a"}; allowed: a list of at least one pool']),
    ("{pools: [5]}", ["pools[0]: found 5; allowed: an object with name, language"]),
    ("[]", ["found []; a configuration is an object: {pools: [...]}"]),
    ("'text'", ['found "text"; a configuration is an object']),
    ("", ["is empty; a configuration is an object"]),
    (" \n ", ["is empty; a configuration is an object"]),
    ("// only a comment", ["line 1, column 18: unexpected end of input"]),
    (
        "{\n  pools: []\n  max_total_workers: 3}",
        ['line 3, column 3: unexpected "m"', "\n      max_total_wor", "\n      ^"],
    ),
    ("{pools: [", ["line 1, column 10: unexpected end of input: a bracket, brace or quote is not closed"]),
    ('{pools: "a\nb"}', ['line 1, column 11: unexpected "\\n"']),
    ("[" * 5000, ["is nested too deeply to be a configuration"]),
]


@pytest.mark.parametrize(
    ("document", "lines"), BROKEN, ids=lambda value: value[:60] if isinstance(value, str) else ""
)
def test_what_is_wrong_is_said_with_path_finding_and_what_is_allowed(document: str, lines: list[str]) -> None:
    message = error_of(document)
    for line in lines:
        assert line in message
    assert "problems" not in message, "one mistake is one problem"


def test_all_problems_are_listed_also_between_fields_of_other_pools() -> None:
    message = error_of(
        """{pools: [
            {name: "a", language: "jvm", max_workers: 0, limits: {max_waiting: -1}},
            {name: "b", language: "jvm", min_warm_workers: 5, max_workers: 4},
            {name: "b", language: "jvm"},
        ], unknown: 1}"""
    )
    lines = message.splitlines()
    assert lines[0] == "pools.json5: 5 problems"
    assert [line.partition(":")[0].strip() for line in lines[1:]] == [
        "pools[0].max_workers",
        "pools[0].limits.max_waiting",
        "unknown",
        "pools[1].min_warm_workers",
        "pools[2].name",
    ]


def test_a_long_value_is_shown_short() -> None:
    message = error_of(pool(f'name2: 1, language: "{"x" * 10_000}"'))
    assert len(message) < 1000


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    missing = tmp_path / "pools.json5"
    with pytest.raises(ConfigError, match=re.escape(f"{missing}: cannot be read: No such file or directory")):
        load_config(missing)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read: embedded null byte"):
        load_config("a\0b")


def test_a_file_that_is_no_text_is_named_with_the_line(tmp_path: Path) -> None:
    binary = tmp_path / "pools.json5"
    binary.write_bytes(b"{\n// caf\xe9\n}")
    with pytest.raises(ConfigError, match=re.escape("line 2: is not UTF-8 (byte 0xe9)")):
        load_config(binary)


def test_an_endless_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="is larger than"):
        load_config("/dev/zero")


# check-config


def test_check_config_shows_every_field_of_a_pool_of_containers(tmp_path: Path) -> None:
    document = tmp_path / "pools.json5"
    document.write_text(
        containers('isolation: {seccomp: false, pids_limit: null, mounts: [{host_path: "/a"}]}')
    )
    out = io.StringIO()
    assert check_config(document, out) == 0
    text = out.getvalue()
    for section in (IsolationConfig, ExecrootConfig):
        prefix = "isolation" if section is IsolationConfig else "execroot"
        for name in section.model_fields:
            assert re.search(rf"^  {prefix}\.{name} ", text, re.MULTILINE), name
    assert re.search(r"^  cri_socket +/run/crio/crio.sock$", text, re.MULTILINE)
    assert re.search(r"^  container_image +worker:1$", text, re.MULTILINE)
    assert re.search(r"^  isolation.seccomp +false$", text, re.MULTILINE)
    assert re.search(r"^  isolation.pids_limit +no limit$", text, re.MULTILINE)
    assert re.search(r"^  isolation.mounts +/a at /a$", text, re.MULTILINE)
    assert re.search(r"^  isolation.run_as_user +none: 65532  \(default\)$", text, re.MULTILINE)
    assert re.search(r"^  isolation.memory_limit_in_bytes +2147483648  \(default\)$", text, re.MULTILINE)


def test_check_config_prints_every_limit_in_force() -> None:
    out = io.StringIO()
    assert check_config(EXAMPLE, out) == 0
    text = out.getvalue()
    assert text.startswith(f"{EXAMPLE}: nothing wrong; 2 pools\n")
    config = load_config(EXAMPLE)
    assert [each.name for each in config.pools] == ["java", "typescript"]
    for each in config.pools:
        assert f"\npool {each.name}: {each.language}, process\n" in text
    for path in field_paths(PoolConfig):
        name = re.sub(r"\[\].*", "", path)
        if name in ("name", "language", "runtime", "cri_socket", "container_image"):
            continue
        if name.startswith("isolation"):
            continue  # plain processes have none
        sections = ("warmup", "lifecycle", "limits", "memory", "execroot")
        if not name.startswith("gc_command.") and name not in sections:
            if name == "warmup.default_timeout_s":
                continue  # stands with the commands that it applies to
            assert re.search(rf"^  {re.escape(name)} ", text, re.MULTILINE), name
    assert re.search(r"^  max_workers +8$", text, re.MULTILINE)
    assert re.search(r"^  limits.max_waiting +10000  \(default\)$", text, re.MULTILINE)
    assert "3600 (each worker lives 3240 to 3600 s)" in text


def test_check_config_finds_nothing_wrong_with_the_example_for_containers() -> None:
    out = io.StringIO()
    assert check_config(CONTAINERS_EXAMPLE, out) == 0
    assert out.getvalue().startswith(f"{CONTAINERS_EXAMPLE}: nothing wrong; 2 pools\n")
    config = load_config(CONTAINERS_EXAMPLE)
    assert [(each.name, each.runtime) for each in config.pools] == [("java", "cri"), ("typescript", "cri")]
    switches = [name for name, field in IsolationConfig.model_fields.items() if field.default is True]
    assert len(switches) == 5
    for each in config.pools:
        assert each.has_own_execroots
        assert each.isolation.run_as_user
        assert set(switches) <= each.isolation.model_fields_set, "isolation is to be spelt out"
        assert all(getattr(each.isolation, name) for name in switches)


@pytest.mark.parametrize("kind", ["Balanced", "Memory-constrained", "Quick"])
def test_each_cadence_of_garbage_collection_in_the_example_is_a_valid_one(kind: str) -> None:
    """Those that are commented out are put in the place of the one that is not."""
    text = CONTAINERS_EXAMPLE.read_text()
    offered = re.findall(rf"// {kind}.*\n((?: +//.*\n)*?) +(?:// )?(lifecycle: .*)\n", text)
    assert len(offered) == 2
    for _, lifecycle in offered:
        changed = re.sub(r"^      lifecycle: .*$", lifecycle, text, flags=re.MULTILINE)
        frequencies = [each.lifecycle.gc_job_frequency for each in parse_config(changed, kind).pools]
        assert frequencies == [int(lifecycle.partition("gc_job_frequency: ")[2].partition(" ")[0])] * 2


def test_check_config_shows_no_value_of_the_environment(tmp_path: Path) -> None:
    document = tmp_path / "pools.json5"
    document.write_text(pool('env: {TOKEN: "hidden-value", B: ""}'))
    out = io.StringIO()
    assert check_config(document, out) == 0
    assert "B, TOKEN" in out.getvalue()
    assert "hidden-value" not in out.getvalue()


def test_check_config_says_what_is_set_and_not_used(tmp_path: Path) -> None:
    document = tmp_path / "pools.json5"
    document.write_text(
        '{pools: [{name: "a", language: "custom(x)", runtime: "process", container_image: "i"}]}'
    )
    out = io.StringIO()
    assert check_config(document, out) == 0
    assert "i (not used by plain processes)" in out.getvalue()
    assert "not used: this language has no built-in way" in out.getvalue()


def test_check_config_says_when_recorded_requests_are_not_used(tmp_path: Path) -> None:
    document = tmp_path / "pools.json5"
    out = io.StringIO()
    document.write_text(pool('warmup: {requests: ["a.rec"]}'))
    assert check_config(document, out) == 0
    assert '["a.rec"] (only workers with an execroot of their own are primed with them)' in out.getvalue()
    document.write_text(
        pool('warmup: {requests: ["a.rec"], precompile: false, preload: false, commands: [{argv: ["w"]}]}')
    )
    assert check_config(document, out) == 0
    assert '["a.rec"] (not used: warmup.precompile is false)' in out.getvalue()
    assert "false (warmup.commands are not run)" in out.getvalue()


def test_check_config_says_the_same_as_loading_when_something_is_wrong(tmp_path: Path) -> None:
    document = tmp_path / "pools.json5"
    document.write_text(pool("max_worker: 3"))
    out = io.StringIO()
    assert check_config(document, out) == 78
    with pytest.raises(ConfigError) as caught:
        load_config(document)
    assert out.getvalue() == f"{caught.value}\n"


# The reference


def _defaults(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for path in field_paths(model, prefix):
        inner: Any = model
        for step in re.sub(r"\[\]", "", path).split("."):
            field = inner.model_fields[step]
            inner = next(iter(_models_in(field.annotation)), None)
        yield path, field.default


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def test_the_reference_has_every_field_and_its_default_and_no_other() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| (.+?) \| .+ \|$", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE
    )
    documented = dict(rows)
    assert len(documented) == len(rows)
    expected: dict[str, str] = {}
    for path, default in _defaults(Config):
        if default is PydanticUndefined:
            expected[path] = "must be given"
        elif isinstance(default, BaseModel):
            expected[path] = "`{}`"
        elif isinstance(default, float):
            expected[path] = f"`{default:g}`"
        else:
            shown = "{}" if isinstance(default, dict) else None
            if default is None or isinstance(default, bool):
                shown = json.dumps(default)
            if isinstance(default, str):
                shown = f'"{default}"'
            elif isinstance(default, tuple):
                shown = "[" + ", ".join(f'"{item}"' for item in default) + "]"
            expected[path] = f"`{shown or default}`"
    assert documented == expected
