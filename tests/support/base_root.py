"""The root of an image's base, made of the host's own programs and the libraries that they are linked with.

Stands for the base image of a Dockerfile where there is no registry. Knows nothing of what is put on top.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

_FOLDERS = ("dev", "etc", "opt", "proc", "run", "sys", "usr/bin", "usr/lib", "usr/lib64")
_LINKS = {"bin": "usr/bin", "lib": "usr/lib", "lib64": "usr/lib64"}
_FILES = {"etc/passwd": "root:x:0:0::/:/bin/false\n", "etc/group": "root:x:0:\n"}
_LIBRARY = re.compile(r"(?:=> |^\s+)((?:/usr)?/lib(?:64)?(?:/[^/ ]+)?/[^/ ]+) \(0x", re.MULTILINE)


def base_root(root: Path, programs: Iterable[str], *, linked_with: Iterable[str] = ()) -> None:
    """Fill an empty folder. `programs`: names on the host's PATH; `linked_with`: whose libraries to add."""
    for folder in _FOLDERS:
        (root / folder).mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    for link, target in _LINKS.items():
        (root / link).symlink_to(target)
    for path, text in _FILES.items():
        (root / path).write_text(text)
    binaries = list(linked_with)
    for name in programs:
        program = shutil.which(name)
        assert program is not None, f"{name} is not on PATH"
        binaries.append(program)
        shutil.copy(program, root / "usr" / "bin" / name)
    for library in _libraries(binaries):
        copy = root / library.relative_to("/")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, copy)


def _libraries(binaries: Iterable[str]) -> set[Path]:
    """Of the system's own folders, with the dynamic linker, each under the name that it is looked for by."""
    found: set[Path] = set()
    for binary in binaries:
        said = subprocess.run(["ldd", binary], capture_output=True, text=True, check=True).stdout
        found |= {Path(path) for path in _LIBRARY.findall(said)}
    return found
