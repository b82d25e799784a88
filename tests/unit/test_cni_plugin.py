"""deploy/cni: the script speaks CNI, and the list that comes with it names it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "cni"
PLUGIN = FOLDER / "nlww-loopback"


def ask(command: str, config: str) -> tuple[int, str]:
    """Run the plugin as an engine does, with no PATH at all: it needs no other program."""
    env = {"CNI_COMMAND": command, "CNI_CONTAINERID": "x", "CNI_IFNAME": "eth0"}
    done = subprocess.run([PLUGIN], input=config, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0"])
@pytest.mark.parametrize("indent", [None, 2])
def test_add_answers_the_loopback_address_in_the_version_of_the_question(
    version: str, indent: int | None
) -> None:
    config = json.dumps({"name": "n", "cniVersion": version, "type": "nlww-loopback"}, indent=indent)
    code, answer = ask("ADD", config)
    address = {"address": "127.0.0.1/8"} if version == "1.0.0" else {"version": "4", "address": "127.0.0.1/8"}
    assert (code, json.loads(answer)) == (0, {"cniVersion": version, "ips": [address]})


@pytest.mark.parametrize("command", ["DEL", "CHECK"])
def test_there_is_nothing_to_delete_or_check(command: str) -> None:
    assert ask(command, '{"cniVersion": "0.4.0"}') == (0, "")


def test_the_versions_that_it_speaks_include_that_of_the_list() -> None:
    conflist = json.loads((FOLDER / "10-nlww-loopback.conflist").read_text())
    assert [plugin["type"] for plugin in conflist["plugins"]] == [PLUGIN.name]
    code, answer = ask("VERSION", json.dumps({"cniVersion": conflist["cniVersion"]}))
    assert (code, conflist["cniVersion"] in json.loads(answer)["supportedVersions"]) == (0, True)


def test_an_unknown_command_is_an_error_in_cnis_own_form() -> None:
    code, answer = ask("DANCE", "{}")
    error = json.loads(answer)
    assert (code, error["code"], "DANCE" in error["msg"]) == (1, 4, True)
