"""The documents say what is true: their links, commands, options and tables are compared with the program."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from wrapper import cli
from wrapper.pool.worker_states import TRANSITIONS, StopReason

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docker/*.md", "examples/*/*.md")
    for path in ROOT.glob(pattern)
    if not path.name.startswith("TODO")
)
FIRST_COMMANDS = ["./examples/java-persistent-worker/demo", "./tests/run"]
RUNNABLE = "sh run"

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def fenced_blocks(document: Path) -> Iterator[tuple[str, str]]:
    """The words after the opening fence, and the content, of each fenced block."""
    for match in re.finditer(r"^```([^\n`]*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL):
        yield match[1].strip(), match[2]


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def table_after(document: Path, header: str) -> list[list[str]]:
    """The cells of the table whose first header cell is `header`, row by row."""
    lines = document.read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line)
        rows.append([cell.strip().replace("\\|", "|") for cell in cells[1:-1]])
    return rows


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Path and text of every file of ours: what .gitignore leaves."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if (not name.startswith(".") or name == ".ci")
            and name not in ("__pycache__", "node_modules", "build")
            and not name.endswith(".egg-info")
        ]
        for name in names:
            path = Path(folder, name)
            try:
                yield str(path.relative_to(ROOT)), path.read_text()
            except UnicodeDecodeError:
                continue


# ---- commands --------------------------------------------------------------------------------------


def test_the_readme_begins_with_the_two_commands_that_do_everything() -> None:
    """They are run by tests/e2e (the demo) and by whoever runs this test (tests/run)."""
    language, content = next(fenced_blocks(ROOT / "README.md"))
    assert (language, content.split()) == ("sh", FIRST_COMMANDS)
    for command in FIRST_COMMANDS:
        assert (ROOT / command).stat().st_mode & stat.S_IXUSR
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100  # two screens


@each_document
def test_a_shell_block_is_either_run_here_or_one_of_the_first_commands(document: Path) -> None:
    for language, content in fenced_blocks(document):
        assert language, f"{document.name}: a fenced block without a language: {content[:60]!r}"
        if language in ("sh", "bash", "shell", "console"):
            assert content.split() == FIRST_COMMANDS, f"nothing runs this block: {content[:60]!r}"
        elif language == RUNNABLE:
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", content],
                cwd=ROOT,
                env={**os.environ, "PATH": path},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 0, done.stdout + done.stderr


@each_document
def test_python_blocks_are_python(document: Path) -> None:
    for language, content in fenced_blocks(document):
        if language in ("python", "bzl"):
            ast.parse(content)


def test_the_help_of_tests_run_names_each_stage_once_and_a_wrong_one_is_refused() -> None:
    script = ROOT / "tests" / "run"
    shown = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    described = re.findall(r"^  ([a-z]+)  +[a-z0-9]", shown, re.MULTILINE)
    assert sorted(described) == sorted(re.findall(r"^stage_([a-z]+)\(\)", script.read_text(), re.MULTILINE))
    wrong = subprocess.run([script, "nonsense"], capture_output=True, text=True)
    assert (wrong.returncode, "nonsense" in wrong.stderr) == (64, True)


# ---- links and names -------------------------------------------------------------------------------


@each_document
def test_links_between_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target


@each_document
def test_files_that_a_document_names_exist(document: Path) -> None:
    """In architecture.md names without a folder of the repository's top level are below wrapper/."""
    bases = [ROOT, document.parent, ROOT / "wrapper"]
    for name in re.findall(
        r"`([\w./*-]+\.(?:py|sh|js|json5|md|c|txt|toml|proto)|[\w./-]+/)`", prose(document)
    ):
        if name.startswith("pools.") or name == "__nlww_execroots/":
            continue  # names of the reader's own files, and of what a run makes
        assert any(list(base.glob(name)) for base in bases), f"{document.name} names {name}"


def test_no_tracked_file_holds_a_path_of_one_machine_or_a_registry_host() -> None:
    registries = ("py.pi", "python.hosted", "npm.js", "ma.ven", "go.lang", "deb.ian", "cra.tes")
    hosts = "|".join(name.replace(".", "") for name in registries)
    folders = "work|farm|root|home"
    forbidden = re.compile(rf"(?<![\w.}}-])/(?:{folders})/|https?://[a-z0-9.-]*(?:{hosts})[a-z0-9.-]*/")
    found = [
        f"{name}: {match[0]}"
        for name, text in tracked_texts()
        if name != "LICENSE"
        for match in forbidden.finditer(text)
    ]
    assert not found


def test_no_lock_file_holds_an_address() -> None:
    for path in [*ROOT.glob("requirements/*.txt"), *ROOT.glob("tests/npm/*.json")]:
        assert "://" not in path.read_text(), path


# ---- tables ----------------------------------------------------------------------------------------


def test_the_table_of_states_in_the_architecture_is_the_one_in_the_code() -> None:
    documented = {}
    for state, _meaning, steps in table_after(ROOT / "docs" / "architecture.md", "state"):
        pairs = [] if steps == "none" else [pair.split(" → ") for pair in steps.split(", ")]
        documented[state] = dict(pairs)
    assert documented == {
        state.name: {step.name: after.name for step, after in steps.items()}
        for state, steps in TRANSITIONS.items()
    }


def test_the_table_of_reasons_in_the_architecture_has_each_reason_once() -> None:
    documented = [row[0] for row in table_after(ROOT / "docs" / "architecture.md", "reason")]
    assert sorted(documented) == sorted(reason.value for reason in StopReason)


def test_the_table_of_options_has_each_option_with_its_values_and_nothing_else() -> None:
    cells = [row[0] for row in table_after(ROOT / "docs" / "worker-mode.md", "option")]
    documented = dict(pair for cell in cells for pair in re.findall(r"`(-[\w-]+)(?: ([^`]+))?`", cell))
    expected: dict[str, str] = {}
    for action in cli._parser()._actions:
        value = ""
        if action.choices is not None:
            value = "|".join(action.choices)
        elif action.metavar is not None:
            value = f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar)
        expected |= dict.fromkeys(action.option_strings, value)
    assert documented == expected


def test_the_table_of_record_options_has_each_option_and_nothing_else() -> None:
    cells = [row[0] for row in table_after(ROOT / "docs" / "priming.md", "option")]
    documented = dict(pair for cell in cells for pair in re.findall(r"`(-[\w-]+) ([^`]+)`", cell))
    own = {option for action in cli._parser()._actions for option in action.option_strings}
    assert documented == {
        option: action.metavar
        for action in cli._parser(recording=True)._actions
        for option in action.option_strings
        if option not in own
    }


def test_the_exit_codes_in_the_worker_mode_page_are_those_of_the_help() -> None:
    page = (ROOT / "docs" / "worker-mode.md").read_text()
    paragraph = page[page.index("Exit codes:") :].split("\n\n")[0]
    shown = cli._EPILOG[cli._EPILOG.index("exit codes:") :]
    assert re.findall(r"\b(\d+)\b", paragraph) == re.findall(r"\b(\d+)\b", shown)


# ---- versions --------------------------------------------------------------------------------------


def test_one_version_stands_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bazel = re.search(
        r'module\(\s*name = "(\w+)",\s*version = "([^"]+)"', (ROOT / "MODULE.bazel").read_text()
    )
    assert bazel is not None
    assert bazel.groups() == ("nativelink_worker_wrapper", cli.VERSION)
    assert project["version"] == cli.VERSION


def test_what_is_pinned_fits_the_ranges_and_both_pin_files_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for name in ("run", "dev"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        pins[name] = dict(re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE))
        assert all(f"{package}==" in text for package in pins[name])
        assert text.count("--hash=sha256:") >= len(pins[name])
    assert pins["run"].items() <= pins["dev"].items()
    extras = project["optional-dependencies"]
    wanted = {"run": project["dependencies"], "dev": [*extras["dev"], *extras["cri"]]}
    for name, ranges in wanted.items():
        for requirement in map(Requirement, ranges):
            pinned = pins[name].get(requirement.name)
            assert pinned is not None, requirement
            assert requirement.specifier.contains(pinned), requirement


def test_every_dependency_has_a_reason_in_the_architecture() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page[page.index("## Dependencies") :]
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["cri"], *extras["dev"]]):
        assert f"`{requirement.name}`" in section or requirement.name.startswith("types-"), requirement.name


@pytest.mark.parametrize("name", ["MODULE.bazel", "BUILD.bazel"])
def test_bazel_files_can_be_parsed_and_name_files_that_exist(name: str) -> None:
    """Starlark is close enough to Python for that; whether Bazel builds them is not tested."""
    texts = [
        node.value
        for node in ast.walk(ast.parse((ROOT / name).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for text in texts:
        if re.fullmatch(r"(?:proto|examples|wrapper)/[\w.*/-]+", text):
            assert list(ROOT.glob(text)), text
