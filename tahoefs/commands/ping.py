"""`tahoefs ping [--rounds N] [--timeout SECONDS] [--json]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from tahoefs.cli import UserError, node_dir_option

if TYPE_CHECKING:
    from grid.measure import ServerTimes

CONNECT_TIMEOUT_S: Final = 10.0  # for all servers known; those that are there connect in less
SERVERS_MAX: Final = 2000
EXIT_UNREACHABLE: Final = 3


@click.command("ping", short_help="how fast each server answers")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True, help="Questions to each server.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0.1, 60),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="For each answer; who takes longer is silent.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@node_dir_option
def command(rounds: int, timeout_s: float, as_json: bool, node_dir: Path) -> None:
    """Ask every storage server of the grid several times, and show how long it took.

    Ends with 3 when no server answered.
    """
    import trio

    from grid import NodeDirectory

    found: list[ServerTimes] = trio.run(_ping, NodeDirectory.open(node_dir), rounds, timeout_s)
    if as_json:
        click.echo(json.dumps({"servers": [_plain(each) for each in found]}, indent=2))
    else:
        _print_table(found)
    if not any(each.seconds for each in found):
        raise UserError("no storage server answered" if found else "no storage server is known", EXIT_UNREACHABLE)


async def _ping(node: Any, rounds: int, timeout_s: float) -> list[ServerTimes]:
    from grid import join_grid
    from grid.measure import ping

    async with join_grid(node) as client:
        await client.broker.wait_for_servers(SERVERS_MAX, CONNECT_TIMEOUT_S)
        return await ping(client.broker.get_known_servers(), rounds=rounds, timeout_s=timeout_s)


def _plain(times: ServerTimes) -> dict[str, Any]:
    return {
        "server_id": times.server_id,
        "nickname": times.nickname,
        "protocol": times.protocol,
        "version": times.version,
        "answers": len(times.seconds),
        "min_s": min(times.seconds, default=None),
        "median_s": times.median_s,
        "max_s": max(times.seconds, default=None),
        "failure": times.failure,
    }


def _print_table(found: list[ServerTimes]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("server", "nickname", "protocol", "version"):
        table.add_column(name, no_wrap=True)
    for name in ("min ms", "median ms", "max ms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for times in sorted(found, key=lambda each: (each.median_s is None, each.median_s or 0.0)):
        median_s = times.median_s
        numbers = (
            [] if median_s is None else [f"{s * 1000:.1f}" for s in (min(times.seconds), median_s, max(times.seconds))]
        )
        cells = [times.name, times.nickname, times.protocol, times.version, *(numbers or ["-"] * 3)]
        table.add_row(*map(Text, (*cells, times.failure or "")))
    Console(width=max(100, Console().width)).print(table)
