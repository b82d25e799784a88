"""`record` in front of a real worker, and workers of a pool that are primed with what it has recorded."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.e2e.driver import WorkerHost, request, wrapped
from tests.support.raw_host import echo_tool, until
from wrapper.recording import RecordedRequests
from wrapper.worker_protocol.messages import WorkRequest

import demo_input  # isort: skip  # the driver has put the example on sys.path

QUICK_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")


def recording(tool: list[str], output: Path, *options: str, cwd: Path) -> WorkerHost:
    argv = [sys.executable, "-m", "wrapper", "record", "--output", str(output), *options, "--", *tool]
    return WorkerHost(argv, cwd=cwd)


@pytest.mark.e2e
def test_a_java_worker_is_primed_with_what_was_recorded_from_another(tmp_path: Path) -> None:
    demo_input.CACHE.mkdir(parents=True, exist_ok=True)
    jdk = demo_input.find_jdk()
    tool = [jdk.java, *QUICK_JVM, "-jar", str(demo_input.worker_jar(jdk))]
    there = tmp_path / "there"
    there.mkdir()
    for number in range(3):
        (there / f"C{number}.java").write_text(f"class C{number} {{ int x = {number}; }}\n")
    with recording([*tool, "--persistent_worker"], tmp_path / "javac.rec", cwd=there) as host:
        for number in range(3):
            answer = host.exchange([request("-d", "out", f"C{number}.java")])[0].response.pb
            assert (answer.exit_code, answer.output) == (0, b"")
        assert host.close() == 0
    assert (there / "out" / "C2.class").exists()

    here = tmp_path / "here"
    sandbox = here / "__sandbox" / "1" / "_main"
    sandbox.mkdir(parents=True)
    (sandbox / "Real.java").write_text("class Real { }\n")
    pools = tmp_path / "pools.json5"
    pools.write_text(
        '{pools: [{name: "java", language: "jvm", worker_command: [], keys: ["*"], '
        f'warmup: {{requests: ["{tmp_path / "javac.rec"}"], max_warmup_ms: 60000}}}}]}}'
    )
    with wrapped(tool, "-v", "--config", str(pools), cwd=here) as host:
        sandboxed = WorkRequest.of(arguments=[b"-d", b"out", b"Real.java"], sandbox_dir=b"__sandbox/1/_main")
        answer = host.exchange([sandboxed], in_flight=1)[0].response.pb
        assert (answer.exit_code, answer.output) == (0, b"")
        said = host.stderr_tail()
    assert "warm-up done: pool=java" in said
    assert "primed=3 primed_failed=0" in said
    # Its own output and input, and nothing of the requests that primed it.
    assert sorted(p.name for p in sandbox.rglob("*")) == ["Real.class", "Real.java", "out"]
    assert [p.name for p in here.iterdir()] == ["__sandbox"]


@pytest.mark.e2e
def test_the_record_is_written_on_sigterm_too(tmp_path: Path) -> None:
    (tmp_path / "input").write_text("text")
    with recording(echo_tool(), tmp_path / "a.rec", "--trust-domain", "ours", cwd=tmp_path) as host:
        host.exchange([request("input")])
        assert not (tmp_path / "a.rec").exists()
        host.process.send_signal(signal.SIGTERM)
        assert host.process.wait(30) == 0
    recorded = RecordedRequests.load(str(tmp_path / "a.rec"))
    recorded.close()
    assert recorded.trust_domain == "ours"
    assert [set(each.tree.files) for each in recorded.requests] == [{b"input"}]
    until(lambda: not [name for name in os.listdir(tmp_path) if name.endswith(".part")], "nothing half-made")


@pytest.mark.e2e
def test_a_wrong_record_file_ends_the_wrapper_before_it_reads_anything(tmp_path: Path) -> None:
    (tmp_path / "pools.json5").write_text(
        '{pools: [{name: "p", language: "custom(x)", worker_command: [], keys: ["*"], '
        'warmup: {requests: ["missing.rec"]}}]}'
    )
    argv = [sys.executable, "-m", "wrapper", "--config", "pools.json5", "--", *echo_tool()]
    with WorkerHost(argv, cwd=tmp_path) as host:
        assert host.process.wait(30) == 78
        assert "record file missing.rec: cannot be read" in host.stderr_tail()
