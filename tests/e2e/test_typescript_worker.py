"""The TypeScript worker of docker/typescript by itself: its answers, and no request's trace in the next."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.e2e.driver import WorkerHost
from wrapper.worker_protocol.messages import WorkRequest
from wrapper.worker_protocol.wire_format import WireFormat

pytestmark = pytest.mark.e2e

DOCKER = Path(__file__).resolve().parents[2] / "docker" / "typescript"
NAME = 'a}{".ts'
WORDS = ("--target", "es2022", "--lib", "es2022", "--strict", "--noEmitOnError", "--outDir", "out")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("root")
    subprocess.run([DOCKER / "install.sh", root], check=True, stdout=sys.stderr)
    return ["node", str(root / "opt" / "typescript-worker" / "typescript_worker.js")]


@pytest.fixture
def worker(program: list[str], tmp_path: Path) -> Iterator[WorkerHost]:
    argv = [*program, *WORDS, "--persistent_worker"]
    with WorkerHost(argv, protocol=WireFormat.JSON, cwd=tmp_path) as host:
        yield host


def files(folder: Path, contents: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Write files; returns them as a request's inputs."""
    for name, text in contents.items():
        (folder / name).write_text(text)
    return [
        (name.encode(), hashlib.sha256(text.encode()).hexdigest().encode()) for name, text in contents.items()
    ]


def one(host: WorkerHost, words: list[str], inputs: list[tuple[bytes, bytes]]) -> tuple[int, str]:
    request = WorkRequest.of(arguments=[word.encode() for word in words], inputs=inputs)
    response = host.exchange([request])[0].response.pb
    return response.exit_code, response.output.decode()


def test_a_path_with_other_content_is_compiled_anew(worker: WorkerHost, tmp_path: Path) -> None:
    """Also where only what it imports has changed, and whether its content is known or not."""
    main = "import { one } from './one';\nexport const two: number = one + one;\n"
    for text, wanted in (
        ("export const one = 1;\n", (0, "")),
        ("export const one = 'one';\n", (1, "main.ts(2,14): error TS2322")),
        ("export const one = 2;\n", (0, "")),
    ):
        contents = {"main.ts": main, "one.ts": text}
        for inputs in (files(tmp_path, contents), [], files(tmp_path, contents)):
            code, output = one(worker, ["main.ts"], inputs)
            assert (code, output[: len(wanted[1])]) == wanted
        if wanted[0] == 0:
            assert text.split()[3] in (tmp_path / "out" / "one.js").read_text()


def test_a_file_that_is_gone_is_not_found(worker: WorkerHost, tmp_path: Path) -> None:
    inputs = files(
        tmp_path, {"main.ts": "export { one } from './one';\n", "one.ts": "export const one = 1;\n"}
    )
    assert one(worker, ["main.ts"], inputs) == (0, "")
    (tmp_path / "one.ts").unlink()
    code, output = one(worker, ["main.ts"], inputs[:1])
    assert (code, "Cannot find module './one'" in output) == (1, True), output


def test_options_of_one_request_are_not_in_the_next(worker: WorkerHost, tmp_path: Path) -> None:
    """Of the same content: what is kept of it has been bound under options."""
    inputs = files(tmp_path, {"main.ts": "var package = 1;\n"})
    for strict, wanted in (("true", 1), ("false", 0), ("true", 1)):
        code, output = one(worker, ["--strict", strict, "main.ts"], inputs)
        assert (code, "in strict mode" in output) == (wanted, bool(wanted)), output


def test_globals_of_one_request_are_not_in_the_next(worker: WorkerHost, tmp_path: Path) -> None:
    declares = files(tmp_path, {"globals.d.ts": "declare const fromBefore: number;\n"})
    uses = files(tmp_path, {"main.ts": "export const here = fromBefore;\n"})
    assert one(worker, ["main.ts", "globals.d.ts"], [*uses, *declares]) == (0, "")
    code, output = one(worker, ["main.ts"], uses)
    assert (code, "Cannot find name 'fromBefore'" in output) == (1, True), output


def test_a_project_and_a_flagfile_are_understood(worker: WorkerHost, tmp_path: Path) -> None:
    files(tmp_path, {"main.ts": "export const a = 1;\n", "flags": "--declaration\nmain.ts\n"})
    assert one(worker, ["@flags"], []) == (0, "")
    assert (tmp_path / "out" / "main.d.ts").exists()
    (tmp_path / "tsconfig.json").write_text(json.dumps({"files": ["main.ts"]}))
    assert one(worker, ["--outDir", "other", "-p", "."], []) == (0, "")
    assert (tmp_path / "other" / "main.js").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no source file was named"),
        (["--nonsense", "x.ts"], "error TS5023"),
        (["nowhere.ts"], "error TS6053"),
        (["-p", "nowhere.json"], "nowhere.json"),
        (["@nowhere"], "error TS5083"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(
    worker: WorkerHost, tmp_path: Path, words: list[str], said: str
) -> None:
    code, output = one(worker, words, [])
    assert (code, said in output) == (1, True), output
    assert one(worker, ["main.ts"], files(tmp_path, {"main.ts": "export {};\n"})) == (0, "")


def test_requests_may_come_in_any_pieces(program: list[str], tmp_path: Path) -> None:
    """Without white space between them, several at once, or byte by byte; braces in strings are no ends."""
    (tmp_path / NAME).write_text("export const a = '\u20ac';\n")
    requests = [{"requestId": number, "arguments": [NAME, "--outDir", "out"]} for number in (7, 8, 9)]
    text = "".join(json.dumps(request) for request in requests).encode()
    argv = [*program, "--persistent_worker"]
    for pieces in ([text], [text[i : i + 1] for i in range(len(text))]):
        with subprocess.Popen(
            argv, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for piece in pieces:
                process.stdin.write(piece)
            process.stdin.close()
            answers = [json.loads(line) for line in process.stdout.read().splitlines()]
        assert answers == [{"requestId": number, "exitCode": 0, "output": ""} for number in (7, 8, 9)]
        assert process.returncode == 0


def test_input_that_is_not_the_protocol_ends_the_worker_with_a_reason(program: list[str]) -> None:
    done = subprocess.run(
        [*program, "--persistent_worker"], input="{not json}", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "standard input is not the worker protocol in JSON" in done.stderr


def test_without_persistent_worker_it_is_the_compiler(program: list[str], tmp_path: Path) -> None:
    (tmp_path / "main.ts").write_text("export const a: string = 1;\n")
    done = subprocess.run([*program, "main.ts"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "error TS2322" in done.stdout) == (2, True)
    assert (tmp_path / "main.js").exists()
