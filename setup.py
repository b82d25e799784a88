"""Compiles native/*.c into wrapper/native/ of what is built: a wheel, or this tree (an editable install).

All else about the package is in pyproject.toml. Without a C compiler, or a C library to link statically, the
package is built all the same: only workers in containers need the shim, and the per-action client is there in
Python too. The reason is then left in the program's place, and `wrapper.runtime.native` tells it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
WITHOUT = {
    "client": "the per-action client is the slower one in Python",
    "shim": "workers cannot run in containers",
}
FLAGS = ["-static", "-O2", "-std=c11", "-Wall", "-Wextra", "-Werror"]


def why_not_compiled(source: Path, program: Path) -> str | None:
    """Compile `source` to `program`; else the reason why that is not possible, in one line."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    fresh = program.with_name(f"{program.name}.{os.getpid()}")
    try:
        done = subprocess.run(
            [*compiler, *FLAGS, "-o", str(fresh), str(source)],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode == 0:
            fresh.replace(program)  # a program that runs cannot be written to, only replaced
            return None
    except OSError as error:
        return f"no C compiler was found ({shlex.join(compiler)}: {error.strerror})"
    finally:
        fresh.unlink(missing_ok=True)
    said = [line for line in done.stderr.splitlines() if "error" in line or "cannot find" in line]
    return f"{shlex.join(compiler)} could not compile it ({(said or ['no message'])[0].strip()})"


def compile_all(into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    for source in sorted((ROOT / "native").glob("*.c")):
        program = into / source.stem
        reason_file = into / f"{source.stem}.missing"
        reason = why_not_compiled(source, program)
        if reason is None:
            reason_file.unlink(missing_ok=True)
        else:
            program.unlink(missing_ok=True)  # one of an older source would be worse than none
            reason_file.write_text(reason)
            print(
                f"warning: native/{source.name} is left out, so {WITHOUT[source.stem]}: {reason}",
                file=sys.stderr,
            )


class BuildPy(build_py):
    def run(self) -> None:
        super().run()
        compile_all((ROOT if self.editable_mode else Path(self.build_lib).absolute()) / "wrapper" / "native")


class BdistWheel(bdist_wheel):
    """For any Python, but for this machine's processor only."""

    def get_tag(self) -> tuple[str, str, str]:
        self.root_is_pure = False  # as far as the name of the platform goes
        try:
            return "py3", "none", super().get_tag()[2]
        finally:
            self.root_is_pure = True


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
