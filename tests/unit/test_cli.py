"""The command line: every option reaches its place, and wrong usage is told with exit code 64."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wrapper import cli
from wrapper.action_runner import ToolAbilities
from wrapper.runtime.base import Language
from wrapper.worker_mode import WorkerModeOptions
from wrapper.worker_protocol.wire_format import WireFormat

POOLS = """{pools: [
    {name: "java", language: "jvm", keys: ["java-*"], worker_command: ["sh", "javac"], min_warm_workers: 2,
     max_workers: 4, worker_protocol: "json", check_health: true, env: {FLAVOUR: "plum"},
     limits: {idle_timeout_s: 77, max_instances_per_key: 3}},
    {name: "any", language: "custom(any)", keys: ["*"], worker_command: []},
]}"""


def options(*arguments: str, tool: tuple[str, ...] = ("/bin/sh", "--persistent_worker")) -> WorkerModeOptions:
    """What these options, before `--`, lead to."""
    given = cli._parser().parse_args([*arguments])
    pool, total, _ = cli._configured(given)
    return cli._options(given, list(tool), pool, total)


@pytest.fixture
def pools(tmp_path: Path) -> str:
    path = tmp_path / "pools.json5"
    path.write_text(POOLS)
    return str(path)


# ---- options ---------------------------------------------------------------------------------------


def test_without_options_the_defaults_hold() -> None:
    chosen = options()
    limits = chosen.settings.limits
    assert (limits.max_instances_per_key, limits.max_workers, limits.min_warm_workers) == (10, 20, 0)
    assert (limits.idle_timeout_s, limits.max_requests_per_worker_at_once) == (300.0, 1)
    assert (chosen.upstream_format, chosen.tool_format) == (None, WireFormat.PROTO)
    assert chosen.tool == ToolAbilities()
    assert not chosen.check_health
    assert chosen.persistent_worker_key == ""
    assert chosen.cwd == os.getcwd()


def test_limits_can_be_set() -> None:
    limits = options("--max-instances", "33", "--idle-timeout", "1.5").settings.limits
    assert (limits.max_instances_per_key, limits.max_workers, limits.idle_timeout_s) == (33, 33, 1.5)
    assert options("--max-instances=2").settings.limits.max_instances_per_key == 2


def test_a_key_becomes_part_of_the_identity() -> None:
    assert options("--persistent-worker-key", "java-17").key().persistent_worker_key == "java-17"
    assert options("--persistent-worker-key", "a").key() != options("--persistent-worker-key", "b").key()


@pytest.mark.parametrize(
    ("arguments", "upstream", "tool"),
    [
        (["--worker-protocol", "auto"], None, WireFormat.PROTO),
        (["--worker-protocol", "proto"], WireFormat.PROTO, WireFormat.PROTO),
        (["--worker-protocol=json"], WireFormat.JSON, WireFormat.PROTO),
        (["--tool-protocol", "json"], None, WireFormat.JSON),
        (["--worker-protocol", "json", "--tool-protocol", "proto"], WireFormat.JSON, WireFormat.PROTO),
    ],
)
def test_each_side_has_its_own_format(
    arguments: list[str], upstream: WireFormat | None, tool: WireFormat
) -> None:
    chosen = options(*arguments)
    assert (chosen.upstream_format, chosen.tool_format) == (upstream, tool)
    assert chosen.key().protocol == tool.value


@pytest.mark.parametrize(
    ("arguments", "at_once"), [(["--tool-multiplex"], 8), (["--tool-multiplex", "3"], 3)]
)
def test_a_multiplex_tool_takes_eight_requests_or_as_many_as_are_said(
    arguments: list[str], at_once: int
) -> None:
    chosen = options(*arguments)
    assert chosen.settings.limits.max_requests_per_worker_at_once == at_once
    assert chosen.tool.multiplex
    assert chosen.key().multiplex


def test_what_the_tool_understands_can_be_said() -> None:
    assert options("--tool-sandbox").tool.sandbox
    assert options("--tool-cancel").tool.cancel


@pytest.mark.parametrize(
    ("arguments", "program", "language"),
    [
        ([], "java", Language.JVM),
        ([], "node", Language.NODEJS),
        ([], "tool", Language.CUSTOM),
        (["--language", "jvm"], "tool", Language.JVM),
        (["--language", "nodejs"], "java", Language.NODEJS),
        (["--language=custom"], "java", Language.CUSTOM),
    ],
)
def test_the_language_is_known_by_the_programs_name_unless_it_is_said(
    arguments: list[str], program: str, language: Language
) -> None:
    chosen = options(*arguments, tool=(f"/bin/{program}", "--persistent_worker"))
    assert chosen.settings.language is language


def test_the_program_is_looked_up_and_its_arguments_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere:/bin")
    assert options(tool=("sh", "-x", "--persistent_worker")).argv == ("/bin/sh", "-x", "--persistent_worker")


# ---- a configuration -------------------------------------------------------------------------------


def test_the_pool_that_serves_the_key_gives_the_defaults(pools: str) -> None:
    chosen = options("--config", pools, "--persistent-worker-key", "java-17")
    assert chosen.settings.name == "java"
    assert chosen.settings.language is Language.JVM
    assert chosen.settings.limits.idle_timeout_s == 77
    assert chosen.tool_format is WireFormat.JSON
    assert chosen.check_health
    assert chosen.env["FLAVOUR"] == "plum"
    assert chosen.env["PATH"] == os.environ["PATH"]
    assert chosen.settings.limits.min_warm_workers == 0  # what it keeps warm is another tool


def test_options_win_over_the_configuration(pools: str) -> None:
    asked = ["--config", pools, "--persistent-worker-key=java-17", "--idle-timeout=5", "--max-instances=1"]
    chosen = options(*asked, "--tool-protocol=proto", "--language=custom")
    assert (chosen.settings.limits.idle_timeout_s, chosen.settings.limits.max_instances_per_key) == (5, 1)
    assert (chosen.tool_format, chosen.settings.language) == (WireFormat.PROTO, Language.CUSTOM)


def test_a_key_that_no_pool_serves_is_an_error_that_lists_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pools.json5"
    path.write_text('{pools: [{name: "java", language: "jvm", keys: ["java-*"]}]}')
    assert cli.main(["--config", str(path), "--persistent-worker-key=rust", "--", "x"]) == 78
    shown = capsys.readouterr().err
    assert "no pool serves persistentWorkerKey 'rust'" in shown
    assert "java: java-*" in shown


def test_several_pools_without_a_key_are_an_error(pools: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", pools, "--", "x"]) == 78
    assert "--persistent-worker-key" in capsys.readouterr().err


def test_check_config_prints_or_says_what_is_wrong(pools: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-config", pools]) == 0
    assert "nothing wrong; 2 pools" in capsys.readouterr().out
    assert cli.main(["check-config", "/nonexistent/pools.json5"]) == 78


# ---- usage -----------------------------------------------------------------------------------------


def test_the_help_mentions_every_option_and_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for action in cli._parser()._actions:
        for option in action.option_strings:
            assert option in shown
        assert action.help not in (None, "", argparse.SUPPRESS), action.option_strings
    for word in ("-- TOOL", "check-config FILE", "examples:", "exit codes:"):
        assert word in shown


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nativelink_worker_wrapper {cli.VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no tool given: put it after --"),
        (["--"], "no tool given"),
        (["--no-such-option", "--", "x"], "unrecognized arguments: --no-such-option"),
        (["java", "-jar", "x.jar"], "unrecognized arguments"),
        (["--max-instances", "0", "--", "x"], "--max-instances: must be at least 1"),
        (["--max-instances", "many", "--", "x"], "--max-instances: invalid"),
        (["--idle-timeout", "-1", "--", "x"], "--idle-timeout"),
        (["--idle-timeout", "nan", "--", "x"], "--idle-timeout: must be a positive number of seconds"),
        (["--worker-protocol", "xml", "--", "x"], "invalid choice: 'xml'"),
        (["--tool-multiplex", "0", "--", "x"], "--tool-multiplex: must be at least 1"),
        (["--language", "cobol", "--", "x"], "invalid choice: 'cobol'"),
        (["--config"], "--config: expected one argument"),
        (["check-config"], "FILE"),
        (["check-config", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_wrong_usage_is_said_on_stderr_with_exit_code_64(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == cli.USAGE_EXIT_CODE
    shown = capsys.readouterr()
    assert words in shown.err
    assert "usage:" in shown.err
    assert shown.out == ""  # stdout belongs to the protocol


def test_options_after_the_separator_belong_to_the_tool() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wrapper", "--", "/bin/echo", "--version", "--", "-v"], capture_output=True
    )
    assert (done.returncode, done.stdout) == (0, b"--version -- -v\n")


def test_a_missing_tool_is_said_with_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--", "no-such-tool"]) == 69
    assert "no program 'no-such-tool'" in capsys.readouterr().err


def test_the_total_limit_of_a_configuration_holds_in_worker_mode(tmp_path: Path) -> None:
    config = tmp_path / "pools.json5"
    config.write_text(
        "{max_total_workers: 3, pools: [{name: 'p', language: 'jvm', keys: ['*'], worker_command: []}]}"
    )
    given = cli._parser().parse_args(["--config", str(config), "--persistent-worker-key", "k"])
    pool, total, _ = cli._configured(given)
    assert cli._options(given, ["/bin/true", "--persistent_worker"], pool, total).total.max_workers == 3


# ---- record ----------------------------------------------------------------------------------------


def test_record_takes_its_own_options_and_those_of_worker_mode() -> None:
    parser = cli._parser(recording=True)
    given = parser.parse_args(["--output", "a.rec", "--max-instances", "3"])
    assert (given.output, given.max_requests, given.max_bytes, given.trust_domain) == (
        "a.rec",
        50,
        1 << 28,
        "",
    )
    assert given.max_instances == 3
    given = parser.parse_args(["--output=a", "--max-requests=7", "--max-bytes=9", "--trust-domain=ours"])
    assert (given.max_requests, given.max_bytes, given.trust_domain) == (7, 9, "ours")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["record", "--", "/bin/sh", "--persistent_worker"], "--output"),
        (["record", "--output", "a.rec", "--", "/bin/sh"], "gets no requests that could be recorded"),
        (["record", "--output", "a.rec"], "no tool given"),
        (["record", "--output", "a", "--max-requests", "0", "--", "/bin/sh"], "must be at least 1"),
    ],
)
def test_a_wrong_use_of_record_is_told_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wrapper", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, said in done.stderr) == (64, True), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_record_that_cannot_be_written_is_an_error_before_the_tool_starts(tmp_path: Path) -> None:
    tool = ["--", "/bin/sh", "-c", "touch started", "--persistent_worker"]
    argv = [sys.executable, "-m", "wrapper", "record", "--output", "no/a.rec", *tool]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, "no/a.rec: cannot be written" in done.stderr) == (78, True), done.stderr
    assert not list(tmp_path.iterdir())
