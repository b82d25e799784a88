"""The example's Java worker by itself, without the wrapper: what a good worker has to do."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.driver import HostError, WorkerHost, WorkRequest, request
from wrapper.worker_protocol import proto_framing
from wrapper.worker_protocol.messages import WorkResponse

import demo_input  # isort: skip  # the driver has put the example on sys.path

QUICK_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")


@pytest.fixture(scope="module")
def program() -> list[str]:
    """The command that starts the worker, without --persistent_worker."""
    demo_input.CACHE.mkdir(parents=True, exist_ok=True)
    jdk = demo_input.find_jdk()
    return [jdk.java, *QUICK_JVM, "-jar", str(demo_input.worker_jar(jdk))]


@pytest.fixture
def worker(program: list[str], tmp_path: Path) -> Iterator[WorkerHost]:
    with WorkerHost([*program, "--persistent_worker"], cwd=tmp_path) as host:
        yield host


def one(host: WorkerHost, *arguments: str) -> tuple[int, str]:
    response = host.exchange([request(*arguments)])[0].response.pb
    return response.exit_code, response.output.decode()


@pytest.mark.e2e
def test_errors_and_bad_options_come_back_as_javac_says_them(worker: WorkerHost, tmp_path: Path) -> None:
    (tmp_path / "Wrong.java").write_text("class Wrong { int x = nothing; }\n")
    (tmp_path / "Right.java").write_text("class Right { int x = 1; }\n")
    exit_code, output = one(worker, "-d", "out", "Wrong.java")
    assert (exit_code, "Wrong.java:1: error: cannot find symbol" in output) == (1, True)
    exit_code, output = one(worker, "-no-such-flag")
    assert (exit_code, "-no-such-flag" in output) == (2, True)
    assert one(worker, "-d", "out", "Right.java") == (0, "")
    assert (tmp_path / "out" / "Right.class").exists()


@pytest.mark.e2e
def test_a_class_path_that_changes_under_the_same_name_and_time_is_seen(
    worker: WorkerHost, tmp_path: Path
) -> None:
    (tmp_path / "User.java").write_text("class User { int x = Lib.new_one(); }\n")
    for name, expected in (("old_one", 1), ("new_one", 0), ("old_one", 1)):
        (tmp_path / "Lib.java").write_text(f"class Lib {{ static int {name}() {{ return 1; }} }}\n")
        assert one(worker, "-d", "lib", "Lib.java") == (0, "")
        os.utime(tmp_path / "lib" / "Lib.class", (1_000_000, 1_000_000))
        os.utime(tmp_path / "lib", (1_000_000, 1_000_000))
        (tmp_path / "Lib.java").unlink()
        exit_code, output = one(worker, "-cp", "lib", "-d", "out", "User.java")
        assert exit_code == expected, output


@pytest.mark.e2e
def test_a_source_that_overflows_the_stack_of_javac_fails_alone(worker: WorkerHost, tmp_path: Path) -> None:
    (tmp_path / "Deep.java").write_text(f"class Deep {{ int x = {'(' * 20_000}1{')' * 20_000}; }}\n")
    (tmp_path / "Right.java").write_text("class Right { }\n")
    exit_code, output = one(worker, "-d", "out", "Deep.java")
    assert exit_code != 0
    assert "StackOverflowError" in output or "too deep" in output or "system resources" in output, output[
        :500
    ]
    assert one(worker, "-d", "out", "Right.java") == (0, "")


@pytest.mark.e2e
def test_a_processor_that_prints_cannot_reach_the_protocol(worker: WorkerHost, tmp_path: Path) -> None:
    (tmp_path / "Loud.java").write_text(
        "import java.util.Set;\n"
        "import javax.annotation.processing.*;\n"
        "import javax.lang.model.element.TypeElement;\n"
        '@SupportedAnnotationTypes("*")\n'
        "public class Loud extends AbstractProcessor {\n"
        "  public boolean process(Set<? extends TypeElement> a, RoundEnvironment r) {\n"
        '    System.out.println("loud"); return false;\n'
        "  }\n"
        "}\n"
    )
    (tmp_path / "Right.java").write_text("class Right { }\n")
    assert one(worker, "-proc:none", "-d", "processors", "Loud.java") == (0, "")
    exit_code, output = one(
        worker, "-processorpath", "processors", "-processor", "Loud", "-d", "out", "Right.java"
    )
    assert exit_code == 0, output
    assert "loud" in worker.stderr_tail()


@pytest.mark.e2e
def test_a_sandboxed_request_is_refused_not_compiled_elsewhere(worker: WorkerHost, tmp_path: Path) -> None:
    (tmp_path / "Right.java").write_text("class Right { }\n")
    sandboxed = WorkRequest.of(arguments=[b"-d", b"out", b"Right.java"], sandbox_dir=b"__sandbox/1/_main")
    response = worker.exchange([sandboxed], in_flight=1)[0].response.pb
    assert response.exit_code == 1
    assert b"sandbox_dir" in response.output
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_forty_multiplex_requests_each_get_their_own_answer(worker: WorkerHost, tmp_path: Path) -> None:
    requests = []
    for number in range(40):
        (tmp_path / f"C{number}.java").write_text(f"class C{number} {{ int x = missing{number}; }}\n")
        requests.append(request("-d", "out", f"C{number}.java"))
    for number, answer in enumerate(worker.exchange(requests, in_flight=8)):
        assert answer.response.pb.exit_code == 1
        assert b"missing%d\n" % number in answer.response.pb.output


def answers_to(program: list[str], folder: Path, stream: bytes) -> list[WorkResponse]:
    """All responses of a worker that reads exactly this and then the end of its input."""
    done = subprocess.run(
        [*program, "--persistent_worker"], cwd=folder, input=stream, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    decoder = proto_framing.response_decoder()
    decoder.feed(done.stdout)
    responses = []
    while (response := decoder.next_message()) is not None:
        responses.append(response)
    decoder.end_of_stream()
    return responses


@pytest.mark.e2e
def test_a_cancelled_request_is_answered_so_once_and_its_siblings_are_unharmed(
    program: list[str], tmp_path: Path
) -> None:
    stream = b""
    count = 30
    for number in range(1, count + 1):
        (tmp_path / f"C{number}.java").write_text(f"class C{number} {{ }}\n")
        compile_it = request("-d", "out", f"C{number}.java")
        compile_it.pb.request_id = number
        stream += proto_framing.encode_request(compile_it)
    # The last one is still queued by then; the other two cancels are for nobody.
    for number in (count, 77, 0):
        stream += proto_framing.encode_request(WorkRequest.of(request_id=number, cancel=True))
    responses = {response.pb.request_id: response.pb for response in answers_to(program, tmp_path, stream)}
    assert sorted(responses) == list(range(1, count + 1))
    assert [number for number, pb in responses.items() if pb.was_cancelled] == [count]
    assert not (tmp_path / "out" / f"C{count}.class").exists()
    assert (tmp_path / "out" / f"C{count - 1}.class").exists()


@pytest.mark.e2e
def test_requests_before_the_end_of_input_are_answered_and_unknown_fields_are_skipped(
    program: list[str], tmp_path: Path
) -> None:
    (tmp_path / "Right.java").write_text("class Right { }\n")
    known = request("-d", "out", "Right.java").pb.SerializeToString()
    # Fields 100 to 103, one of each wire type, and explicit zeros for request_id and cancel.
    unknown = b"\xa0\x06\x96\x01" + b"\xa9\x06" + b"8" * 8 + b"\xb2\x06\x03abc" + b"\xbd\x06" + b"4" * 4
    body = unknown + known + b"\x18\x00\x20\x00" + unknown
    (response,) = answers_to(program, tmp_path, bytes([len(body)]) + body)
    assert (response.pb.exit_code, response.pb.request_id, response.pb.output) == (0, 0, b"")
    assert (tmp_path / "out" / "Right.class").exists()


@pytest.mark.e2e
def test_arguments_that_start_the_worker_stand_before_those_of_each_request(
    program: list[str], tmp_path: Path
) -> None:
    (tmp_path / "Right.java").write_text("class Right { }\n")
    with WorkerHost([*program, "-d", "everywhere", "--persistent_worker"], cwd=tmp_path) as host:
        assert one(host, "Right.java") == (0, "")
    assert (tmp_path / "everywhere" / "Right.class").exists()


@pytest.mark.e2e
def test_without_persistent_worker_it_compiles_once_from_an_argument_file(
    program: list[str], tmp_path: Path
) -> None:
    (tmp_path / "Right.java").write_text("class Right { }\n")
    (tmp_path / "arguments").write_text("-d\nonce\nRight.java\n")
    done = subprocess.run([*program, "@arguments"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "once" / "Right.class").exists()


@pytest.mark.e2e
def test_it_ends_at_once_on_sigterm_and_says_what_is_wrong_with_garbage(
    program: list[str], tmp_path: Path
) -> None:
    with WorkerHost([*program, "--persistent_worker"], cwd=tmp_path) as host:
        host.exchange([request("-version")])
        host.process.send_signal(signal.SIGTERM)
        assert host.process.wait(10) == 128 + signal.SIGTERM
    with WorkerHost([*program, "--persistent_worker"], cwd=tmp_path) as host:
        assert host.process.stdin is not None
        host.process.stdin.write(b"hello, is this a worker?\n" * 20)
        assert host.process.wait(30) == 1
        assert "not the worker protocol" in host.stderr_tail()
        with pytest.raises(HostError):
            host.exchange([request("-version")])
