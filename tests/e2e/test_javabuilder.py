"""Bazel's own JavaBuilder behind the wrapper: the real tool of real builds."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

from tests.e2e.driver import (
    Answer,
    WorkRequest,
    fetched,
    java_builder_command,
    java_builder_request,
    wrapped,
)

from fetch_java_tools import java_builder  # isort: skip  # the driver has put tools/ on sys.path

COMPILES = 50


@pytest.fixture(scope="module")
def javabuilder() -> list[str]:
    """The command that Bazel starts JavaBuilder with, on the system's JDK, with a quick JVM."""
    java = shutil.which("java")
    if java is None:
        pytest.fail("java is missing: apt-get install openjdk-17-jdk-headless", pytrace=False)
    return java_builder_command(java, fetched(java_builder))


def compile_requests(folder: Path) -> list[WorkRequest]:
    """Requests as Bazel words them, each for a class of its own with its number in it."""
    (folder / "src").mkdir()
    (folder / "out").mkdir()
    requests = []
    for number in range(COMPILES):
        source = f"src/Number{number}.java"
        (folder / source).write_text(
            f'public class Number{number} {{ public static String text() {{ return "is-{number}-"; }} }}\n'
        )
        output = f"out/libnumber{number}.jar"
        requests.append(java_builder_request(source, output, f"//numbers:number{number}"))
    return requests


def assert_each_compiled_its_own(folder: Path, answers: list[Answer]) -> None:
    assert len(answers) == COMPILES
    for number, answer in enumerate(answers):
        response = answer.response.pb
        assert response.exit_code == 0, response.output
        with zipfile.ZipFile(folder / "out" / f"libnumber{number}.jar") as jar:
            classes = [name for name in jar.namelist() if name.endswith(".class")]
            assert classes == [f"Number{number}.class"]
            assert b"is-%d-" % number in jar.read(classes[0])


@pytest.mark.e2e
def test_fifty_singleplex_compiles_in_a_row_each_give_their_own_jar(
    tmp_path: Path, javabuilder: list[str]
) -> None:
    requests = compile_requests(tmp_path)
    with wrapped(javabuilder, cwd=tmp_path) as host:
        answers = host.exchange(requests)
    assert_each_compiled_its_own(tmp_path, answers)
    assert {answer.response.pb.request_id for answer in answers} == {0}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="singleplex-tools"),
        pytest.param(("--tool-multiplex",), id="multiplex-tool"),
    ],
)
def test_fifty_multiplex_compiles_each_give_their_own_jar_and_id(
    tmp_path: Path, javabuilder: list[str], options: tuple[str, ...]
) -> None:
    requests = compile_requests(tmp_path)
    with wrapped(javabuilder, *options, cwd=tmp_path) as host:
        answers = host.exchange(requests, in_flight=4)
    assert_each_compiled_its_own(tmp_path, answers)
    assert [answer.response.pb.request_id for answer in answers] == list(range(1, COMPILES + 1))


@pytest.mark.e2e
def test_a_compile_error_is_that_requests_own_and_the_next_compile_succeeds(
    tmp_path: Path, javabuilder: list[str]
) -> None:
    requests = compile_requests(tmp_path)[:3]
    (tmp_path / "src" / "Number1.java").write_text("public class Number1 { int x = nothing; }\n")
    with wrapped(javabuilder, cwd=tmp_path) as host:
        first, broken, last = (answer.response.pb for answer in host.exchange(requests))
    assert (first.exit_code, broken.exit_code, last.exit_code) == (0, 1, 0)
    assert b"cannot find symbol" in broken.output
    assert b"cannot find symbol" not in last.output
