"""The configuration of a worker node, made of the one that stands at the top level."""

from __future__ import annotations

import json
from pathlib import Path

import json5
import pytest

from wrapper.errors import ConfigError
from wrapper.node_config import endpoint, keys_of, node_config

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "nativelink-config.json"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://scheduler:50052", "grpc://scheduler:50052"),
        ("grpc://10.0.0.1:50061", "grpc://10.0.0.1:50061"),
        ("https://s.example:443/", "grpcs://s.example:443"),
        ("grpcs://[::1]:1", "grpcs://[::1]:1"),
    ],
)
def test_endpoints_may_be_written_either_way(given: str, meant: str) -> None:
    assert endpoint(given) == meant


@pytest.mark.parametrize(
    "given",
    ["scheduler:50052", "http://scheduler", "http://:1", "ftp://a:1", "http://a:b", "http://a:1/x", ""],
)
def test_what_is_no_endpoint_is_refused_with_an_example(given: str) -> None:
    with pytest.raises(ConfigError, match="http://HOST:PORT"):
        endpoint(given)


def test_a_nodes_values_are_put_in_and_the_rest_stays() -> None:
    document = node_config(
        TEMPLATE,
        scheduler="http://sched:50052",
        data_dir="/data",
        name="n-",
        entrypoint="/e",
        keys=["java"],
        cpus=3,
    )
    (worker,) = (one["local"] for one in document["workers"])
    assert worker["worker_api_endpoint"] == {"uri": "grpc://sched:50052"}
    assert worker["work_directory"] == "/data/work"
    assert worker["platform_properties"] == {
        "cpu_count": {"values": ["3"]},
        "persistentWorkerKey": {"values": ["java"]},
    }
    template = json.loads(TEMPLATE.read_text())["workers"][0]["local"]
    for name in ("additional_environment", "timeout_handled_externally", "max_action_timeout_s"):
        assert worker[name] == template[name]
    cas = document["stores"][1]["fast_slow"]
    assert cas["fast"]["filesystem"]["content_path"] == "/data/cas"
    assert cas["slow"]["grpc"]["endpoints"] == [{"address": "grpc://sched:50051"}]


def test_the_scheduler_is_told_no_keys_unless_asked() -> None:
    (worker,) = node_config(TEMPLATE, scheduler="http://s:1")["workers"]
    assert worker["local"]["platform_properties"] == {"cpu_count": {"query_cmd": "nproc"}}


def test_the_top_level_configuration_says_what_the_client_and_the_daemon_need() -> None:
    """FACTS: what NativeLink hands over only if it is asked to, and what races with time-outs."""
    document = json.loads(TEMPLATE.read_text())
    (scheduler,) = (one["simple"] for one in document["schedulers"])
    (worker,) = (one["local"] for one in document["workers"])
    declared = scheduler["supported_platform_properties"]
    assert declared["persistentWorkerKey"] == declared["persistentWorkerTool"] == "ignore"
    assert scheduler["allocation_strategy"] == "most_recently_used"
    assert scheduler["worker_timeout_s"] == 3600
    assert worker["timeout_handled_externally"] is True
    assert worker["additional_environment"] == {
        "PATH": {"value": "/usr/local/bin:/usr/bin:/bin"},
        "NL_WORKER_KEY": {"property": "persistentWorkerKey"},
        "NL_WORKER_TOOL": {"property": "persistentWorkerTool"},
        "NL_WORKER_PROTOCOL": {"property": "persistentWorkerProtocol"},
        "NL_TIMEOUT_MS": "timeout_millis",
        "NL_SIDE_CHANNEL": "side_channel_file",
        "NL_ACTION_DIR": "action_directory",
    }


def test_its_shape_is_that_of_a_configuration_that_a_real_one_ran_with() -> None:
    real = ROOT.parent / "shared" / "nativelink-1.6.6.json5"
    if not real.exists():  # a checkout alone: the shapes were compared when this was written
        return
    known = _paths(json5.loads(real.read_text()))
    own = ("supported_platform_properties", "additional_environment", "platform_properties")
    ours = {
        path for path in _paths(json.loads(TEMPLATE.read_text())) if not any(part in path for part in own)
    }
    assert ours <= known


def _paths(value: object, at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    if isinstance(value, dict):
        return {path for name, below in value.items() for path in _paths(below, (*at, name))}
    if isinstance(value, list):
        return {path for below in value for path in _paths(below, (*at, "[]"))}
    return {at}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"workers": [{"local": {}}]}', "not json"])
def test_another_template_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(ConfigError, match=str(tmp_path / "t")):
        node_config(tmp_path / "t", scheduler="http://s:1")
    with pytest.raises(ConfigError, match="cannot be read"):
        node_config(tmp_path / "missing", scheduler="http://s:1")


def test_only_keys_without_patterns_can_be_told_to_a_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "pools.json5"
    file.write_text(
        '{pools: [{name: "a", language: "jvm", keys: ["java", "java-*", "ts?"], worker_command: ["x"]}]}'
    )
    assert keys_of(str(file)) == ["java"]
