"""`explain-key LOG`: says what Bazel's worker keys are made of, and why two actions have different ones."""

from __future__ import annotations

from typing import TextIO

from wrapper.bazel_key import KeyParts, differences, read_log
from wrapper.errors import ConfigError


def explain_key(path: str, labels: list[str], key: str | None, out: TextIO) -> int:
    """Print all keys, one action's parts, or the differences of two. Exit code 1: they are different.

    Raises ConfigError if the log or the labels are not in order.
    """
    try:
        with open(path, encoding="utf-8") as file:
            actions = read_log(file.read())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not actions:
        raise ConfigError(
            f"{path}: no action in it has a tool that is marked as one: build with "
            "--execution_log_json_file, and look at actions with supports-workers"
        )
    chosen = [_of_label(actions, label) for label in labels]
    if len(chosen) == 2:
        return _compare(chosen[0], chosen[1], out)
    for parts in chosen or actions:
        _show(parts, key, out, whole=bool(chosen))
    return 0


def _of_label(actions: list[KeyParts], label: str) -> KeyParts:
    found = [parts for parts in actions if parts.label == label]
    if not found:
        known = ", ".join(sorted({parts.label for parts in actions})[:20])
        raise ConfigError(f"no action of {label!r} in the log has a key; there are: {known}")
    return found[0]


def _show(parts: KeyParts, key: str | None, out: TextIO, *, whole: bool) -> None:
    out.write(f"{parts.label} ({parts.mnemonic}): {_key_text(parts, key)}\n")
    if not whole:
        return
    out.writelines(f"  argument {argument!r}\n" for argument in parts.arguments)
    out.writelines(f"  variable {name}={value!r}\n" for name, value in parts.environment)
    out.writelines(f"  tool file {path} {digest}\n" for path, digest in parts.files)


def _key_text(parts: KeyParts, key: str | None) -> str:
    if key is not None:
        order = parts.order_for(key)
        if order is None:
            return f"has not the key {key}"
        return f"has the key {key}" + (
            f", with its variables in the order {', '.join(order)}" if order else ""
        )
    if parts.is_certain:
        return parts.key()
    order_text = ", ".join(name for name, _ in parts.environment)
    return f"{parts.key()} if the rule gives its variables in the order {order_text}"


def _compare(first: KeyParts, second: KeyParts, out: TextIO) -> int:
    found = differences(first, second)
    if not found:
        out.write("They have the same key")
        out.write(".\n" if first.is_certain else ", if their rules give the variables in the same order.\n")
        return 0
    out.write(f"{first.label} and {second.label} have different keys:\n")
    out.writelines(f"  {line}\n" for line in found)
    return 1
