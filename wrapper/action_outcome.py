"""What whoever asked for an action can be told: the seam between a service and its clients' connections."""

from __future__ import annotations

from typing import Protocol

from wrapper.client_protocol import FailureKind


class Client(Protocol):
    """Whoever asked. Told exactly one outcome. When it is gone, each method does nothing."""

    def taken(self) -> bool:
        """From here on the action's files are ours. False: it is gone, leave them."""

    def one_shot(self, reason: str) -> None:
        """Its tree is as it came: it shall run the action itself, whatever its policy."""

    def busy(self, reason: str) -> None:
        """No worker can take it now. Its tree is as it came; its policy says what is to be done."""

    def ended(self, exit_code: int, output: bytes) -> None:
        """The worker's answer. The tree is back, with the outputs."""

    def failed(self, kind: FailureKind, message: str, exit_code: int = 0) -> None:
        """There is no answer. `exit_code` is for FailureKind.REFUSED."""
