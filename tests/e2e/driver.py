"""What the end-to-end tests share: the wrapper's command line, a worker host, and the real tools.

The host is the example's `worker_host.py`; the fetching is `tools/`'. A tool that cannot be had fails the
test, with the reason: a skipped proof is none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
for _folder in (REPOSITORY / "examples" / "java-persistent-worker", REPOSITORY / "tools"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from fetching import FetchError  # noqa: E402
from worker_host import Answer, HostError, WorkerHost  # noqa: E402

from wrapper.worker_protocol.messages import WorkRequest  # noqa: E402
from wrapper.worker_protocol.wire_format import WireFormat  # noqa: E402

__all__ = [
    "QUICK_JVM",
    "Answer",
    "HostError",
    "WireFormat",
    "WorkRequest",
    "WorkerHost",
    "fetched",
    "java_builder_command",
    "java_builder_request",
    "request",
    "wrapped",
]

QUICK_JVM = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
_COMPILER_PARTS = ("api", "main", "model", "processing", "resources", "tree", "util")
_COMPILER_INSIDES = ("code", "comp", "file", "parser")


def fetched(fetch: Callable[[], Path]) -> Path:
    """What `fetch` returns; the test fails with its message if that cannot be had."""
    try:
        return fetch()
    except FetchError as error:
        pytest.fail(str(error), pytrace=False)


@contextmanager
def wrapped(
    tool: list[str], *options: str, cwd: Path, protocol: WireFormat = WireFormat.PROTO
) -> Iterator[WorkerHost]:
    """The wrapper in worker mode around `tool`; it must end well, and quickly, when its input ends."""
    argv = [sys.executable, "-m", "wrapper", *options, "--", *tool, "--persistent_worker"]
    with WorkerHost(argv, cwd=cwd, protocol=protocol) as host:
        yield host
        exit_code = host.close()
    assert exit_code == 0


def request(*arguments: str | Path) -> WorkRequest:
    """A request with these arguments; the host gives it its id."""
    return WorkRequest.of(arguments=[str(argument).encode() for argument in arguments])


def java_builder_command(java: str, jar: str | Path) -> list[str]:
    """What Bazel starts JavaBuilder with, with a quick JVM; without --persistent_worker."""
    exports = [f"--add-exports=jdk.compiler/com.sun.tools.javac.{p}=ALL-UNNAMED" for p in _COMPILER_PARTS]
    opens = [f"--add-opens=jdk.compiler/com.sun.tools.javac.{p}=ALL-UNNAMED" for p in _COMPILER_INSIDES]
    opens += ["--add-opens=java.base/java.nio=ALL-UNNAMED", "--add-opens=java.base/java.lang=ALL-UNNAMED"]
    jvm = [*QUICK_JVM, "-Dsun.io.useCanonCaches=false", "-Xlog:disable"]
    return [java, *exports, *opens, *jvm, "-jar", str(jar)]


def java_builder_request(source: str, output: str, label: str) -> WorkRequest:
    """One source to one jar, as Bazel words it."""
    return request(
        *("--output", output, "--output_manifest_proto", f"{output}_manifest_proto"),
        *("--compress_jar", "--sources", source),
        *("--javacopts", "-source", "11", "-target", "11", "-g", "-XDcompilePolicy=simple", "--"),
        *("--target_label", label, "--strict_java_deps", "ERROR"),
        *("--reduce_classpath_mode", "NONE"),
    )
