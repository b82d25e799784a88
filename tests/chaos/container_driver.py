"""Runs actions on warm containers and writes down what became of each; its test kills it now and then.

    container_driver.py CONFIG WORK_ROOT FIRST COUNT AT_ONCE

One line on stdout for each thing: `worker PID`, `begin N`, `end N ok` or `end N ERROR ...`, `done`. A right
answer names its own number in the output and in the file that it has written.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import sys
from pathlib import Path

from wrapper import PoolCreateOptions, WarmWorkerPoolManager, WorkRequest, load_config
from wrapper.errors import WrapperError
from wrapper.events import Event, EventKind

TIMEOUT_S = 10.0
"""For a request whose worker was stopped in the middle (SIGSTOP)."""

FILL_TMP = """
try:
    with open('/tmp/full', 'wb') as f:
        while True: f.write(b'x' * 65536)
except OSError as error:
    result = error.errno
"""
OUT_OF_MEMORY = "result = len(bytearray(1 << 30))"


def tell(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def arguments_of(number: int) -> list[bytes]:
    """Most requests are plain; some do what a bad action does."""
    plain = [b"id-%d" % number, b"--read=input.txt", b"--write=out/%d" % number]
    if number % 97 == 13:
        return [b"--run=" + FILL_TMP.encode()]
    if number % 211 == 17:
        return [b"--run=" + OUT_OF_MEMORY.encode()]
    if number % 31 == 5:
        return [*plain, b"--leave-daemon", b"--leave-tmp"]
    if number % 53 == 7:
        return [*plain, b"--sleep-ms=50"]
    return plain


async def act(pools: WarmWorkerPoolManager, work: Path, number: int) -> str:
    directory = work / f"action-{number}"
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "out").mkdir(parents=True)
    os.link(work / "blob", directory / "input.txt")
    arguments = arguments_of(number)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            request = WorkRequest.of(arguments=arguments)
            response = await pools.run("pool", request, directory=str(directory))
    except TimeoutError:
        return "TIMEOUT"
    except WrapperError as error:
        return f"{type(error).__name__} {error.message}"
    else:
        output = response.pb.output
        if arguments[0].startswith(b"--run"):
            return "ok" if output in (b"28", b"failed: MemoryError: ") else f"WRONG {output!r}"
        expected = b"echo:" + b" ".join(arguments)
        if not output.startswith(expected) or b"content of the blob" not in output:
            return f"WRONG {output!r}"
        written = (directory / "out" / str(number)).read_bytes()
        return "ok" if written == expected else f"WRONG {written!r}"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def main(config: str, work: Path, numbers: range, at_once: int) -> None:
    queue = iter(numbers)
    pools = WarmWorkerPoolManager(PoolCreateOptions(load_config(config)))

    def note(event: Event) -> None:
        if event.kind is EventKind.WORKER_STARTED:
            tell(f"worker {event.detail.rpartition(' ')[2]}")

    pools.events.subscribe(note)
    async with pools:

        async def serve() -> None:
            for number in itertools.islice(queue, None):
                tell(f"begin {number}")
                tell(f"end {number} {(await act(pools, work, number))[:300]!s}".replace("\n", " "))

        await asyncio.gather(*(serve() for _ in range(at_once)))
    tell("done")


if __name__ == "__main__":
    first, count = int(sys.argv[3]), int(sys.argv[4])
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), range(first, first + count), int(sys.argv[5])))
