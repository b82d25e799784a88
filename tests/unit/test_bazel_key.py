"""Bazel's own worker keys, on actions that a real Bazel wrote with the keys that it sent for them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from wrapper.bazel_key import MOST_PERMUTED, KeyParts, differences, parts_of, read_log
from wrapper.cli import main
from wrapper.errors import ConfigError
from wrapper.explain_key import explain_key

CAPTURES = Path(__file__).resolve().parent / "bazel_keys"
LOG = CAPTURES / "exec.json"
KEYS: dict[str, str] = json.loads((CAPTURES / "keys.json").read_text())
ACTIONS = {parts.label: parts for parts in read_log(LOG.read_text())}


def test_the_log_has_every_action_that_has_a_key() -> None:
    assert set(ACTIONS) == set(KEYS)


@pytest.mark.parametrize("label", [label for label, parts in ACTIONS.items() if parts.is_certain])
def test_the_key_is_bazels_byte_for_byte(label: str) -> None:
    assert ACTIONS[label].key() == KEYS[label]


def test_with_several_variables_it_is_bazels_in_the_order_that_the_rule_gave() -> None:
    many = ACTIONS["//:many"]
    assert not many.is_certain
    assert many.key() != KEYS["//:many"]
    assert many.order_for(KEYS["//:many"]) == ("Z", "B", "EMPTY")


def test_runfiles_are_part_of_it() -> None:
    paths = [path for path, _ in ACTIONS["//:runfiles"].files]
    assert any(".runfiles/" in path for path in paths)
    assert paths == sorted(paths)


def test_another_key_is_nobodys_and_too_many_variables_are_not_tried() -> None:
    many = ACTIONS["//:many"]
    assert many.order_for("0" * 64) is None
    variables = tuple((str(number), "") for number in range(MOST_PERMUTED + 1))
    assert replace(many, environment=variables).order_for("0" * 64) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"arguments": ("./tool.sh", "--other", "--persistent_worker")},
            "argument 1: '--flag' and '--other'",
        ),
        ({"arguments": ("./tool.sh", "--persistent_worker")}, "argument 2: '--persistent_worker' and none"),
        ({"environment": (("A", "2"),)}, "variable A: '1' and '2'"),
        ({"environment": ()}, "variable A: '1' and none"),
        ({"files": (("tool.sh", "00" * 32),)}, "tool file tool.sh: "),
    ],
)
def test_each_difference_is_named_and_changes_the_key(change: dict[str, object], words: str) -> None:
    plain = ACTIONS["//:plain"]
    other = replace(plain, **change)  # type: ignore[arg-type]
    assert any(words in line for line in differences(plain, other))
    assert plain.key() != other.key()


def test_neither_label_nor_mnemonic_is_in_it() -> None:
    plain = ACTIONS["//:plain"]
    other = replace(plain, label="//:x", mnemonic="Other")
    assert plain.key() == other.key()
    assert differences(plain, other) == []


def test_an_action_without_a_marked_tool_has_no_key() -> None:
    assert parts_of({"commandArgs": ["gcc"], "inputs": [{"path": "a", "isTool": False}]}) is None


@pytest.mark.parametrize("text", ["[]", "{", "1", '{"inputs": [{"isTool": true}]}'])
def test_what_is_no_log_is_said(text: str) -> None:
    with pytest.raises(ConfigError, match="no execution log"):
        read_log(text)


def said(labels: list[str], key: str | None = None) -> tuple[int, str]:
    out = io.StringIO()
    return explain_key(str(LOG), labels, key, out), out.getvalue()


def test_explain_key_lists_shows_and_compares() -> None:
    code, text = said([])
    assert code == 0
    assert f"//:plain (Warm): {KEYS['//:plain']}\n" in text
    code, text = said(["//:runfiles"])
    assert "  argument '--persistent_worker'\n" in text
    assert "  tool file bazel-out/" in text
    code, text = said(["//:runfiles", "//:many"])
    assert code == 1
    assert "argument 1: '--persistent_worker' and '--one'" in text
    assert said(["//:plain", "//:plain"]) == (0, "They have the same key.\n")


def test_explain_key_says_whether_a_key_is_an_actions() -> None:
    assert "in the order Z, B, EMPTY" in said(["//:many"], KEYS["//:many"])[1]
    assert "has not the key" in said(["//:many"], KEYS["//:plain"])[1]


def test_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain-key", str(LOG), "//:plain"]) == 0
    assert KEYS["//:plain"] in capsys.readouterr().out
    assert main(["explain-key", str(LOG), "//:missing"]) == 78
    assert "there are: //:many" in capsys.readouterr().err
    (tmp_path / "empty").touch()
    assert main(["explain-key", str(tmp_path / "empty")]) == 78
    assert "--execution_log_json_file" in capsys.readouterr().err
    assert main(["explain-key", str(tmp_path / "missing")]) == 78


def test_a_key_of_nothing_but_a_program() -> None:
    parts = KeyParts("", "", (("a", "00" * 32),), ("a", "--persistent_worker"), ())
    assert len(parts.key()) == 64
