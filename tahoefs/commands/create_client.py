"""`tahoefs create-client DIR --introducer FURL…`"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("create-client", short_help="make a node directory")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--introducer", "introducers", multiple=True, required=True, metavar="FURL", help="May be repeated.")
@click.option("--shares-needed", "k", type=click.IntRange(1, 255), default=3, show_default=True)
@click.option("--shares-happy", "happy", type=click.IntRange(1, 255), default=7, show_default=True)
@click.option("--shares-total", "n", type=click.IntRange(1, 255), default=10, show_default=True)
@click.option("--nickname", default="tahoefs", show_default=True)
def command(directory: Path, introducers: tuple[str, ...], k: int, happy: int, n: int, nickname: str) -> None:
    """Make DIRECTORY a node directory, in Tahoe's own layout, for the grid these introducers announce."""
    if not k <= happy <= n:
        raise click.UsageError(f"shares must be needed <= happy <= total, not {k}, {happy}, {n}")

    from grid.node_directory import create_client_directory

    create_client_directory(directory, introducers=introducers, nickname=nickname, shares=(k, happy, n))
    click.echo(f"made {directory}; next: tahoefs create-alias -d {directory} tahoe")
