"""`tahoefs tend WHAT|FILE.vcaps [--renew] [--repair] [--verify] [--every 7d] [--json]`"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from tahoefs.cli import UserError, node_dir_option, warn
from tahoefs.commands.check import EXIT_INTERRUPTED, exit_code, totals_line, unit_line
from tahoefs.options import parse_duration
from tahoefs.progress import Progress

if TYPE_CHECKING:
    from grid import GridClient
    from grid.nodes.traversal import Visit
    from tahoefs.deep_check import Json, Wish

CAP_CHARS_MAX: Final = 1 << 16  # of a line
EVERY_S_MIN: Final = 3600.0


def _every(ctx: click.Context, parameter: click.Parameter, text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if seconds < EVERY_S_MIN:
        raise click.BadParameter("at most once an hour")
    return seconds


@click.command("tend", short_help="renew leases and repair, now and then; verify caps are enough")
@click.argument("what")
@click.option("--renew", is_flag=True, help="Renew leases.")
@click.option("--repair", is_flag=True, help="Repair what is unhealthy, as far as the cap allows.")
@click.option("--verify", is_flag=True, help="Read every byte to find out.")
@click.option("--every", metavar="TIME", callback=_every, help="Again and again, so often: 12h, 7d. Until a signal.")
@click.option("--json", "as_json", is_flag=True, help="As `check --deep --json`.")
@node_dir_option
def command(
    what: str, renew: bool, repair: bool, verify: bool, every: float | None, as_json: bool, node_dir: Path
) -> int:
    """Keep alive everything that can be reached from WHAT, or every cap in a file, one a line (`manifest --verify-caps`
    makes one). Without --renew and --repair it does both. Tells only what was not well.

    One that was interrupted goes on where it was. Exit code as of `check`.
    """
    import trio

    from tahoefs.deep_check import Wish

    wish = Wish(verify, repair or not renew, renew or not repair)
    # an alias has a colon at the end of its name
    caps_file = Path(what).absolute() if ":" not in what and Path(what).is_file() else None
    return trio.run(_tend, what, caps_file, node_dir, wish, every, as_json)


async def _tend(
    what: str, caps_file: Path | None, node_dir: Path, wish: Wish, every_s: float | None, as_json: bool
) -> int:
    import trio

    from tahoefs.signals import until_signal

    code = 0
    async with until_signal() as scope:
        while True:
            began = time.monotonic()
            code = await _once(what, caps_file, node_dir, wish, as_json)
            if every_s is None:
                break
            await trio.sleep(max(0.0, began + every_s - time.monotonic()))
    return EXIT_INTERRUPTED if scope.cancelled_caught and every_s is None else code


async def _once(what: str, caps_file: Path | None, node_dir: Path, wish: Wish, as_json: bool) -> int:
    from grid.nodes.traversal import walk
    from tahoefs.deep_check import root_key
    from tahoefs.on_grid import joined, on_grid

    if caps_file is not None:
        key = hashlib.sha256(b"caps of " + bytes(caps_file)).digest()[:16]
        async with joined(node_dir) as client:
            return await _tend_all(client, key, caps_in(caps_file), wish, as_json)
    async with on_grid(what, node_dir) as found:
        visits = walk(found.client.nodemaker, found.cap)
        return await _tend_all(found.client, root_key(found.cap), visits, wish, as_json)


async def caps_in(file: Path) -> AsyncGenerator[Visit, None]:
    """One visit for each line that holds a cap; `#` begins a comment. A path is the number of the line."""
    import trio

    import grid
    from grid.nodes.traversal import Visit

    try:
        async with await trio.open_file(file, encoding="utf-8") as lines:
            number = 0
            while line := await lines.readline(CAP_CHARS_MAX):
                number += 1
                if not (text := line.partition("#")[0].strip()):
                    continue
                cap = grid.parse_cap(text)
                if isinstance(cap, grid.UnknownCap):
                    warn(f"{file}: line {number} is no cap that this version knows")
                else:
                    yield Visit((f"line {number}",), cap, cap.size)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or 'not text'}") from None


async def _tend_all(
    client: GridClient, key: bytes, visits: AsyncGenerator[Visit, None], wish: Wish, as_json: bool
) -> int:
    from grid.check_history import CheckHistory
    from tahoefs.deep_check import DeepCheck

    with Progress("tending") as progress, CheckHistory(client.node.path) as history:

        def emit(unit: Json) -> None:
            if as_json:
                progress.line(json.dumps(unit))
            elif not _is_well(unit):
                progress.line(unit_line(unit))
            progress.objects(check.totals.objects, f"{check.totals.unhealthy} unhealthy")

        check = DeepCheck(client.checker(history), history, wish, emit)
        totals = await check.run(key, visits, resume=True)
        progress.line(json.dumps(totals.to_json()) if as_json else totals_line(totals.to_json(), wish))
    return exit_code(client, healthy=totals.healthy_all, recoverable=totals.recoverable_all)


def _is_well(unit: Json) -> bool:
    """Neither damaged now nor before, nor anything else to say."""
    repair = unit.get("check-and-repair-results", {})
    results = repair.get("pre-repair-results") or unit.get("check-results") or repair
    return "note" not in unit and "error" not in unit and results["results"]["healthy"]
