"""`tahoefs sync [PATH]`"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ask
from tahoefs.mountpoint import FUSE_TYPE, filesystem_at
from tahoefs.progress import Progress
from tahoefs.registry import absolute, find_socket

ANSWER_TIMEOUT_S: Final = 60.0


@click.command("sync", short_help="return once everything written is on the grid")
@click.argument("path", type=click.Path(path_type=Path), default=".")
@click.option("--timeout", "timeout_s", type=float, help="Fail after so many seconds.")
def command(path: Path, timeout_s: float | None) -> None:
    """Return once everything written before this call, in the mount that holds PATH, is on the grid."""
    where = absolute(path)
    while filesystem_at(where) != FUSE_TYPE:
        if where == where.parent:
            raise UserError(f"{path}: not inside a tahoefs mount")
        where = where.parent
    socket = find_socket(where)
    if socket is None:
        raise UserError(f"{where}: its daemon is gone; mount again")
    with Progress("sending") as progress:
        request = {"command": "sync", "timeout_s": timeout_s}
        ask(socket, request, timeout_s=ANSWER_TIMEOUT_S, progress=progress.pending)
