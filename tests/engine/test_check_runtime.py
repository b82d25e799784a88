"""`check-runtime` as an operator runs it, on a real engine and on one that lacks something."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.fakes.scripted_engine import IMAGE, Fault, ScriptedEngine
from tests.support.cri import WORKERS, container_pool, engine_is_empty, leftovers_on_node
from tests.support.engine import PrivateContainerd
from tests.support.loop import run_async
from tests.support.oci_image import WORKER_UID
from tests.support.scripted_runtime import needs_root
from wrapper.check_runtime import check_runtime

ECHO = ["/usr/bin/python3", "-I", "-S", f"{WORKERS}/echo_worker.py", "--persistent_worker"]
EX_OK, EX_UNAVAILABLE, EX_CONFIG = 0, 69, 78


def run(document: Path, said: str = "") -> tuple[int, list[str]]:
    """Exit code and lines; `said`: what is in the log beside them."""
    argv = [sys.executable, "-m", "wrapper", "check-runtime", str(document)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (said in done.stderr) if said else done.stderr == ""
    return done.returncode, done.stdout.splitlines()


def written(folder: Path, document: dict[str, Any]) -> Path:
    path = folder / "pools.json5"
    path.write_text(json.dumps(document))
    return path


def marks(lines: list[str]) -> dict[str, str]:
    """What was looked at → "ok" or "MISSING"; the pools' headings are left out."""
    words = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    return {what.partition(":")[0]: mark for mark, what in words}


@pytest.mark.engine
def test_all_is_well_on_a_real_engine_and_nothing_is_left(engine: PrivateContainerd, tmp_path: Path) -> None:
    exit_code, lines = run(written(tmp_path, container_pool(engine, tmp_path, worker_command=ECHO)))
    assert exit_code == EX_OK, lines
    assert lines[0] == "pool pool:"
    looked_at = ["shim", "engine", "RuntimeReady", "NetworkReady", "control groups", "image", "trial"]
    assert marks(lines) == dict.fromkeys(looked_at, "ok")
    assert "  ok       trial: a worker starts, and is isolated as asked" in lines
    assert engine_is_empty(engine)
    assert leftovers_on_node(tmp_path) == []


@pytest.mark.engine
def test_a_worker_that_cannot_start_is_missing_with_the_reason(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    document = container_pool(engine, tmp_path, worker_command=["/nowhere/tool"])
    exit_code, lines = run(written(tmp_path, document))
    assert exit_code == EX_UNAVAILABLE
    assert [what for what, mark in marks(lines).items() if mark != "ok"] == ["trial"]
    assert "'/nowhere/tool'" in lines[-1]
    assert "No such file or directory" in lines[-1]
    assert engine_is_empty(engine)
    assert leftovers_on_node(tmp_path) == []


@pytest.mark.engine
def test_an_image_that_cannot_be_pulled_is_missing_with_its_name(
    engine: PrivateContainerd, tmp_path: Path
) -> None:
    image = "localhost:1/nowhere:1"
    document = container_pool(engine, tmp_path, worker_command=ECHO, container_image=image)
    exit_code, lines = run(written(tmp_path, document), said=f"has no image {image}: pulling it")
    assert exit_code == EX_UNAVAILABLE
    assert [what for what, mark in marks(lines).items() if mark != "ok"] == ["image"]
    assert "trial" not in marks(lines)
    assert any("MISSING  image" in line and image in line and "PullImage" in line for line in lines)


def test_no_engine_is_missing_with_the_socket(tmp_path: Path) -> None:
    socket = str(tmp_path / "no.sock")
    pool: dict[str, Any] = {"name": "p", "language": "custom(x)", "runtime": "cri", "cri_socket": socket}
    pool |= {"container_image": "x", "worker_command": ["x"]}
    exit_code, lines = run(written(tmp_path, {"pools": [pool], "state_dir": str(tmp_path / "state")}))
    assert exit_code == EX_UNAVAILABLE
    assert "MISSING" in lines[-1]
    assert socket in lines[-1]
    assert "is the engine running" in lines[-1]


def test_plain_processes_need_no_engine(tmp_path: Path) -> None:
    exit_code, lines = run(written(tmp_path, {"pools": [{"name": "p", "language": "jvm"}]}))
    assert (exit_code, len(lines)) == (EX_OK, 2)
    assert "nothing isolates them" in lines[1]


def test_a_wrong_configuration_is_said_as_anywhere_else(tmp_path: Path) -> None:
    path = written(tmp_path, {"pools": [{"name": "p", "language": "jvm", "runtime": "cri"}]})
    argv = [sys.executable, "-m", "wrapper", "check-runtime", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == EX_CONFIG
    assert "cri_socket: must be given" in done.stderr


async def look(engine: ScriptedEngine, folder: Path, **changes: Any) -> tuple[int, list[str]]:
    isolation = {"run_as_user": WORKER_UID, "seccomp": False, "mounts": [{"host_path": "/usr"}]}
    pool = {
        "name": "p",
        "language": "custom(x)",
        "runtime": "cri",
        "cri_socket": engine.socket,
        "container_image": IMAGE,
        "worker_command": ["/usr/bin/cat"],
        "isolation": isolation | changes,
    }
    out = io.StringIO()
    document = written(folder, {"pools": [pool], "state_dir": str(folder / "state")})
    return await check_runtime(document, out), out.getvalue().splitlines()


@needs_root
@pytest.mark.parametrize(("name", "remedy"), [("NetworkReady", "deploy/cni"), ("RuntimeReady", "journalctl")])
def test_a_condition_that_does_not_hold_is_missing_with_what_to_do(
    name: str, remedy: str, tmp_path: Path
) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            assert (await look(engine, tmp_path))[0] == EX_OK
            engine.conditions[name] = "cni config uninitialized"
            exit_code, lines = await look(engine, tmp_path)
            assert exit_code == EX_UNAVAILABLE
            line = next(line for line in lines if name in line)
            assert line.startswith(f"  MISSING  {name}: Scripted cni config uninitialized; ")
            assert remedy in line
            assert engine.is_empty

    run_async(main())


@needs_root
def test_isolation_that_the_engine_ignores_is_missing_by_name(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            exit_code, lines = await look(engine, tmp_path, seccomp=True)
            assert exit_code == EX_UNAVAILABLE
            assert "isolation.seccomp" in lines[-1]
            assert engine.is_empty
            assert leftovers_on_node(tmp_path) == []

    run_async(main())


@needs_root
@pytest.mark.parametrize(
    "call", ["Status", "RuntimeConfig", "ImageStatus", "RunPodSandbox", "ListPodSandbox"]
)
def test_an_engine_that_errs_at_any_call_is_a_line_and_no_traceback(call: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedEngine() as engine:
            engine.script(call, Fault(code=grpc.StatusCode.INTERNAL, details="disk is full"))
            exit_code, lines = await look(engine, tmp_path)
            assert exit_code == EX_UNAVAILABLE
            assert any("MISSING" in line and call in line and "disk is full" in line for line in lines)
            assert engine.is_empty

    run_async(main())
