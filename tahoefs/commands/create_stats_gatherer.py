"""`tahoefs create-stats-gatherer DIR`"""

from __future__ import annotations

from pathlib import Path

import click

from tahoefs.listening import port_options


@click.command("create-stats-gatherer", short_help="make a statistics gatherer's node directory")
@click.argument("directory", type=click.Path(path_type=Path))
@port_options
@click.option("--nickname", default="stats-gatherer", show_default=True)
def command(directory: Path, port: str | None, location: str | None, nickname: str) -> None:
    """Make DIRECTORY the node directory of a statistics gatherer: it asks every node that has its FURL once a minute.

    A node has it when `stats_gatherer.furl` in its directory is a copy of this one's `private/stats_gatherer.furl`.
    """
    from grid.server_directory import create_gatherer_directory

    create_gatherer_directory(directory, nickname=nickname, port=port, location=location)
    click.echo(f"made {directory}; next: tahoefs run {directory}")
