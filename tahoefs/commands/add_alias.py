"""`tahoefs add-alias NAME CAP`"""

from __future__ import annotations

from pathlib import Path

import click

from tahoefs.cli import UserError, node_dir_option
from tahoefs.what import WhatError, resolve_what


@click.command("add-alias", short_help="name an existing directory cap")
@click.argument("name")
@click.argument("what", metavar="CAP")
@node_dir_option
def command(name: str, what: str, node_dir: Path) -> None:
    """Keep CAP (a directory cap, @FILE, or - for standard input) as the alias NAME."""
    from grid import parse_known_cap
    from grid.aliases import add_alias, load_aliases
    from grid.errors import WrongKindError

    name = name.removesuffix(":")
    if name in load_aliases(node_dir):
        raise UserError(f"there is an alias {name}: in {node_dir} already")
    try:
        target = resolve_what(what, node_dir)
    except WhatError as error:
        raise UserError(str(error), 2) from None
    cap = parse_known_cap(target.cap)
    if not cap.is_directory or target.path:
        raise WrongKindError("an alias names a directory; this cap is of something else")
    add_alias(node_dir, name, str(cap))
    click.echo(f"alias {name}: added; next: tahoefs mount {name}: MOUNTPOINT")
