"""`tahoefs manifest WHAT [--json | --verify-caps | --stats]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from tahoefs.cli import node_dir_option, warn
from tahoefs.progress import Progress, human_bytes


@click.command("manifest", short_help="everything that can be reached from a directory")
@click.argument("what")
@click.option("--verify-caps", is_flag=True, help="Verify caps and nothing else: for somebody who is to tend all this.")
@click.option("--stats", is_flag=True, help="Counts and sizes.")
@click.option(
    "--json", "as_json", is_flag=True, help="As Tahoe's web API has it, one object a line; the last one: stats."
)
@node_dir_option
def command(what: str, verify_caps: bool, stats: bool, as_json: bool, node_dir: Path) -> int:
    """List everything that can be reached from WHAT, each object once: cap and path.

    Exit code 0, or that of the error, if a directory could not be read.
    """
    if verify_caps and (stats or as_json):
        raise click.UsageError("--verify-caps goes alone")
    import trio

    return trio.run(_manifest, what, node_dir, verify_caps, stats, as_json)


async def _manifest(what: str, node_dir: Path, verify_caps: bool, stats: bool, as_json: bool) -> int:
    from contextlib import aclosing

    from grid.nodes.deep_stats import DeepStats
    from grid.nodes.traversal import walk
    from tahoefs.errnos import exit_code_of
    from tahoefs.on_grid import on_grid

    code, done, counted = 0, 0, DeepStats()
    with Progress("listing") as progress:
        async with on_grid(what, node_dir) as found, aclosing(walk(found.client.nodemaker, found.cap)) as visits:
            async for visit in visits:
                counted.add(visit)
                done += 1
                progress.objects(done, "/".join(visit.path))
                if verify_caps:
                    if visit.cap.verifier is not None:
                        progress.line(str(visit.cap.verifier))
                elif as_json and not stats:
                    progress.line(json.dumps(_unit(visit)))
                elif not stats:
                    progress.line(f"{visit.cap} {'/'.join(visit.path)}")
                if visit.error is not None:
                    code = exit_code_of(visit.error)
                    warn(f"{'/'.join(visit.path) or found.label}: {visit.error}")
        if as_json:
            numbers = counted.to_json()
            progress.line(json.dumps(numbers if stats else {"type": "stats", "stats": numbers}))
        elif stats:
            progress.line(_text(counted.to_json()))
    return code


def _unit(visit: Any) -> dict[str, Any]:
    from tahoefs.deep_check import unit_of

    cap, verifier = visit.cap, visit.cap.verifier
    # What a repair takes: of an immutable file the verify cap, of what is mutable the write cap.
    repair = verifier if cap.kind == "chk" else cap if cap.is_mutable and not cap.is_readonly else None
    caps = {"cap": cap, "verifycap": verifier, "repaircap": repair}
    return unit_of(visit) | {name: str(value) if value is not None else "" for name, value in caps.items()}


def _text(stats: dict[str, Any]) -> str:
    """As `tahoe stats` shows them."""
    lines = ["Counts and Total Sizes:"]
    for name, value in stats.items():
        if isinstance(value, int) and name != "api-version":
            size = f"    ({human_bytes(value)})" if name.startswith(("size-", "largest-")) and value >= 1024 else ""
            lines.append(f"{name:>28}: {value}{'' if name.endswith('children') else size}")
    lines.append("Size Histogram:")
    lines += [f"{f'{low}-{high}':>28}: {count}" for low, high, count in stats["size-files-histogram"]]
    return "\n".join(lines)
