"""Tells systemd how a service is doing: the datagrams of sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket

_log = logging.getLogger(__name__)


def notify(*lines: str) -> None:
    """Send these assignments (`READY=1`, `STATUS=…`) if there is somebody to hear them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = f"\0{address[1:]}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
            notifier.connect(address)
            notifier.send("\n".join(lines).encode())
    except OSError as error:
        _log.warning("systemd cannot be told %s: %s", lines[0], error)
