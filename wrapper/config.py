"""Reads the pools document: a JSON5 file in, frozen models or one clear error out.

Owns reading and parsing; the models are in `config_models.py`, the wording of what is wrong with
their values in `config_problems.py`. Nothing on the path to a first answer imports this without a
configuration file being given: pydantic and json5 are slow to import.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import json5

from wrapper.config_fields import MEBIBYTE
from wrapper.config_models import Command, Config, Lifecycle, Limits, Memory, PoolConfig, Warmup
from wrapper.config_problems import path_of, problems_of, shown
from wrapper.errors import ConfigError

__all__ = [
    "MEBIBYTE",
    "Command",
    "Config",
    "Lifecycle",
    "Limits",
    "Memory",
    "PoolConfig",
    "Warmup",
    "load_config",
    "parse_config",
]

MAX_CONFIG_BYTES = 1024 * 1024
"""A larger file is no configuration; the JSON5 parser, written in Python, would take minutes for it."""


def load_config(path: str | Path) -> Config:
    """The configuration in this file.

    Raises ConfigError, which names the file and lists everything that is wrong in it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_CONFIG_BYTES} bytes, which no configuration is")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line}: is not UTF-8 (byte 0x{data[error.start]:02x})") from None
    return parse_config(text, str(path))


def parse_config(text: str, source: str) -> Config:
    """The configuration in this text; `source` is what a ConfigError calls it."""
    if not text.strip():
        raise ConfigError(f"{source}: is empty; a configuration is an object: {{pools: [...]}}")
    try:
        document = json5.loads(text, object_pairs_hook=_Object)
    except RecursionError:
        raise ConfigError(f"{source}: is nested too deeply to be a configuration") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {_syntax_error(str(error), text)}") from None
    if not isinstance(document, _Object):
        raise ConfigError(
            f"{source}: found {shown(document)}; a configuration is an object: {{pools: [...]}}"
        )
    config, problems = problems_of(document)
    problems += _doubled(document, ())
    if config is not None and not problems:
        return config
    if len(problems) == 1:
        raise ConfigError(f"{source}: {problems[0]}")
    raise ConfigError("\n  ".join([f"{source}: {len(problems)} problems", *problems]))


class _Object(dict[str, object]):
    """An object of the document that remembers which names it was given more than once."""

    def __init__(self, pairs: Iterable[tuple[str, object]]) -> None:
        super().__init__()
        self.doubled: list[str] = []
        for name, value in pairs:
            if name in self and name not in self.doubled:
                self.doubled.append(name)
            self[name] = value


def _doubled(value: object, location: tuple[str | int, ...]) -> Iterator[str]:
    if isinstance(value, _Object):
        for name in value.doubled:
            yield f"{path_of((*location, name))}: is given more than once; allowed: once"
        for name, inner in value.items():
            yield from _doubled(inner, (*location, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _doubled(inner, (*location, index))


def _syntax_error(message: str, text: str) -> str:
    """json5's message with the place in front, and the line with a mark under the place."""
    match = re.fullmatch(r"<string>:(\d+) (.*) at column (\d+)", message, re.DOTALL)
    if match is None:
        return message
    number, column = int(match[1]), int(match[3])
    what = match[2].replace("\n", "\\n")
    lines = text.split("\n")
    line = lines[number - 1].rstrip("\r") if number <= len(lines) else ""
    begin = max(0, column - 60)
    excerpt = line[begin : column + 40].replace("\t", " ")
    if what.startswith("Unexpected end"):
        what += ": a bracket, brace or quote is not closed"
    return (
        f"line {number}, column {column}: {what[0].lower()}{what[1:]}\n"
        f"    {excerpt}\n    {' ' * (column - 1 - begin)}^"
    )
