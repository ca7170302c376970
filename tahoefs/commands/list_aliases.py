"""`tahoefs list-aliases`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from tahoefs.cli import node_dir_option


@click.command("list-aliases", short_help="the names known to a node directory")
@click.option("--readonly-uri", is_flag=True, help="Show read-only caps.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: {name: cap}.")
@node_dir_option
def command(readonly_uri: bool, as_json: bool, node_dir: Path) -> None:
    """Show the aliases and, as Tahoe does, the caps behind them. The caps are secrets."""
    from grid import parse_cap
    from grid.aliases import load_aliases

    shown = load_aliases(node_dir)
    if readonly_uri:
        shown = {name: str(parse_cap(cap).readonly) for name, cap in shown.items()}
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return
    width = max((len(name) for name in shown), default=0)
    for name, cap in sorted(shown.items()):
        click.echo(f"{name:>{width}}: {cap}")
