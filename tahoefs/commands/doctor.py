"""`tahoefs doctor`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tahoefs.cli import node_dir_option


@click.command("doctor", short_help="what is wrong here, and what to do about it")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@node_dir_option
@click.pass_context
def command(ctx: click.Context, as_json: bool, node_dir: Path) -> None:
    """Look at what mounting needs: this machine first, then the node directory, then the grid.

    Each thing that is wrong comes with a remedy. Ends with 0 when nothing is; with 1 when it is this machine or the
    node directory, else with 3 when it is the grid. Warnings do not count.
    """
    import json

    import trio

    from tahoefs.doctor import exit_code, look_at_everything

    findings: list[Any] = trio.run(look_at_everything, node_dir)
    if as_json:
        click.echo(json.dumps({"findings": [finding.plain() for finding in findings]}, indent=2))
    else:
        for finding in findings:
            click.echo(f"{finding.mark:5} {finding.subject}: {finding.text}")
            if finding.remedy:
                click.echo(f"      → {finding.remedy}")
    ctx.exit(exit_code(findings))
