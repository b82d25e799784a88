#!/usr/bin/env python3
"""What the per-action client costs: a whole process, beside `/bin/true`, measured by hyperfine in one run.

    .venv/bin/python benchmarks/client.py [--json FILE] [--runs N]

Prints for the client in C and the one in Python, for an action that a daemon answers at once and for one that
the client runs itself (`/bin/true`): the median wall time and its ratio to `/bin/true`'s; and the largest
resident memory of the client in C. The daemon is C (`answering_daemon.c`): an echo action on an idle worker.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from wrapper.client_protocol import RequestDecoder, end, taken
from wrapper.install_entrypoint import PROGRAM, install

HERE = Path(__file__).resolve().parent
PATIENCE_S = 30.0
TRUE = "/bin/true"


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    median_ms: float
    p95_ms: float
    ratio: float
    """Of the medians, to that of /bin/true in the same run."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--runs", metavar="N", type=int, default=500, help="of each command (default 500)")
    given = parser.parse_args(argv)
    missing = [tool for tool in ("cc", "hyperfine") if shutil.which(tool) is None]
    if missing:
        print(
            f"benchmark: needs {' and '.join(missing)} (Debian: apt-get install gcc hyperfine)",
            file=sys.stderr,
        )
        return 69
    with tempfile.TemporaryDirectory(prefix="client-") as name:
        folder = Path(name)
        rows = measure(folder, given.runs)
        memory_kb = resident_kb(folder)
    print(f"{'':32}{'median ms':>10}{'p95 ms':>9}{'ratio':>8}")
    for row in rows:
        print(f"{row.name:32}{row.median_ms:10.2f}{row.p95_ms:9.2f}{row.ratio:8.2f}")
    print(f"resident memory of the client in C while it waits: {memory_kb} KB at most")
    if given.json:
        figures = {"rows": [asdict(row) for row in rows], "resident_kb": memory_kb}
        Path(given.json).write_text(json.dumps(figures, indent=1) + "\n")
    return 0


def measure(folder: Path, runs: int) -> list[Row]:
    cwd = folder / "work1" / "operation" / "work"
    cwd.mkdir(parents=True)
    socket_path = folder / "pool.sock"
    commands = {TRUE: TRUE}
    for language in ("C", "Python"):
        for what, work_root in (("answered", folder / "work1"), ("run directly", folder / "nowhere")):
            program = folder / f"{language}-{work_root.name}"
            install(
                str(program),
                in_python=language == "Python",
                socket=str(socket_path),
                work_roots=[str(work_root)],
                out=io.StringIO(),
            )
            commands[f"client in {language}, {what}"] = f"{program / PROGRAM} {TRUE}"
    with daemon(folder, socket_path):
        export = folder / "figures.json"
        names = [word for name in commands for word in ("--command-name", name)]
        options = ["--shell=none", "--warmup=20", f"--runs={runs}", f"--export-json={export}", "--style=none"]
        subprocess.run(
            ["hyperfine", *options, *names, *commands.values()],
            cwd=cwd,
            env={"PATH": "/usr/bin:/bin", "NL_WORKER_KEY": "echo", "NL_ACTION_DIR": str(cwd.parent)},
            capture_output=True,  # it warns of every process that the machine was slow with
            check=True,
        )
    results = {result["command"]: result for result in json.loads(export.read_text())["results"]}
    reference = results[TRUE]["median"]
    return [
        Row(
            name,
            median_ms=results[name]["median"] * 1000,
            p95_ms=statistics.quantiles(results[name]["times"], n=20)[-1] * 1000,
            ratio=results[name]["median"] / reference,
        )
        for name in commands
    ]


@contextmanager
def daemon(folder: Path, socket_path: Path) -> Iterator[None]:
    program = folder / "answering_daemon"
    subprocess.run(["cc", "-O2", "-o", program, HERE / "answering_daemon.c"], check=True)
    with subprocess.Popen([program, socket_path]) as process:
        try:
            while not socket_path.exists():
                if process.poll() is not None:
                    raise SystemExit("benchmark: the daemon did not start")
            yield
        finally:
            process.kill()


def resident_kb(folder: Path) -> int:
    """VmHWM of a client that has sent its request and waits: that is nearly all that it does."""
    path = folder / "pool.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(PATIENCE_S)
        cwd = folder / "work1" / "operation" / "work"
        process = subprocess.Popen(
            [folder / "C-work1" / PROGRAM, TRUE], cwd=cwd, env={"PATH": "/bin", "NL_WORKER_KEY": "echo"}
        )
        with process:
            connection, _ = listener.accept()
            with connection:
                decoder = RequestDecoder()
                request = None
                while request is None:
                    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
                    for fd in fds:
                        os.close(fd)
                    request = decoder.feed(data)
                status = Path(f"/proc/{process.pid}/status").read_text()
                connection.sendall(taken() + end(0))
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0])


if __name__ == "__main__":
    sys.exit(main())
