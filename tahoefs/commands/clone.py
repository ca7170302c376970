"""`tahoefs clone [--mutable none|sdmf|mdmf] SRC DST`"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from tahoefs.cli import UserError, node_dir_option, warn
from tahoefs.control_client import ask
from tahoefs.options import MUTABLE
from tahoefs.places import InMount, OnGrid, find_place
from tahoefs.progress import Progress
from tahoefs.what import WhatError

ANSWER_TIMEOUT_S: Final = 600.0  # between two words about how far it is: a large mutable file may be copied meanwhile


@click.command("clone", short_help="an instant copy of a file or tree")
@click.argument("src")
@click.argument("dst")
@click.option("--mutable", type=click.Choice(MUTABLE), help="Convert the files; none: mutable ones become immutable.")
@node_dir_option
def command(src: str, dst: str, mutable: str | None, node_dir: Path) -> None:
    """Make DST an independent copy of SRC, each a path in a mount or alias:path, without copying contents.

    Immutable files are linked, since they never change; directories are made anew; only mutable files are copied.
    With --mutable all files of DST are of that kind, stored anew; with "none" only those that were mutable are.
    If DST is a directory, the copy comes into it under SRC's name.
    """
    try:
        source, place = find_place(src, node_dir), find_place(dst, node_dir)
    except WhatError as error:
        raise UserError(str(error), 2) from None
    for each in (source, place):
        for text in each.what.warnings if isinstance(each, OnGrid) else ():
            warn(text)
    what: dict[str, Any] = source.to_json()
    with Progress("cloning") as progress:
        if isinstance(source, InMount) and not (
            isinstance(place, InMount) and place.mount.socket == source.mount.socket
        ):
            request = {"command": "entry", "from": what}
            what |= {"path": []} | ask(
                source.mount.socket, request, timeout_s=ANSWER_TIMEOUT_S, progress=progress.pending
            )
        if isinstance(place, InMount):
            what_to_do: dict[str, Any] = {"command": "clone", "from": what, "to": place.to_json(), "mutable": mutable}
            ask(place.mount.socket, what_to_do, timeout_s=ANSWER_TIMEOUT_S, progress=progress.steps)
            return
        from tahoefs.direct import change

        change(node_dir, place, lambda links: links.clone(what, place.to_json(), mutable=mutable))
