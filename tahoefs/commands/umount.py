"""`tahoefs umount MOUNTPOINT [--no-wait]`"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ControlError, ask
from tahoefs.mountpoint import FUSE_TYPE, filesystem_at, is_dead, unmount
from tahoefs.progress import Progress
from tahoefs.registry import absolute, find_socket

ANSWER_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.05
NOTICE_S: Final = 1.0  # for the daemon to hear of the unmount from the kernel


@click.command("umount", short_help="send what is unsent, then unmount")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--no-wait", is_flag=True, help="Do not wait: refused while anything is unsent.")
@click.option("--timeout", "timeout_s", type=float, help="Give up sending after so many seconds; nothing is lost.")
def command(mountpoint: Path, no_wait: bool, timeout_s: float | None) -> None:
    """Send what is unsent to the grid, then unmount MOUNTPOINT."""
    where = absolute(mountpoint)
    socket = find_socket(where)
    if filesystem_at(where) != FUSE_TYPE and socket is None:
        raise UserError(f"{where}: not a tahoefs mount")
    if filesystem_at(where) == FUSE_TYPE and is_dead(where):
        unmount(where, lazy=True)
        raise UserError(f"{where}: cleared, but its daemon had died: what it had not sent is lost")
    if socket is not None:
        _send_all(where, socket, no_wait=no_wait, timeout_s=timeout_s)
    if filesystem_at(where) == FUSE_TYPE:
        unmount(where)
    if socket is not None:
        _wait_until_gone(socket)


def _send_all(where: Path, socket: Path, *, no_wait: bool, timeout_s: float | None) -> None:
    """Raises ControlError when it cannot be sent, UserError when there is something and nobody wants to wait."""
    if not no_wait:
        with Progress("sending") as progress:
            request = {"command": "sync", "timeout_s": timeout_s}
            ask(socket, request, timeout_s=ANSWER_TIMEOUT_S, progress=progress.pending)
        return
    pending = ask(socket, {"command": "status"}, timeout_s=ANSWER_TIMEOUT_S)["pending"]
    if any(pending.values()):
        raise UserError(f"{where}: {pending['files']} files are not sent yet and would be lost; leave out --no-wait")


def _wait_until_gone(socket: Path) -> None:
    """What was written between the sync and the unmount is sent by the daemon before it ends.

    The kernel tells the daemon of an unmount only when no other mount namespace (a container, a service of its own)
    holds a copy of the mount; so one that has not noticed after a while is told by a signal.
    """
    tell_at = time.monotonic() + NOTICE_S
    with Progress("finishing") as progress:
        while socket.exists():
            try:
                status = ask(socket, {"command": "status"}, timeout_s=ANSWER_TIMEOUT_S)
                progress.pending(status["pending"])
                if status["state"] != "draining" and time.monotonic() > tell_at:
                    tell_at = math.inf
                    os.kill(status["pid"], signal.SIGTERM)
            except (ControlError, ProcessLookupError):
                if not socket.exists():
                    return
            time.sleep(POLL_S)
