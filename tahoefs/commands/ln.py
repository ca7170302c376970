"""`tahoefs ln CAP PATH`"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from tahoefs.cli import UserError, node_dir_option, warn
from tahoefs.control_client import ask
from tahoefs.places import InMount, OnGrid, find_place
from tahoefs.what import WhatError, resolve_what

ANSWER_TIMEOUT_S: Final = 120.0  # it may look for CAP's path on the grid


@click.command("ln", short_help="link an existing cap under a name")
@click.argument("cap")
@click.argument("path")
@node_dir_option
def command(cap: str, path: str, node_dir: Path) -> None:
    """Give what CAP stands for (alias:path, @FILE, - or a cap) the name PATH: in a mount, or alias:path.

    Both names are of the same thing then: where it can change, it changes under both ('tahoefs clone' makes a copy).
    If PATH is a directory, the link comes into it under the name CAP's path ends in.
    """
    try:
        what = resolve_what(cap, node_dir)
        place = find_place(path, node_dir)
    except WhatError as error:
        raise UserError(str(error), 2) from None
    for text in what.warnings:
        warn(text)
    source = OnGrid(what.label, what)
    if isinstance(place, InMount):
        request = {"command": "link", "from": source.to_json(), "to": place.to_json()}
        ask(place.mount.socket, request, timeout_s=ANSWER_TIMEOUT_S)
        return
    from tahoefs.direct import change

    change(node_dir, place, lambda links: links.link(source.to_json(), place.to_json()))
