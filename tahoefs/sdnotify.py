"""Tells systemd how a service is doing: one datagram to the socket that $NOTIFY_SOCKET names, if it does.

Source: sd_notify(3). Whoever started us without systemd notices nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

VARIABLE: Final = "NOTIFY_SOCKET"


def ready(status: str = "") -> None:
    """The service does what it is for."""
    notify("READY=1", *([f"STATUS={status}"] if status else []))


def stopping(status: str = "") -> None:
    """The service was told to stop, and finishes its work."""
    notify("STOPPING=1", *([f"STATUS={status}"] if status else []))


def notify(*lines: str) -> bool:
    """Send `NAME=value` lines; False when nobody asked to be told, or they cannot be reached."""
    address = os.environ.get(VARIABLE, "")
    if not address.startswith(("/", "@")):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        sender.sendall("\n".join(lines).encode())
        return True
    return False
