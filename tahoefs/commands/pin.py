"""`tahoefs pin [PATH] [--no-wait] [--list]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ControlError, ask
from tahoefs.progress import Progress, pinned_in_words, printable
from tahoefs.registry import all_sockets, find_mount

ANSWER_TIMEOUT_S: Final = 300.0  # between two words about how far it is: what is not on the grid yet is sent first
STATUS_TIMEOUT_S: Final = 10.0


@click.command("pin", short_help="keep a tree or a file in the cache, to have it offline")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@click.option("--no-wait", is_flag=True, help="Return at once; `status` tells how far it is.")
@click.option("--list", "listing", is_flag=True, help="Only show what is pinned, in all mounts or in that of PATH.")
@click.option("--json", "as_json", is_flag=True, help="With --list, or without PATH: one JSON array.")
def command(path: Path | None, no_wait: bool, listing: bool, as_json: bool) -> None:
    """Keep PATH, in a mount, complete and current in the disk cache, so that all of it can be read offline.

    Returns once all of it is there. From then on, also after a remount, what changes in it is fetched in the
    background, until `tahoefs unpin PATH`. Without PATH: shows what is pinned.
    """
    if path is None or listing:
        _list(path, as_json)
        return
    found = find_mount(path)
    if found is None:
        raise UserError(f"{path}: not in a tahoefs mount of yours")
    request: dict[str, Any] = {"command": "pin", "path": list(found.inside), "label": str(path), "wait": not no_wait}
    with Progress("pinning") as progress:
        try:
            ask(found.socket, request, timeout_s=ANSWER_TIMEOUT_S, progress=progress.pinned)
        except KeyboardInterrupt:
            raise UserError(f"{path}: no longer waiting; it stays pinned, and goes on being fetched", 130) from None


def _list(path: Path | None, as_json: bool) -> None:
    if path is None:
        sockets = all_sockets()
    elif (found := find_mount(path)) is not None:
        sockets = [found.socket]
    else:
        raise UserError(f"{path}: not in a tahoefs mount of yours")
    pins = []
    for socket in sockets:
        try:
            status = ask(socket, {"command": "status"}, timeout_s=STATUS_TIMEOUT_S)
        except ControlError:
            if path is not None:
                raise
            continue  # a daemon that was killed leaves its socket behind
        pins += [{**pin, "mountpoint": status["mountpoint"]} for pin in status.get("pinned", [])]
    if as_json:
        click.echo(json.dumps(pins, indent=2))
        return
    for pin in pins:
        click.echo(f"{pin['mountpoint']}{printable(pin['path']).rstrip('/')}  {pinned_in_words(pin)}")
