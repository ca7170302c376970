"""`tahoefs status [MOUNTPOINT] [--json]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ControlError, ask
from tahoefs.progress import human_bytes
from tahoefs.registry import absolute, all_sockets, find_socket_above

ANSWER_TIMEOUT_S: Final = 10.0


@click.command("status", short_help="what a mount is doing")
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def command(mountpoint: Path | None, as_json: bool) -> None:
    """What the mount at, or around, MOUNTPOINT is doing; without MOUNTPOINT, all mounts of this user."""
    if mountpoint is not None:
        socket = find_socket_above(absolute(mountpoint))
        if socket is None:
            raise UserError(f"{mountpoint}: not in a tahoefs mount of yours")
        one = ask(socket, {"command": "status"}, timeout_s=ANSWER_TIMEOUT_S)
        click.echo(json.dumps(one, indent=2) if as_json else _text(one))
        return
    mounts = []
    for socket in all_sockets():
        try:
            mounts.append(ask(socket, {"command": "status"}, timeout_s=ANSWER_TIMEOUT_S))
        except ControlError:
            continue  # a daemon that was killed leaves its socket behind
    if as_json:
        click.echo(json.dumps({"mounts": mounts}, indent=2))
    else:
        click.echo("\n\n".join(map(_text, mounts)) or "nothing is mounted")


def _text(status: dict[str, Any]) -> str:
    pending, servers, cache = status["pending"], status["servers"], status["cache"]
    state = status["state"] + (", read-only" if status["readonly"] else "")
    lines = [
        f"{status['source']} on {status['mountpoint']} ({state})",
        f"  servers   {servers['connected']} connected of {servers['known']} known",
        f"  unsent    {pending['files']} files, {human_bytes(pending['bytes'])}, {pending['directories']} directories",
        f"  cache     {human_bytes(cache['bytes'])} of {human_bytes(cache['limit'])},"
        f" {cache['hits']} hits, {cache['misses']} misses",
        f"  published {status['publishes']} times, {status['conflicts']} conflicts",
    ]
    lines += [
        f"  sending   {each['name']}  {human_bytes(each['bytes'])}  {each['stage']}"
        f"  {each['shares_placed']}/{each['shares_total']} shares"
        for each in status["uploads"]
    ]
    lines += [f"  error     {each['path']}: {each['message']}" for each in status["errors"]]
    return "\n".join(lines)
