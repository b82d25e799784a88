"""A worker that runs whatever Python a request brings (`--run=CODE`): every attack that an action can make.

The answer's output is the repr of `result`, or the error. `kept` lives from request to request.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tests.workers import echo_worker
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import echo_worker

KEPT: dict[str, object] = {}


class HostileWorker(echo_worker.Worker):
    """See the module."""

    def act(self, arguments: dict[bytes, bytes], request: echo_worker.Request) -> bytes:
        code = arguments.get(b"--run")
        if code is None:
            return super().act(arguments, request)
        scope: dict[str, object] = {"kept": KEPT, "os": os, "result": None}
        try:
            exec(code.decode(), scope)
        except BaseException as error:  # noqa: BLE001 - an attack that fails is an answer
            return f"failed: {type(error).__name__}: {error}".encode()
        return repr(scope["result"]).encode()


if __name__ == "__main__":
    HostileWorker(sys.argv[1:]).serve()
