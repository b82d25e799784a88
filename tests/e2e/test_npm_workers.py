"""npm's workers behind the wrapper: @bazel/rollup, and a small one of our own on @bazel/worker."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.e2e.driver import REPOSITORY, WireFormat, fetched, request, wrapped

from fetch_npm_workers import npm_workers  # isort: skip  # the driver has put tools/ on sys.path

REQUESTS = 20

both_upstream_protocols = pytest.mark.parametrize(
    "protocol", list(WireFormat), ids=lambda p: f"{p.value}-upstream"
)


@pytest.fixture(scope="module")
def modules() -> Path:
    """The folder node_modules with the workers in it."""
    return fetched(npm_workers) / "node_modules"


def node() -> str:
    program = shutil.which("node")
    assert program is not None, "node is missing: apt-get install nodejs"
    return program


@pytest.mark.e2e
@both_upstream_protocols
def test_rollup_bundles_twenty_times_each_its_own_modules(
    tmp_path: Path, modules: Path, protocol: WireFormat
) -> None:
    requests = []
    for number in range(REQUESTS):
        (tmp_path / f"part{number}.js").write_text(f"export const part = 'part of {number}';\n")
        (tmp_path / f"main{number}.js").write_text(
            f"import {{ part }} from './part{number}.js';\nconsole.log(part);\n"
        )
        bundle = f"bundle{number}.js"
        requests.append(request("--format", "cjs", "--output.file", bundle, f"main{number}.js"))
    # Runs of global.gc() are the library's own, after each request.
    tool = [node(), "--expose-gc", str(modules / "@bazel" / "rollup" / "index.js")]
    with wrapped(tool, cwd=tmp_path, protocol=protocol) as host:
        answers = host.exchange(requests)
    for number, answer in enumerate(answers):
        response = answer.response.pb
        assert (response.exit_code, response.request_id) == (0, 0), response.output
        text = (tmp_path / f"bundle{number}.js").read_text()
        assert f"'part of {number}'" in text
        assert "import" not in text


@pytest.mark.e2e
@both_upstream_protocols
def test_a_worker_built_on_the_library_answers_each_request_with_its_own_log(
    tmp_path: Path, modules: Path, protocol: WireFormat
) -> None:
    requests = []
    for number in range(REQUESTS):
        (tmp_path / f"quiet{number}.txt").write_text(f"text número {number}\n")
        requests.append(request(f"quiet{number}.txt", f"loud{number}.txt"))
    # Beside its library, as an installed worker would be: the wrapper owes a tool no NODE_PATH.
    script = tmp_path / "shout_worker.js"
    shutil.copy(REPOSITORY / "tests" / "npm" / "shout_worker.js", script)
    (tmp_path / "node_modules").symlink_to(modules)
    with wrapped([node(), "--expose-gc", str(script)], cwd=tmp_path, protocol=protocol) as host:
        # Multiplex upstream, though the tool takes one request at a time: the wrapper stands between.
        answers = host.exchange(requests, in_flight=3)
    for number, answer in enumerate(answers):
        response = answer.response.pb
        assert (response.exit_code, response.request_id) == (0, number + 1), response.output
        assert response.output.strip() == b"shouted quiet%d.txt" % number
        assert (tmp_path / f"loud{number}.txt").read_text() == f"TEXT NÚMERO {number}\n"
