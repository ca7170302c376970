"""`tahoefs create-introducer DIR`"""

from __future__ import annotations

from pathlib import Path

import click

from tahoefs.listening import port_options


@click.command("create-introducer", short_help="make an introducer's node directory")
@click.argument("directory", type=click.Path(path_type=Path))
@port_options
@click.option("--nickname", default="introducer", show_default=True)
def command(directory: Path, port: str | None, location: str | None, nickname: str) -> None:
    """Make DIRECTORY the node directory of an introducer, in Tahoe's own layout."""
    from grid.server_directory import ServerDirectory, create_introducer_directory

    create_introducer_directory(directory, nickname=nickname, port=port, location=location)
    furl_file = ServerDirectory.open(directory).furl_file
    click.echo(f"made {directory}; its FURL is in {furl_file}; next: tahoefs run {directory}")
