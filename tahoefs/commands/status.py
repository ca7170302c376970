"""`tahoefs status [MOUNTPOINT] [--json] [--watch]`"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from tahoefs.cli import UserError
from tahoefs.control_client import ControlError, ask
from tahoefs.progress import human_age, human_bytes, in_words, pinned_in_words, printable
from tahoefs.registry import all_sockets, find_mount

ANSWER_TIMEOUT_S: Final = 10.0
WATCH_INTERVAL_S: Final = 1.0
NAME_CHARS_MAX: Final = 40
HOME: Final = "\x1b[H"  # of a terminal: to the upper left corner; clear the rest of the line; of the screen
CLEAR_LINE, CLEAR_BELOW = "\x1b[K", "\x1b[J"


@click.command("status", short_help="what a mount is doing")
@click.argument("mountpoint", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --watch one a line.")
@click.option("--watch", is_flag=True, help="Again each second, until Ctrl-C.")
def command(mountpoint: Path | None, as_json: bool, watch: bool) -> None:
    """What the mount at, or around, MOUNTPOINT is doing; without MOUNTPOINT, all mounts of this user."""
    if not watch:
        found = _ask(mountpoint)
        click.echo(json.dumps(found, indent=2) if as_json else _text(found))
        return
    on_screen = sys.stdout.isatty() and not as_json
    try:
        while True:
            found = _ask(mountpoint)
            if as_json:
                click.echo(json.dumps(found))
            elif on_screen:
                lines = [f"{line}{CLEAR_LINE}\n" for line in (time.strftime("%X"), "", *_text(found).splitlines())]
                click.echo(HOME + "".join(lines) + CLEAR_BELOW, nl=False)
            else:
                click.echo(f"{time.strftime('%X')}\n{_text(found)}\n")
            time.sleep(WATCH_INTERVAL_S)
    except KeyboardInterrupt:
        return


def _ask(mountpoint: Path | None) -> dict[str, Any]:
    """The object that --json shows: of one mount, or {"mounts": […]}."""
    if mountpoint is not None:
        found = find_mount(mountpoint)
        if found is None:
            raise UserError(f"{mountpoint}: not in a tahoefs mount of yours")
        one: dict[str, Any] = ask(found.socket, {"command": "status"}, timeout_s=ANSWER_TIMEOUT_S)
        return one
    mounts = []
    for socket in all_sockets():
        try:
            mounts.append(ask(socket, {"command": "status"}, timeout_s=ANSWER_TIMEOUT_S))
        except ControlError:
            continue  # a daemon that was killed leaves its socket behind
    return {"mounts": mounts}


def _text(found: dict[str, Any]) -> str:
    if "mounts" in found:
        return "\n\n".join(map(_text, found["mounts"])) or "nothing is mounted"
    servers, cache, journal = found["servers"], found["cache"], found["journal"]
    state = found["state"] + (", read-only" if found["readonly"] else "")
    rate = found.get("throughput", {}).get("pushed_bytes_per_s")  # a daemon may be older than this command
    lines = [
        f"{found['source']} on {found['mountpoint']} ({state})",
        f"  servers   {servers['connected']} connected of {servers['known']} known",
        f"  unsent    {in_words(found['pending'])}" + (f", at {human_bytes(rate)}/s" if rate else ""),
        f"  journal   {human_bytes(journal['bytes'])} of {human_bytes(journal['limit'])}",
        f"  cache     {human_bytes(cache['bytes'])} of {human_bytes(cache['limit'])},"
        f" {cache['hits']} hits, {cache['misses']} misses",
        f"  published {found['publishes']} times, {found['conflicts']} conflicts",
    ]
    leases = found.get("leases")
    if leases is not None and leases["oldest_s"] is not None:
        walking = ", being renewed" if leases["walking"] else ""
        lines.append(f"  leases    oldest {human_age(leases['oldest_s'])}{walking}")
    if helper := found.get("helper"):
        lines.insert(2, f"  helper    {'connected' if helper['connected'] else 'not connected, uploads go without it'}")
    lines += [f"  pinned    {printable(pin['path'])}  {pinned_in_words(pin)}" for pin in found.get("pinned", [])]
    lines += [_upload(upload) for upload in found["uploads"]]
    if (more := found["pending"]["files"] - len(found["uploads"])) > 0:
        lines.append(f"  sending   … and {more} more")
    for error in found["errors"]:
        when = time.strftime("%X", time.localtime(error["when"]))
        lines.append(f"  error     {when} {printable(error['path'])}: {printable(error['message'])}")
    return "\n".join(lines)


def _upload(upload: dict[str, Any]) -> str:
    name, stage = printable(upload["name"]), upload["stage"]
    if len(name) > NAME_CHARS_MAX:
        name = f"{name[: NAME_CHARS_MAX - 1]}…"
    if stage == "pushing" and upload["shares_total"]:
        sent = 1 - upload["unsent_bytes"] / max(upload["bytes"], 1)
        stage = f"pushing {upload['shares_placed']} of {upload['shares_total']} shares, {sent:.0%}"
    return f"  sending   {name}  {human_bytes(upload['bytes'])}  {stage}"
