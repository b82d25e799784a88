"""How a command line names its tool: the program, or what an interpreter is told to run.

Owns the syntax of the interpreters (which of their options take a value). Pure. Knows nothing of workers.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CommandHead:
    """How a command line begins.

    `names`: what the tool is called: the program's path and base name; with an interpreter also the path and
    base name of the archive or script, or the class or module. `length`: how many words belong to it: the
    program; with an interpreter all up to what it is told to run.
    """

    names: tuple[str, ...]
    length: int
    is_hidden: bool = False
    """An interpreter that is not told what to run, or in a way that cannot be seen (an argument file)."""


@dataclass(frozen=True, slots=True)
class _Interpreter:
    takes_value: frozenset[str]
    """Options whose value is the next word."""
    names_tool: frozenset[str] = frozenset()
    """Options whose value is what is to be run."""
    runs_text: frozenset[str] = frozenset()
    """Options that give the program's text in the command line: there is no tool then."""
    has_argument_files: bool = False
    """`@file` among its own options holds more of them."""
    bundles: bool = False
    """Options of one letter can be written together, as a shell's."""

    def is_text(self, word: str) -> bool:
        return word in self.runs_text or (self.bundles and _SHELL_TEXT.fullmatch(word) is not None)

    def has_value(self, word: str) -> bool:
        return word in self.takes_value or (self.bundles and _SHELL_VALUE.fullmatch(word) is not None)

    def is_own(self, word: str) -> bool:
        return (word.startswith("-") and word != "-") or (self.has_argument_files and word.startswith("@"))


_JAVA = _Interpreter(
    takes_value=frozenset(
        """-cp -classpath --class-path -p --module-path --upgrade-module-path --add-modules --limit-modules
        --enable-native-access --add-reads --add-exports --add-opens --patch-module --source""".split()  # noqa: SIM905
    ),
    names_tool=frozenset(("-jar", "-m", "--module")),
    has_argument_files=True,
)
_NODE = _Interpreter(
    takes_value=frozenset(
        "-r --require --import --loader --experimental-loader -C --conditions --env-file".split()  # noqa: SIM905
    ),
    runs_text=frozenset(("-e", "--eval", "-p", "--print", "-pe")),
)
_PYTHON = _Interpreter(
    takes_value=frozenset(("-W", "-X")), names_tool=frozenset(("-m",)), runs_text=frozenset(("-c",))
)
_SHELL = _Interpreter(takes_value=frozenset(("--rcfile", "--init-file")), bundles=True)
_SHELL_TEXT = re.compile("-[A-Za-z]*[cs][A-Za-z]*")  # bash -c TEXT, bash -euc TEXT; -s: from its input
_SHELL_VALUE = re.compile("[-+][A-Za-z]*[oO]")  # bash -euo pipefail
_INTERPRETERS = {
    "java": _JAVA,
    "node": _NODE,
    "nodejs": _NODE,
    "bash": _SHELL,
    "sh": _SHELL,
    "dash": _SHELL,
}
_LONGEST_PYTHON = 20
_PYTHON_NAME = re.compile(r"python(?:\d+(?:\.\d+)*)?", re.ASCII)


def head_of(argv: Sequence[str]) -> CommandHead:
    """How this command line, which has a program at least, begins."""
    program = argv[0]
    base = posixpath.basename(program)
    names = _with_base_name(program)
    interpreter = _INTERPRETERS.get(base)
    if interpreter is None:
        if len(base) > _LONGEST_PYTHON or not _PYTHON_NAME.fullmatch(base):
            return CommandHead(names, 1)
        interpreter = _PYTHON
    at = 1
    while at < len(argv):
        word = argv[at]
        if interpreter.is_text(word):
            return CommandHead(names, 1)
        if word in interpreter.names_tool:
            if at + 1 == len(argv):
                break
            return CommandHead((*names, *_with_base_name(argv[at + 1])), at + 2)
        if interpreter.has_value(word):
            at += 2
        elif interpreter.is_own(word):
            at += 1
        else:
            return CommandHead((*names, *_with_base_name(word)), at + 1)
    return CommandHead(names, 1, is_hidden=True)


def _with_base_name(path: str) -> tuple[str, ...]:
    base = posixpath.basename(path)
    return (path,) if base in ("", path) else (path, base)
