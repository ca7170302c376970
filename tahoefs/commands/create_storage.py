"""`tahoefs create-storage DIR --introducer FURL`"""

from __future__ import annotations

from pathlib import Path

import click

from tahoefs.listening import port_options


@click.command("create-storage", short_help="make a storage server's node directory")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--introducer", "introducers", multiple=True, required=True, metavar="FURL", help="May be repeated.")
@port_options
@click.option("--nickname", default="storage", show_default=True)
@click.option("--reserved-space", default="1G", show_default=True, metavar="SIZE", help="What stays free on the disk.")
def command(
    directory: Path,
    introducers: tuple[str, ...],
    port: str | None,
    location: str | None,
    nickname: str,
    reserved_space: str,
) -> None:
    """Make DIRECTORY the node directory of a storage server, in Tahoe's own layout, announced by these introducers."""
    from grid.server_directory import create_storage_directory

    create_storage_directory(
        directory,
        introducers=introducers,
        nickname=nickname,
        port=port,
        location=location,
        reserved_space=reserved_space,
    )
    click.echo(f"made {directory}; next: tahoefs run {directory}")
