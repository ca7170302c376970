"""`tahoefs stats [WHERE] [--json | --prometheus]`, `tahoefs stats --gathered DIR [--json]`"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path
from typing import Any, Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ask
from tahoefs.progress import human_bytes
from tahoefs.registry import absolute, all_sockets, find_mount, node_socket

ANSWER_TIMEOUT_S: Final = 30.0
RATE_OVER_S: Final = 600.0  # growth is shown over the last ten minutes
SILENT_AFTER_S: Final = 180.0  # three polls


@click.command("stats", short_help="what a mount or a node counts")
@click.argument("where", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--prometheus", is_flag=True, help="The text format of Prometheus.")
@click.option("--gathered", type=click.Path(path_type=Path), metavar="DIR", help="What the gatherer in DIR was told.")
def command(where: Path | None, as_json: bool, prometheus: bool, gathered: Path | None) -> None:
    """Statistics of the mount at, or around, WHERE, or of the running node whose directory WHERE is.

    Without WHERE: of the one mount there is.
    """
    if as_json and prometheus:
        raise click.UsageError("--json and --prometheus do not go together")
    if gathered is not None:
        if where is not None or prometheus:
            raise click.UsageError("--gathered goes with --json only")
        _show_gathered(gathered, as_json)
        return
    answer = ask(
        _socket(where),
        {"command": "stats", "format": "prometheus" if prometheus else "json"},
        timeout_s=ANSWER_TIMEOUT_S,
    )
    if prometheus:
        click.echo(answer["text"], nl=False)
    elif as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo(f"{answer['source']}\n" + "\n".join(_lines(answer["metrics"])))


def _socket(where: Path | None) -> Path:
    if where is None:
        sockets = all_sockets()
        if len(sockets) != 1:
            raise UserError(f"{len(sockets)} mounts are there: name one, or a node's directory", 2)
        return sockets[0]
    path = absolute(where)
    if (path / "tahoe.cfg").exists():
        socket = node_socket(path)
        if not socket.exists():
            raise UserError(f"{where}: this node does not run ('tahoefs run {where}')")
        return socket
    found = find_mount(where)
    if found is None:
        raise UserError(f"{where}: neither in a tahoefs mount of yours, nor a node directory")
    return found[1]


def _lines(metrics: dict[str, Any]) -> list[str]:
    """One line for each number; what was never counted is left out."""
    lines = []
    for name, metric in metrics.items():
        for label, value in metric["values"].items():
            shown = f"{name} {label}".rstrip()
            if not isinstance(value, dict):
                lines.append(f"  {shown:44} {_number(name, value)}")
            elif value["count"]:
                mean = value["sum"] / value["count"]
                lines.append(f"  {shown:44} {value['count']} times, mean {_seconds(mean)}, 95 % ≤ {value['p95']:g} s")
    return lines


def _number(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        return human_bytes(int(value))
    return _seconds(value) if name.endswith("_seconds") else f"{value:g}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


# --- a gatherer's history -------------------------------------------------------------------------------------------


def _show_gathered(directory: Path, as_json: bool) -> None:
    from grid.server.gatherer import DATABASE, last_polls

    now = time.time()
    try:
        last = last_polls(directory)
        before = {poll.tub_id: poll for poll in last_polls(directory, before=now - RATE_OVER_S)}
    except sqlite3.Error as error:
        raise UserError(f"{directory / DATABASE} cannot be read: {error}") from None
    if as_json:
        nodes = {
            poll.tub_id: {"timestamp": poll.at, "nickname": poll.nickname, "stats": _told(poll.counters, poll.stats)}
            for poll in last
        }
        click.echo(json.dumps(nodes, indent=2))
        return
    for poll in last:
        age_s = now - poll.at
        silent = f", silent for {age_s / 60:.0f} min" if age_s > SILENT_AFTER_S else ""
        click.echo(f"{poll.nickname or '(no name)'} {poll.tub_id[:8]}{silent}")
        older = before.get(poll.tub_id)
        for key, value in sorted({**poll.stats, **poll.counters}.items()):
            grown = ""
            if key in poll.counters and older is not None and poll.at > older.at:
                rate = max(0.0, value - older.counters.get(key, 0)) / (poll.at - older.at)
                grown = f"  ({rate:.3g}/s)" if rate else ""
            click.echo(f"  {key.replace('.', ' '):52} {_number(key.partition('.')[0], value)}{grown}")
    if not last:
        click.echo("nobody has told anything yet")


def _told(counters: dict[str, float], stats: dict[str, float]) -> dict[str, dict[str, float]]:
    return {"counters": counters, "stats": stats}
