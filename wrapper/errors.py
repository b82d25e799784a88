"""The errors that reach a user or a caller: who erred, what was seen, what to do.

Owns the wording's frame and the exit codes; knows nothing of pools, runtimes or the wire.
"""

from __future__ import annotations

SHOWN_BYTES = 64
"""How many bytes of an offending frame a ProtocolError shows."""
SHOWN_STDERR_BYTES = 8 * 1024
"""How much of a worker's stderr an error shows."""


class WrapperError(Exception):
    """Base of every error that this project raises on purpose.

    `exit_code` is what a process that ends with this error exits with (sysexits.h where it has a
    fitting one). `retry_helps` says whether the same call may succeed later with nothing changed.
    `stderr_tail` is a bounded tail of the worker's standard error, empty if there is no worker.
    """

    exit_code = 70
    retry_helps = False

    def __init__(self, message: str, *, stderr_tail: bytes = b"") -> None:
        super().__init__(message)
        self.message = message
        self.stderr_tail = stderr_tail

    def report(self) -> str:
        """The message, and below it what the worker last wrote to its standard error."""
        if not self.stderr_tail:
            return self.message
        tail = self.stderr_tail[-SHOWN_STDERR_BYTES:].decode("utf-8", "replace").rstrip("\n")
        return f"{self.message}\n--- last lines of the worker's stderr ---\n{tail}\n---"


class ConfigError(WrapperError):
    """The operator's configuration or command line is wrong; nothing was started."""

    exit_code = 78


class UnknownPool(ConfigError):
    """No pool has this name, and no pool serves this persistentWorkerKey."""


class ProtocolError(WrapperError):
    """Bytes that are not the worker protocol.

    `offset` counts bytes from the start of the stream to the frame that is wrong; `expected` says
    what should have stood there; `seen` holds the first bytes of that frame, at most SHOWN_BYTES.
    """

    exit_code = 65

    def __init__(self, *, offset: int, expected: str, seen: bytes, stderr_tail: bytes = b"") -> None:
        self.offset = offset
        self.expected = expected
        self.seen = bytes(seen[:SHOWN_BYTES])
        super().__init__(f"at byte {offset}: expected {expected}, saw {self.seen!r}", stderr_tail=stderr_tail)


class WorkerProtocolError(WrapperError):
    """A tool broke the worker protocol: garbage on its stdout, an answer that nobody asked for."""

    exit_code = 76


class WorkerDied(WrapperError):
    """The worker's process ended while a request was with it. The request is not run again."""

    exit_code = 70


class WorkerStartFailed(WrapperError):
    """The worker's program cannot be started."""

    exit_code = 69


class RuntimeUnavailable(WrapperError):
    """What runs the workers (the system, a container engine) cannot be used now."""

    exit_code = 69
    retry_helps = True


class PoolTimeout(WrapperError):
    """No worker became free before the caller's deadline."""

    exit_code = 75
    retry_helps = True


class PoolExhausted(WrapperError):
    """The queue of waiting requests is full."""

    exit_code = 75
    retry_helps = True


class PoolDraining(WrapperError):
    """The pool takes no new requests because it is stopping."""

    exit_code = 75
    retry_helps = True


class RequestRefused(WrapperError):
    """A request that this wrapper cannot serve correctly, and therefore does not serve."""

    exit_code = 64


class RequestCancelled(WrapperError):
    """The caller took its request back before it was answered."""

    exit_code = 75


class ActionTimedOut(WrapperError):
    """The action's own time was over. Its worker was stopped, and its tree is gone."""

    exit_code = 75


class ActionLost(RuntimeUnavailable):
    """What runs the workers has lost an action's tree, or cannot give it back safely.

    The action itself is not to blame: run from its inputs again, it may succeed.
    """


class NotAWorker(WrapperError):
    """A tool that was taken for a worker and is none: it ended, or answered something else.

    The action's tree is as it was before.
    """

    exit_code = 76
