"""The client in C, in Python, and in C with its memory looked after: every test is run on all three."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.client_world import PROGRAM, ClientWorld
from wrapper.install_entrypoint import install

SOURCE = Path(__file__).resolve().parents[2] / "native" / "client.c"
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="session")
def sanitized_client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("sanitized") / "client"
    flags = ("-std=c11", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["cc", *flags, *SANITIZERS, "-o", program, SOURCE], check=True)
    return program


@pytest.fixture(params=["native", "python", "sanitized"])
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Install = Callable[[Path], None]


@pytest.fixture(scope="session")
def installers(sanitized_client: Path) -> dict[str, Install]:
    """What puts each of the clients into a folder."""

    def installer(*, in_python: bool) -> Install:
        def put(folder: Path) -> None:
            install(str(folder), in_python=in_python, socket=None, work_roots=(), out=io.StringIO())

        return put

    def put_sanitized(folder: Path) -> None:
        shutil.copy(sanitized_client, folder / PROGRAM)

    return {
        "native": installer(in_python=False),
        "python": installer(in_python=True),
        "sanitized": put_sanitized,
    }


@pytest.fixture
def world(language: str, installers: dict[str, Install]) -> Iterator[ClientWorld]:
    with ClientWorld(installers[language]) as world:
        yield world


@pytest.fixture
def worlds(installers: dict[str, Install]) -> Iterator[list[ClientWorld]]:
    """One of each, for what takes long: it is waited for once."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(ClientWorld(put)) for put in installers.values()]
