"""Installing the package compiles its C programs, or says why not: a copy of the source, and no index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from wrapper.runtime.native import shim_path

ROOT = Path(__file__).resolve().parents[2]
ASK = """
from wrapper.errors import RuntimeUnavailable
from wrapper.runtime import native
try:
    print(native.shim_path())
except RuntimeUnavailable as error:
    print(error)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a clean checkout has that makes the package."""
    copy = tmp_path / "source"
    made = shutil.ignore_patterns("__pycache__", "native")
    shutil.copytree(ROOT / "wrapper", copy / "wrapper", ignore=made)
    shutil.copytree(ROOT / "native", copy / "native")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def install(source: Path, **environment: str) -> tuple[Path, str]:
    """Install into a folder beside the source; returns it, and what pip said."""
    site = source.parent / "site"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--verbose"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", site, source],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return site, done.stdout


def ask(site: Path) -> str:
    """What `shim_path` of an installed package says."""
    argv = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{ASK}"]
    return subprocess.run(argv, cwd="/", capture_output=True, text=True, check=True).stdout.strip()


def sdist(source: Path) -> Path:
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True
    )
    return source / done.stdout.splitlines()[-1]


def test_the_package_as_it_is_installed_here_has_the_shim() -> None:
    done = subprocess.run([shim_path()], capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("usage: shim ")) == (125, True)


def test_the_shim_is_static_so_that_it_runs_in_any_image() -> None:
    """No program header names an interpreter (the dynamic linker)."""
    elf = Path(shim_path()).read_bytes()
    offset, size, count = (int.from_bytes(elf[a:b], sys.byteorder) for a, b in ((32, 40), (54, 56), (56, 58)))
    types = [
        int.from_bytes(elf[at : at + 4], sys.byteorder) for at in range(offset, offset + size * count, size)
    ]
    assert 1 in types  # PT_LOAD: this was the table
    assert 3 not in types  # PT_INTERP


def test_an_install_from_a_source_distribution_has_the_shim(source: Path) -> None:
    archive = sdist(source)
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"native/{path.name}" for path in (ROOT / "native").iterdir()} <= names
    assert not {name for name in names if name.startswith("wrapper/native")}  # of another machine, perhaps
    unpacked = source.parent / "unpacked"
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    site, _ = install(next(unpacked.iterdir()))
    assert ask(site) == str(site / "wrapper" / "native" / "shim")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nonexistent/cc", "no C compiler was found (/nonexistent/cc: No such file or directory)"),
        ("cc -nostdlib", "cc -nostdlib could not compile it ("),
    ],
)
def test_without_a_compiler_all_but_the_shim_is_installed_and_the_reason_is_told(
    source: Path, compiler: str, reason: str
) -> None:
    site, said = install(source, CC=compiler)
    warnings = [line for line in said.splitlines() if "native/shim.c is left out" in line]
    assert len(warnings) == 1, said
    assert f"so workers cannot run in containers: {reason}" in warnings[0]
    assert (
        f"native/client.c is left out, so the per-action client is the slower one in Python: {reason}" in said
    )
    message = ask(site)
    assert reason in message
    assert "apt-get install gcc libc6-dev" in message
    assert "pip install --force-reinstall --no-deps" in message


def test_a_build_without_a_compiler_does_not_keep_an_older_shim(source: Path) -> None:
    install(source)
    shutil.rmtree(source.parent / "site")
    site, _ = install(source, CC="/nonexistent/cc")
    assert "no C compiler was found" in ask(site)
    assert not (site / "wrapper" / "native" / "shim").exists()
