"""`tahoefs check WHAT [--verify] [--repair] [--add-lease] [--deep [--resume]] [--json]`, `… check --history WHAT`"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from tahoefs.cli import UserError, node_dir_option
from tahoefs.errnos import EXIT_DAMAGED, EXIT_FAILED, EXIT_UNREACHABLE
from tahoefs.progress import Progress

if TYPE_CHECKING:
    from grid import GridClient
    from grid.operations.check_results import CheckResults
    from tahoefs.deep_check import Json, Wish
    from tahoefs.on_grid import Found

EXIT_INTERRUPTED: Final = 130


@click.command("check", short_help="is it all there, and right? repairs it, renews leases")
@click.argument("what")
@click.option("--verify", is_flag=True, help="Read and prove every byte of every share.")
@click.option("--repair", is_flag=True, help="Make missing shares again; with a mutable WHAT it takes the write cap.")
@click.option("--add-lease", is_flag=True, help="Renew the lease on every share.")
@click.option("--deep", is_flag=True, help="Everything that can be reached from WHAT, too.")
@click.option("--resume", is_flag=True, help="With --deep: go on with one that was interrupted.")
@click.option("--history", "show_history", is_flag=True, help="What earlier checks found; asks no server.")
@click.option("--json", "as_json", is_flag=True, help="As Tahoe's web API has it; with --deep one object a line.")
@node_dir_option
def command(
    what: str,
    verify: bool,
    repair: bool,
    add_lease: bool,
    deep: bool,
    resume: bool,
    show_history: bool,
    as_json: bool,
    node_dir: Path,
) -> int:
    """How healthy is WHAT? Any cap will do, a verify cap too.

    Exit code 0: healthy; 1: not, but it can be recovered; 5: it cannot; 3: too few servers answered to tell.
    """
    import trio

    if resume and not deep:
        raise click.UsageError("--resume goes with --deep")
    if show_history:
        if verify or repair or add_lease or deep:
            raise click.UsageError("--history shows what was found before, and does nothing else")
        return _history(what, node_dir, as_json)

    from tahoefs.deep_check import Wish

    wish = Wish(verify, repair, add_lease)
    return (
        trio.run(_deep, what, node_dir, wish, resume, as_json)
        if deep
        else trio.run(_one, what, node_dir, wish, as_json)
    )


def exit_code(client: GridClient, *, healthy: bool, recoverable: bool) -> int:
    """What cannot be recovered while servers are missing may be so another time."""
    from tahoefs.on_grid import missing_servers

    if healthy:
        return 0
    if recoverable:
        return EXIT_FAILED
    return EXIT_UNREACHABLE if missing_servers(client) else EXIT_DAMAGED


# --- one object


async def _one(what: str, node_dir: Path, wish: Wish, as_json: bool) -> int:
    from grid.check_history import CheckHistory
    from tahoefs.deep_check import look_after
    from tahoefs.on_grid import on_grid

    async with on_grid(what, node_dir) as found:
        with CheckHistory(found.client.node.path) as history:
            outcome = await look_after(found.client.checker(history), found.cap, wish)
        results = outcome.results
        if as_json:
            click.echo(json.dumps(outcome.json, indent=1))
        else:
            _show(results, found)
            if outcome.note:
                click.echo(f" repair: {outcome.note}")
            if wish.add_lease and results.checkable:
                renewed, failed = outcome.leases
                click.echo(f" leases: renewed on {renewed} servers" + (f", failed on {failed}" if failed else ""))
        return exit_code(found.client, healthy=results.healthy, recoverable=results.recoverable)


def _show(results: CheckResults, found: Found) -> None:
    """As `tahoe check` does, and a little more."""
    from grid.formats.base32 import b2a
    from grid.operations.check_results import short_server
    from tahoefs.on_grid import missing_servers

    click.echo(f"Summary: {results.summary}{'' if results.checkable else ' (LIT)'}")
    if results.storage_index is None:
        return
    click.echo(f" storage index: {b2a(results.storage_index)}")
    encoding = f"encoding is {results.needed_shares}-of-{results.total_shares}"
    click.echo(f" good-shares: {len(results.good)} ({encoding}), on servers of their own: {results.happiness}")
    click.echo(f" wrong-shares: {results.wrong_shares}")
    for share in (*results.corrupt, *results.invalid):
        click.echo(f" corrupt: share {share.share_number} on server {short_server(share.server_id)}: {share.reason}")
    for server_id, number in results.incompatible:
        click.echo(f" share {number} on server {short_server(server_id)} is of a kind this version does not know")
    if results.silent or missing_servers(found.client):
        click.echo(f" servers that did not answer: {len(results.silent) + missing_servers(found.client)}")


# --- everything below it


async def _deep(what: str, node_dir: Path, wish: Wish, resume: bool, as_json: bool) -> int:
    from grid.check_history import CheckHistory
    from grid.nodes.traversal import walk
    from tahoefs.deep_check import DeepCheck, root_key
    from tahoefs.on_grid import on_grid
    from tahoefs.signals import until_signal

    async with on_grid(what, node_dir) as found:
        with Progress("checking") as progress, CheckHistory(found.client.node.path) as history:

            def emit(unit: Json) -> None:
                progress.line(json.dumps(unit) if as_json else unit_line(unit))
                totals = check.totals
                progress.objects(totals.objects, f"{totals.unhealthy} unhealthy" if totals.unhealthy else "all well")

            check = DeepCheck(found.client.checker(history), history, wish, emit)
            visits = walk(found.client.nodemaker, found.cap)
            async with until_signal() as scope:
                await check.run(root_key(found.cap), visits, resume=resume)
        totals = check.totals
        if scope.cancelled_caught:
            click.echo(f"tahoefs: stopped after {totals.objects} objects; --resume goes on from there", err=True)
            return EXIT_INTERRUPTED
        if as_json:
            click.echo(json.dumps({"type": "stats", "stats": totals.stats.to_json()}))
            click.echo(json.dumps(totals.to_json()))
        else:
            click.echo(totals_line(totals.to_json(), wish))
        return exit_code(found.client, healthy=totals.healthy_all, recoverable=totals.recoverable_all)


def unit_line(unit: Json) -> str:
    """As `tahoe deep-check -v` has it."""
    repair = unit.get("check-and-repair-results")
    results = repair.get("post-repair-results", repair) if repair else unit["check-results"]
    unchecked = "of an unknown kind, not checked" if unit["type"] == "unknown" else "Healthy (LIT)"
    summary = results.get("summary", unchecked)
    extra = [unit[name] for name in ("note", "error") if name in unit]
    corrupt = results["results"].get("count-corrupt-shares", 0)
    extra += [f"{corrupt} corrupt shares"] if corrupt else []
    return f"{'/'.join(unit['path']) or '<root>'!r}: {summary}" + (f" ({'; '.join(extra)})" if extra else "")


def totals_line(totals: Json, wish: Wish) -> str:
    text = "done: {count-objects-checked} objects checked, {count-objects-healthy} healthy"
    text += ", {count-objects-unhealthy} unhealthy"
    if totals["count-objects-unrecoverable"]:
        text += ", {count-objects-unrecoverable} of them lost"
    if totals["count-directories-unread"]:
        text += ", {count-directories-unread} directories could not be read"
    if wish.repair:
        text += ", {count-repairs-successful} of {count-repairs-attempted} repairs succeeded"
    if wish.add_lease:
        text += ", {count-leases-renewed} leases renewed"
        if totals["count-leases-failed"]:
            text += " ({count-leases-failed} failed)"
    return text.format_map(totals)


# --- what was found before


def _history(what: str, node_dir: Path, as_json: bool) -> int:
    import trio

    import grid
    from grid.check_history import CheckHistory
    from tahoefs.on_grid import look_up, node_directory_of, on_grid

    async def find() -> grid.Cap:
        async with on_grid(what, node_dir) as found:
            return found.cap

    target = look_up(what, node_dir)
    cap: grid.Cap = trio.run(find) if target.path else grid.parse_known_cap(target.cap)
    directory = node_directory_of(target, node_dir)
    if not directory.is_dir():
        raise UserError(f"no node directory {directory}, so there is no history")
    with CheckHistory(directory) as history:
        known = [] if cap.storage_index is None else history.results_for(cap.storage_index)
    if as_json:
        click.echo(json.dumps([{"when": at, **results} for at, results in known], indent=1))
        return 0
    for at, results in known:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
        click.echo(f"{when}  {results.get('summary', '')}")
    if not known:
        click.echo(f"{target.label} was not checked before")
    return 0
