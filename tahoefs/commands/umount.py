"""`tahoefs umount MOUNTPOINT [--no-wait]`"""

from __future__ import annotations

import math
import os
import signal
import time
from pathlib import Path
from typing import Any, Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ControlError, ask
from tahoefs.mountpoint import FUSE_TYPE, filesystem_at, is_dead, unmount
from tahoefs.progress import Progress, in_words
from tahoefs.registry import absolute, find_socket

ANSWER_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.05
NOTICE_S: Final = 1.0  # for the daemon to hear of the unmount from the kernel
INTERRUPTED: Final = 130  # exit code


@click.command("umount", short_help="send what is unsent, then unmount")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--no-wait", is_flag=True, help="Unmount at once; the next mount sends what is unsent.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), help="Give up after so many seconds.")
def command(mountpoint: Path, no_wait: bool, timeout_s: float | None) -> None:
    """Send what is unsent to the grid, then unmount MOUNTPOINT. When it cannot be sent, it stays mounted.

    It cannot after three failures of one thing or two minutes without any progress.
    """
    where = absolute(mountpoint)
    socket = find_socket(where)
    mounted = filesystem_at(where) == FUSE_TYPE
    if not mounted and socket is None:
        raise UserError(f"{where}: not a tahoefs mount")
    if mounted and is_dead(where):
        unmount(where, lazy=True)
        raise UserError(f"{where}: cleared, but its daemon had died; what it had not sent is lost")
    if socket is None:
        unmount(where)
    elif no_wait:
        _leave(where, socket)
    else:
        _send_and_leave(where, socket, timeout_s)


def _send_and_leave(where: Path, socket: Path, timeout_s: float | None) -> None:
    """Raises ControlError when it cannot be sent: then it stays mounted."""
    with Progress("sending") as progress:
        try:
            if filesystem_at(where) == FUSE_TYPE:
                request = {"command": "sync", "timeout_s": timeout_s}
                ask(socket, request, timeout_s=ANSWER_TIMEOUT_S, progress=progress.pending)
                unmount(where)
        except KeyboardInterrupt:
            left = f"{in_words(progress.last)} is" if progress.last else "the rest is"
            raise UserError(f"{where}: still mounted; {left} being sent", INTERRUPTED) from None
        try:
            _wait_until_gone(socket, progress)
        except KeyboardInterrupt:
            left = in_words(progress.last) if progress.last else "the rest"
            raise UserError(f"{where}: unmounted; its daemon goes on sending {left}", INTERRUPTED) from None


def _leave(where: Path, socket: Path) -> None:
    """Unmount, and let the daemon end without sending. Refused where that would lose something."""
    status = ask(socket, {"command": "status"}, timeout_s=ANSWER_TIMEOUT_S)
    if any(status["pending"].values()) and not status["durable"]:
        raise UserError(f"{where}: not sent yet, and would be lost: {in_words(status['pending'])}; leave out --no-wait")
    if filesystem_at(where) == FUSE_TYPE:
        unmount(where)
    left: dict[str, Any] | None = None
    try:
        left = ask(socket, {"command": "detach"}, timeout_s=ANSWER_TIMEOUT_S)
    except ControlError:
        if socket.exists():  # else it had nothing to send, and has ended already
            raise
    _wait_until_gone(socket, Progress("ending"))
    if left is not None and any(left.values()):
        click.echo(f"{where}: unmounted; left for the next mount to send: {in_words(left)}")


def _wait_until_gone(socket: Path, progress: Progress) -> None:
    """What was written between the sync and the unmount is sent by the daemon before it ends.

    The kernel tells the daemon of an unmount only when no other mount namespace (a container, a service of its own)
    holds a copy of the mount; so one that has not noticed after a while is told by a signal.
    """
    tell_at = time.monotonic() + NOTICE_S
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
