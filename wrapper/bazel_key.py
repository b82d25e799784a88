"""Bazel's own persistentWorkerKey, recomputed: why two actions did, or did not, share a worker.

With `--experimental_remote_mark_tool_inputs` Bazel sends as the key a hash of the worker's tool files,
arguments and environment; neither the protocol nor the mnemonic is in it. (RemoteExecutionService of Bazel
7.7.1, found again byte for byte on actions that it wrote: tests/unit/bazel_keys.)

Pure. An execution log tells all that is in a key but for the order of the environment's variables: the log
sorts them, and the key takes them as the rule gave them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wrapper.errors import ConfigError

PERSISTENT_WORKER = "--persistent_worker"
MOST_PERMUTED = 8
"""Variables whose orders are all tried: 40,320 of them take a fifth of a second."""

_FLAGFILE = re.compile(r"(?:@|--?flagfile=).+", re.DOTALL)


@dataclass(frozen=True, slots=True)
class KeyParts:
    """What a key is made of."""

    label: str
    mnemonic: str
    files: tuple[tuple[str, str], ...]
    """Path and SHA-256 of each tool file and runfile, by path."""
    arguments: tuple[str, ...]
    """The worker's: without flagfiles, with `--persistent_worker`."""
    environment: tuple[tuple[str, str], ...]

    @property
    def is_certain(self) -> bool:
        """Whether the order of the environment cannot matter."""
        return len(self.environment) < 2

    def key(self, environment: Sequence[tuple[str, str]] | None = None) -> str:
        """The key, with the variables in this order; None: as they are here."""
        files = hashlib.sha256()
        for path, digest in self.files:
            files.update(_bytes(path) + bytes.fromhex(digest))
        whole = hashlib.sha256(files.digest())
        for argument in self.arguments:
            whole.update(b"\x01" + _with_length(argument))
        variables = self.environment if environment is None else environment
        whole.update(b"\x00" + _varint(len(variables)))
        for name, value in variables:
            whole.update(_with_length(name) + _with_length(value))
        return whole.hexdigest()

    def order_for(self, key: str) -> tuple[str, ...] | None:
        """The order of variables with which this is the key; None: with none, or there are too many."""
        if len(self.environment) > MOST_PERMUTED:
            return None
        for variables in itertools.permutations(self.environment):
            if self.key(variables) == key:
                return tuple(name for name, _ in variables)
        return None


def read_log(text: str) -> list[KeyParts]:
    """The worker's actions of a log that `--execution_log_json_file` wrote. Raises ConfigError."""
    return [parts for spawn in _objects(text) if (parts := parts_of(spawn)) is not None]


def parts_of(spawn: Mapping[str, Any]) -> KeyParts | None:
    """What the key of one action of the log is made of; None: it has no marked tool, and so no key."""
    try:
        files = sorted(
            (one["path"], one["digest"]["hash"]) for one in spawn.get("inputs", []) if one.get("isTool")
        )
        if not files:
            return None
        arguments = [one for one in spawn["commandArgs"] if not _FLAGFILE.fullmatch(one)]
        environment = [(one["name"], one.get("value", "")) for one in spawn.get("environmentVariables", [])]
        label = spawn.get("targetLabel") or ", ".join(spawn.get("listedOutputs", [])[:1])
        mnemonic = spawn.get("mnemonic", "")
    except (KeyError, TypeError) as error:
        raise ConfigError(f"this is no execution log of Bazel: {error!r} is missing") from error
    return KeyParts(label, mnemonic, tuple(files), (*arguments, PERSISTENT_WORKER), tuple(environment))


def differences(first: KeyParts, second: KeyParts) -> list[str]:
    """Why these two have different keys, a line each; empty: they have the same, but for an order."""
    found = []
    if first.arguments != second.arguments:
        for number, (one, two) in enumerate(itertools.zip_longest(first.arguments, second.arguments)):
            if one != two:
                found.append(f"argument {number}: {_shown(one)} and {_shown(two)}")
    found += _of_maps("variable", dict(first.environment), dict(second.environment))
    found += _of_maps("tool file", dict(first.files), dict(second.files))
    return found


def _of_maps(what: str, first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    return [
        f"{what} {name}: {_shown(first.get(name))} and {_shown(second.get(name))}"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    ]


def _shown(text: str | None) -> str:
    return "none" if text is None else repr(text)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a log, which stand one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            found, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise ConfigError(f"this is no execution log of Bazel: {error}") from error
        if not isinstance(found, dict):
            raise ConfigError("this is no execution log of Bazel: something else than an object is in it")
        yield found


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _with_length(text: str) -> bytes:
    data = _bytes(text)
    return _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
