"""`install-entrypoint`: which program comes into the folder, and what becomes of a policy file."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.client_world import PROGRAM
from wrapper import client
from wrapper.cli import main
from wrapper.runtime import native

ROOT = Path(__file__).resolve().parents[2]


def install(*options: str) -> int:
    return main(["install-entrypoint", *options])


def run(program: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *argv], capture_output=True, text=True)


@pytest.mark.parametrize("options", [(), ("--python",)])
def test_the_folder_is_made_and_holds_a_program_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    folder = tmp_path / "new" / "folder"
    assert install(*options, str(folder)) == 0
    program, policy = folder / PROGRAM, folder / f"{PROGRAM}.conf"
    said = capsys.readouterr().out
    assert f"{program}: the client in {'Python' if options else 'C'}\n" in said
    assert f"{policy}: new\n" in said
    assert stat.S_IMODE(program.stat().st_mode) == 0o755
    assert stat.S_IMODE(policy.stat().st_mode) == 0o644
    assert policy.stat().st_uid == os.geteuid()
    assert program.read_bytes().startswith(b"#!" if options else b"\x7fELF")
    names = {path.name for path in folder.iterdir()}
    assert names == {PROGRAM, f"{PROGRAM}.conf"} | ({f"{PROGRAM}.pyc"} if options else set())
    done = run(program, "/bin/echo", "direct")
    assert (done.returncode, done.stdout, done.stderr) == (0, "direct\n", "")


def test_a_new_policy_file_says_what_was_given_and_explains_the_rest(tmp_path: Path) -> None:
    assert install("--socket", "/run/a", "--work-root", "/w1", "--work-root", "/w2", str(tmp_path / "x")) == 0
    text = (tmp_path / "x" / f"{PROGRAM}.conf").read_text()
    set_there = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert set_there == ["socket = /run/a", "work_root = /w1", "work_root = /w2"]


def test_the_defaults_that_it_shows_are_those_of_the_client(tmp_path: Path) -> None:
    assert install(str(tmp_path / "x")) == 0
    text = (tmp_path / "x" / f"{PROGRAM}.conf").read_text()
    shown = dict(re.findall(r"^#(\w+) = (.+)$", text, re.MULTILINE))
    assert shown.pop("work_root")
    assert shown == {name.decode(): value.decode() for name, value in client.policy.items()}
    # And it is understood with every line in force.
    (tmp_path / "x" / f"{PROGRAM}.conf").write_text(re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE))
    assert run(tmp_path / "x" / PROGRAM, "/bin/true").returncode == 0


def test_a_policy_file_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x"
    assert install("--work-root", "/w", str(folder)) == 0
    before = (folder / f"{PROGRAM}.conf").read_text()
    for options in ((), ("--work-root", "/w"), ("--python",)):
        assert install(*options, str(folder)) == 0
        assert "kept as it is" in capsys.readouterr().out
    assert install("--work-root", "/another", str(folder)) == 78
    assert "is there already" in capsys.readouterr().err
    assert (folder / f"{PROGRAM}.conf").read_text() == before


def test_a_program_that_runs_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert install(str(folder)) == 0
    env = {"NL_TIMEOUT_MS": "60000"}
    with subprocess.Popen([folder / PROGRAM, "/bin/cat"], env=env, stdin=subprocess.PIPE) as process:
        assert install("--python", str(folder)) == 0
        assert install(str(folder)) == 0
        process.communicate()
    assert process.returncode == 0
    assert {path.name for path in folder.iterdir()} == {PROGRAM, f"{PROGRAM}.conf"}


def test_a_folder_where_others_write_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o777)
    assert install(str(tmp_path)) == 78
    assert "writable by others" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [("--socket", "pool.sock"), ("--work-root", "w"), ("--work-root", "/w\nlost = fail")]
)
def test_paths_that_are_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str]
) -> None:
    assert install(*options, str(tmp_path / "x")) == 78
    assert "must be an absolute path" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert install(str(tmp_path / "file" / "x")) == 78
    assert "Not a directory" in capsys.readouterr().err


def test_without_the_client_in_c_the_one_in_python_comes_and_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_FOLDER", str(tmp_path / "nothing-built"))
    assert install(str(tmp_path / "x")) == 0
    said = capsys.readouterr().out
    assert "note: " in said
    assert "was not built" in said
    assert "the client in Python" in said
    assert run(tmp_path / "x" / PROGRAM, "/bin/echo", "yes").stdout == "yes\n"


def test_a_compiled_client_that_is_gone_or_of_another_python_is_told(tmp_path: Path) -> None:
    assert install("--python", str(tmp_path / "x")) == 0
    compiled = tmp_path / "x" / f"{PROGRAM}.pyc"
    compiled.write_bytes(b"\0\0\0\0" + compiled.read_bytes()[4:])
    for _ in range(2):
        done = run(tmp_path / "x" / PROGRAM, "/bin/true")
        assert (done.returncode, done.stdout) == (78, "")
        assert f"{compiled} is not there, or not for this Python" in done.stderr
        compiled.unlink(missing_ok=True)


def test_the_source_runs_as_it_is(tmp_path: Path) -> None:
    source = ROOT / "wrapper" / "client.py"
    argv = [sys.executable, "-IS", str(source), "/bin/echo", "direct"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "direct\n", "")


def test_the_client_in_python_loads_hardly_anything() -> None:
    """Every module costs each action of a build its time."""
    tree = ast.parse((ROOT / "wrapper" / "client.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    # `typing` is for the type checker only; `select` and `ctypes` are imported where they are needed.
    assert found == {"posix", "sys", "_signal", "_socket", "typing", "select", "ctypes"}


def test_the_client_in_c_can_be_read_in_one_go() -> None:
    assert len((ROOT / "native" / "client.c").read_text().splitlines()) <= 400
