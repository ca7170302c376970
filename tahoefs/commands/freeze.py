"""`tahoefs freeze PATH [--as ALIAS] [--json]`"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tahoefs.cli import UserError, node_dir_option, warn
from tahoefs.progress import Progress, human_bytes

if TYPE_CHECKING:
    import grid
    from grid.nodes.freeze import FreezeResults
    from tahoefs.what import What


@click.command("freeze", short_help="an immutable snapshot of a tree; only directories are uploaded")
@click.argument("path")
@click.option("--as", "alias", metavar="ALIAS", help="Keep the snapshot's cap under this name, and do not print it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@node_dir_option
def command(path: str, alias: str | None, as_json: bool, node_dir: Path) -> int:
    """Make a snapshot of PATH, a directory in a mount or a WHAT, that never changes. Prints its cap.

    Files are not uploaded again, only directories are; mutable files are copied as they are now, and named.
    Exit code 1 if something had to be left out.
    """
    import trio

    from grid.aliases import add_alias, load_aliases

    if alias is not None and (alias := alias.removesuffix(":")) in load_aliases(node_dir):
        raise UserError(f"there is an alias {alias}: in {node_dir} already")
    cap, results = trio.run(_freeze, _target(path, node_dir), node_dir)
    if alias is not None:
        add_alias(node_dir, alias, str(cap))
    if as_json:
        shown: dict[str, Any] = {} if alias is not None else {"cap": str(cap)}
        click.echo(json.dumps(shown | _to_json(results)))
    else:
        click.echo(f"alias {alias}: made" if alias is not None else str(cap))
        _tell(results)
    return 1 if results.left_out else 0


def _target(path: str, node_dir: Path) -> What:
    """Of a directory in a mount: its cap, once everything written there is on the grid."""
    from tahoefs.commands.sync import wait_until_sent
    from tahoefs.places import OnGrid, find_place
    from tahoefs.what import What, WhatError

    try:
        place = find_place(path, node_dir)
    except WhatError as error:
        raise UserError(str(error), 2) from None
    if isinstance(place, OnGrid):
        for warning in place.what.warnings:
            warn(warning)
        return place.what
    wait_until_sent(Path(path))
    try:
        return What(os.getxattr(path, "user.tahoe.cap").decode(), (), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


async def _freeze(target: What, node_dir: Path) -> tuple[grid.Cap, FreezeResults]:
    from grid.nodes.freeze import Freezer
    from tahoefs.on_grid import find, joined, node_directory_of

    with Progress("freezing") as progress:

        def note(results: FreezeResults) -> None:
            progress.objects(results.directories, f"{results.kept} files kept, {len(results.copied)} copied")

        async with joined(node_directory_of(target, node_dir), target.local) as client:
            freezer = Freezer(client.nodemaker, client.node.convergence, note)
            return await freezer.freeze(await find(client, target)), freezer.results


def _to_json(results: FreezeResults) -> dict[str, Any]:
    return {
        "directories": results.directories,
        "directory-bytes": results.directory_bytes,
        "kept": results.kept,
        "copied": ["/".join(path) for path in results.copied],
        "copied-bytes": results.copied_bytes,
        "left-out": [{"path": "/".join(path), "why": why} for path, why in results.left_out],
    }


def _tell(results: FreezeResults) -> None:
    """On standard error: the cap stands alone on standard output."""
    size = human_bytes(results.directory_bytes)
    click.echo(f"{results.directories} directories uploaded ({size}), {results.kept} objects kept", err=True)
    for path in results.copied:
        click.echo(f"copied, since it is mutable: {'/'.join(path)}", err=True)
    for path, why in results.left_out:
        click.echo(f"left out: {'/'.join(path)} ({why})", err=True)
