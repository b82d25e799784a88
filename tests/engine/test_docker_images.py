"""The images of docker/, made without a registry: their scripts run over a base of the host's own programs.

What a Dockerfile's last stage sets (ENV, USER, CMD) is read from it: these are the images that it would make.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.support.base_root import base_root
from tests.support.engine import PrivateContainerd
from tests.support.loop import run_async
from tests.support.oci_image import tree_image
from wrapper.runtime.base import CommandResult, CommandSpec, Language, Mount, WorkerProcess, WorkerSpec
from wrapper.runtime.cri_container import CriRuntime, CriSettings
from wrapper.runtime.isolation import Isolation
from wrapper.worker_protocol import wire_format
from wrapper.worker_protocol.messages import WorkRequest, WorkResponse
from wrapper.worker_protocol.wire_format import WireFormat

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
EXECROOT = "/execroot"


@dataclass(frozen=True, slots=True)
class Image:
    """An image that the engine has, and what its Dockerfile says of it."""

    name: str
    environment: dict[str, str]
    user: str
    command: tuple[str, ...]


def image_of(engine: PrivateContainerd, folder: Path, kind: str, root: Path) -> Image:
    """Import `root` as the image of `docker/KIND`."""
    last_stage = (ROOT / "docker" / kind / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    environment = {
        name: value
        for line in re.findall(r"^ENV (.*)$", last_stage, re.MULTILINE)
        for name, value in (word.split("=", 1) for word in shlex.split(line))
    }
    [user] = re.findall(r"^USER (.*)$", last_stage, re.MULTILINE)
    [command] = re.findall(r"^CMD (.*)$", last_stage, re.MULTILINE)
    image = Image(f"localhost/nlww/{kind}:1", environment, user, tuple(json.loads(command)))
    tree_image(
        folder / f"{kind}.tar",
        image.name,
        root,
        entrypoint=image.command,
        environment={"PATH": "/usr/local/bin:/usr/bin:/bin", **environment},
        user=user,
    )
    engine.import_image(folder / f"{kind}.tar", image.name)
    return image


@pytest.fixture(scope="module")
def java(engine: PrivateContainerd, tmp_path_factory: pytest.TempPathFactory) -> Image:
    javac = shutil.which("javac")
    assert javac is not None
    home = Path(os.path.realpath(javac)).parents[1]
    folder = tmp_path_factory.mktemp("java")
    base_root(
        folder / "root",
        ["sh", "env"],
        linked_with=[str(home / file) for file in ("bin/java", "lib/server/libjvm.so", "lib/libzip.so")],
    )
    subprocess.run([ROOT / "docker" / "java" / "install.sh", folder / "root"], check=True)
    return image_of(engine, folder, "java", folder / "root")


@pytest.fixture(scope="module")
def typescript(engine: PrivateContainerd, tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("typescript")
    base_root(folder / "root", ["sh", "mkfifo", "node"])
    subprocess.run([ROOT / "docker" / "typescript" / "install.sh", folder / "root"], check=True)
    return image_of(engine, folder, "typescript", folder / "root")


@pytest.fixture
def execroot(tmp_path: Path) -> Path:
    """A folder that any user can write to: the image's is not known to the host."""
    folder = tmp_path / "execroot"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


@contextlib.asynccontextmanager
async def started(
    engine: PrivateContainerd, image: Image, execroot: Path, language: Language, **env: str
) -> AsyncIterator[WorkerProcess]:
    """The image's own worker, isolated as by default: another user than root, a read-only root."""
    uid, gid = map(int, image.user.split(":"))
    isolation = replace(Isolation(), run_as_user=uid, run_as_group=gid)
    state = execroot.parent / "state"
    runtime = CriRuntime(
        CriSettings(
            pool="image", socket=engine.socket, image=image.name, isolation=isolation, state_dir=str(state)
        )
    )
    mounts = (Mount(str(execroot), EXECROOT, read_only=False),)
    try:
        worker = await runtime.start(
            WorkerSpec("image", image.command, env, EXECROOT, language, mounts=mounts)
        )
        try:
            yield worker
        finally:
            await worker.stop(5)
    finally:
        await runtime.close()


async def ask(worker: WorkerProcess, protocol: WireFormat, arguments: Sequence[str]) -> WorkResponse:
    request = WorkRequest.of(arguments=[word.encode() for word in arguments])
    data = wire_format.encode_request(protocol, request)
    assert os.write(worker.stdin_fd, data) == len(data)
    decoder = wire_format.response_decoder(protocol)
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[WorkResponse] = loop.create_future()

    def read() -> None:
        data = os.read(worker.stdout_fd, 1 << 16)
        if not data:
            answer.set_exception(AssertionError(worker.stderr_tail().decode()))
            loop.remove_reader(worker.stdout_fd)
            return
        decoder.feed(data)
        response = decoder.next_message()
        if response is not None:
            answer.set_result(response)

    loop.add_reader(worker.stdout_fd, read)
    try:
        async with asyncio.timeout(60):
            return await answer
    finally:
        loop.remove_reader(worker.stdout_fd)


async def run(worker: WorkerProcess, *argv: str) -> CommandResult:
    return await worker.run(CommandSpec(argv, 120))


def test_the_java_image_has_a_worker_that_compiles_and_a_warm_up_that_uses_the_archive(
    engine: PrivateContainerd, java: Image, execroot: Path
) -> None:
    (execroot / "Hello.java").write_text("class Hello { java.sql.Date date; Missing missing; }")

    async def main() -> None:
        async with started(engine, java, execroot, Language.JVM) as worker:
            failed = await ask(worker, WireFormat.PROTO, ["-d", "out", "Hello.java"])
            assert (failed.pb.exit_code, "class Missing" in failed.pb.output.decode()) == (1, True)
            (execroot / "Hello.java").write_text("class Hello { java.sql.Date date; }")
            answer = await ask(worker, WireFormat.PROTO, ["-d", "out", "Hello.java"])
            assert (answer.pb.exit_code, answer.pb.output) == (0, b"")
            assert (execroot / "out" / "Hello.class").read_bytes()[:4] == b"\xca\xfe\xba\xbe"
            # It is the archive's classes that run, and the image's options that hold.
            process = await run(worker, "/opt/java/bin/jcmd", "{worker_pid}", "VM.command_line")
            assert java.environment["JAVA_OPTS"].encode() in process.output
            maps = Path(f"/proc/{worker.pid}/maps").read_text()
            assert "/opt/java-worker/java-worker.jsa" in maps
            assert await worker.collect_garbage() is not None

            warmed = await run(worker, "/opt/warmup/jvm-warmup.sh")
            assert (warmed.ok, warmed.output.startswith(b"jvm-warmup: 100 compilations")) == (True, True), (
                warmed
            )
            again = await ask(worker, WireFormat.PROTO, ["-d", "out", "Hello.java"])
            assert again.pb.exit_code == 0

    run_async(main())


def test_the_jvm_warm_up_fails_where_the_archive_does_not_go_with_the_options(
    engine: PrivateContainerd, java: Image, execroot: Path
) -> None:
    async def main() -> None:
        # Other options than the archive was made with; the JVM itself would go on without it.
        options = "-XX:-UseCompressedClassPointers"
        async with started(engine, java, execroot, Language.JVM, JAVA_OPTS=options) as worker:
            result = await run(worker, "/opt/warmup/jvm-warmup.sh")
            assert (result.returncode, b"does not go with this JVM" in result.output) == (1, True), result

    run_async(main())


def test_the_typescript_image_has_a_worker_that_compiles_and_a_warm_up(
    engine: PrivateContainerd, typescript: Image, execroot: Path
) -> None:
    (execroot / "hello.ts").write_text("export const answer: number = 'six times seven';\n")
    options = typescript.environment["NODE_OPTIONS"]

    async def main() -> None:
        async with started(engine, typescript, execroot, Language.NODEJS, NODE_OPTIONS=options) as worker:
            words = ["--strict", "--noEmitOnError", "--outDir", "out", "hello.ts"]
            failed = await ask(worker, WireFormat.JSON, words)
            assert (failed.pb.exit_code, b"hello.ts(1,14): error TS2322" in failed.pb.output) == (1, True)
            (execroot / "hello.ts").write_text("export const answer: number = 42;\n")
            answer = await ask(worker, WireFormat.JSON, words)
            assert (answer.pb.exit_code, answer.pb.output) == (0, b"")
            assert "answer = 42" in (execroot / "out" / "hello.js").read_text()
            code = "[process.env.NODE_OPTIONS, v8.getHeapStatistics().heap_size_limit].join('\\n')"
            seen = (await run(worker, "node", "-p", code)).output.decode().splitlines()
            assert seen[0].startswith(options)
            assert int(seen[1]) >= 4096 << 20
            assert await worker.collect_garbage() is not None

            warmed = await run(worker, "/opt/warmup/node-warmup.sh")
            assert (warmed.ok, warmed.output.startswith(b"node-warmup: 100 comp")) == (True, True), warmed
            assert (await ask(worker, WireFormat.JSON, words)).pb.exit_code == 0

    run_async(main())


@pytest.mark.parametrize("script", ["java/jvm-warmup.sh", "typescript/node-warmup.sh"])
@pytest.mark.parametrize("iterations", ["99", "1001", "many", "-100", "1e2", "99999999999999999999"])
def test_a_warm_up_takes_100_to_1000_iterations(script: str, iterations: str) -> None:
    for argv, env in (([iterations], {}), ([], {"WARMUP_ITERATIONS": iterations})):
        done = subprocess.run([ROOT / "docker" / script, *argv], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr.startswith("usage: ")) == (64, True), done
