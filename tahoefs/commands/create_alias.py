"""`tahoefs create-alias NAME`"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from tahoefs.cli import UserError, node_dir_option

CONNECT_TIMEOUT_S: Final = 30.0
CREATE_TIMEOUT_S: Final = 120.0


@click.command("create-alias", short_help="make a directory on the grid and name it")
@click.argument("name")
@node_dir_option
def command(name: str, node_dir: Path) -> None:
    """Make a new directory on the grid and keep its cap as the alias NAME."""
    from grid.aliases import load_aliases

    name = name.removesuffix(":")
    if name in load_aliases(node_dir):
        raise UserError(f"there is an alias {name}: in {node_dir} already")

    import trio

    from grid.aliases import add_alias

    cap = trio.run(_create, node_dir)
    add_alias(node_dir, name, cap)
    click.echo(f"alias {name}: made; next: tahoefs mount {name}: MOUNTPOINT")


async def _create(node_dir: Path) -> str:
    """The write cap of a new, empty directory."""
    import trio

    import grid

    node = grid.NodeDirectory.open(node_dir)
    async with grid.join_grid(node) as client:
        needed, happy, _ = node.encoding
        connected = await client.broker.wait_for_servers(happy, CONNECT_TIMEOUT_S)
        if connected < needed:
            raise grid.GridUnreachableError(
                f"only {connected} storage servers could be reached, {needed} are needed: "
                "check the network, the introducer and the servers"
            )
        with trio.fail_after(CREATE_TIMEOUT_S):
            directory = await client.create_empty_dirnode()
        return directory.get_uri()
