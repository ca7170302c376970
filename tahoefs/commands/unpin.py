"""`tahoefs unpin PATH`"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ask
from tahoefs.registry import find_mount

ANSWER_TIMEOUT_S: Final = 60.0


@click.command("unpin", short_help="no longer keep what `pin` kept")
@click.argument("path", type=click.Path(path_type=Path))
def command(path: Path) -> None:
    """No longer keep PATH in the disk cache: what is there of it becomes ordinary cache, which may be evicted."""
    found = find_mount(path)
    if found is None:
        raise UserError(f"{path}: not in a tahoefs mount of yours")
    request = {"command": "unpin", "path": list(found.inside), "label": str(path)}
    ask(found.socket, request, timeout_s=ANSWER_TIMEOUT_S)
