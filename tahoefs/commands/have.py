"""`tahoefs have FILE… [--in WHAT] [--verify] [--json]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from tahoefs.cli import UserError, node_dir_option

if TYPE_CHECKING:
    import grid

WORST_FIRST: Final = (3, 5, 1, 0)  # exit codes


@click.command("have", short_help="is a local file safely on the grid?")
@click.argument("files", metavar="FILE…", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--in", "where", metavar="WHAT", help="Tell where it is linked below this directory, too.")
@click.option("--verify", is_flag=True, help="Read every byte of every share.")
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
@node_dir_option
def command(files: tuple[Path, ...], where: str | None, verify: bool, as_json: bool, node_dir: Path) -> int:
    """Is FILE on this grid, with all its shares? By the cap it has with this node's encoding and convergence secret.

    Says nothing of copies made with another secret. Exit code 0 only if all files are healthy; else as `check`.
    """
    import trio

    return trio.run(_have, files, where, verify, as_json, node_dir)


async def _have(files: tuple[Path, ...], where: str | None, verify: bool, as_json: bool, node_dir: Path) -> int:
    import grid
    from grid.check_history import CheckHistory
    from tahoefs.commands.check import exit_code
    from tahoefs.on_grid import joined, look_up

    local = look_up(where, node_dir).local if where is not None else None
    codes = []
    async with joined(node_dir, local) as client:
        with CheckHistory(client.node.path) as history:
            checker = client.checker(history)
            caps = {file: await _cap_of(client, file) for file in files}
            linked = await _linked(client, where, node_dir, set(caps.values())) if where is not None else {}
            for file, cap in caps.items():
                results = await (checker.verify(cap) if verify else checker.check(cap))
                there = bool(results.good) or isinstance(cap, grid.LiteralCap)
                codes.append(exit_code(client, healthy=results.healthy, recoverable=results.recoverable or not there))
                if as_json:
                    click.echo(json.dumps({"file": str(file), "linked": linked.get(cap, []), **results.to_json()}))
                    continue
                said = results.summary if there else "not on this grid"
                if isinstance(cap, grid.LiteralCap):
                    said = "small enough to be kept in its cap: it is wherever it is linked"
                links = "".join(f"\n  linked as {path}" for path in linked.get(cap, []))
                click.echo(f"{file}: {said}{links}")
    return min(codes, key=WORST_FIRST.index)


async def _cap_of(client: grid.GridClient, file: Path) -> grid.Cap:
    import grid

    uploadable = grid.FileUploadable(file, convergence=client.node.convergence)
    uploadable.set_default_encoding_parameters(client.encoding_parameters)
    try:
        return await grid.chk_cap_of(uploadable)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


async def _linked(client: grid.GridClient, where: str, node_dir: Path, caps: set[Any]) -> dict[grid.Cap, list[str]]:
    """{cap: paths}: where each was found first; a literal, everywhere."""
    from contextlib import aclosing

    from grid.nodes.traversal import walk
    from tahoefs.on_grid import find, look_up

    target = look_up(where, node_dir)
    found: dict[grid.Cap, list[str]] = {}
    async with aclosing(walk(client.nodemaker, await find(client, target))) as visits:
        async for visit in visits:
            if visit.cap in caps:
                found.setdefault(visit.cap, []).append(f"{target.label.rstrip('/')}/{'/'.join(visit.path)}")
    return found
