"""`tahoefs sync [PATH]`"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ask
from tahoefs.progress import Progress, in_words
from tahoefs.registry import find_mount

ANSWER_TIMEOUT_S: Final = 60.0


@click.command("sync", short_help="return once everything written is on the grid")
@click.argument("path", type=click.Path(path_type=Path), default=".")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), help="Fail after so many seconds.")
def command(path: Path, timeout_s: float | None) -> None:
    """Return once everything written before this call, in the mount that PATH is in, is on the grid.

    Fails, and says how much is not there, after three failures of one thing or two minutes without any progress.
    """
    wait_until_sent(path, timeout_s)


def wait_until_sent(path: Path, timeout_s: float | None = None) -> None:
    """What the command does. Raises UserError, ControlError."""
    found = find_mount(path)
    if found is None:
        raise UserError(f"{path}: not in a tahoefs mount of yours")
    with Progress("sending") as progress:
        request = {"command": "sync", "timeout_s": timeout_s}
        try:
            ask(found.socket, request, timeout_s=ANSWER_TIMEOUT_S, progress=progress.pending)
        except KeyboardInterrupt:
            left = in_words(progress.last) if progress.last else "what is left"
            raise UserError(f"{path}: no longer waiting; {left} goes on being sent", 130) from None
