"""`tahoefs speed-test [--count N] [--size SIZE] [--mutable create|upload] [--json]`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import asdict

from tahoefs.cli import node_dir_option
from tahoefs.options import parse_size
from tahoefs.progress import human_bytes

if TYPE_CHECKING:
    from grid.measure import Kind, Speed

LEASE_DAYS: Final = 31


@click.command("speed-test", short_help="how fast files go to the grid and back")
@click.option("--count", type=click.IntRange(1, 1000), default=3, show_default=True, help="Files.")
@click.option("--size", default="1M", show_default=True, metavar="SIZE", help="Of each, such as 64K or 10M.")
@click.option(
    "--mutable",
    type=click.Choice(["create", "upload"]),
    help="Mutable files instead, made with their contents, or made empty and then written.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@node_dir_option
def command(count: int, size: str, mutable: str | None, as_json: bool, node_dir: Path) -> None:
    """Store files of random bytes one after the other, read them back, and show how long it took.

    Mutable files are deleted again. Immutable ones cannot be: their shares stay until their leases are over.
    """
    import trio

    from grid import NodeDirectory
    from grid.measure import FILE_BYTES_MAX

    try:
        size_bytes = parse_size(size)
    except ValueError as error:
        raise click.UsageError(f"--size {size}: {error}") from None
    if not 1 <= size_bytes <= FILE_BYTES_MAX:
        raise click.UsageError(f"--size {size}: 1 byte to {human_bytes(FILE_BYTES_MAX)}")
    kind: Any = mutable or "immutable"
    speed: Speed = trio.run(_test, NodeDirectory.open(node_dir), count, size_bytes, kind)
    if as_json:
        rates = {name: getattr(speed, name) for name in ("upload_bytes_per_s", "download_bytes_per_s")}
        click.echo(json.dumps(asdict(speed) | rates, indent=2))
        return
    click.echo(f"{speed.count} {kind} files of {human_bytes(speed.size)}")
    for name, seconds, rate in (
        ("upload", speed.upload_s, speed.upload_bytes_per_s),
        ("download", speed.download_s, speed.download_bytes_per_s),
    ):
        click.echo(f"  {name:9} {seconds:8.2f} s  {human_bytes(rate)}/s  {seconds / speed.count:.3f} s a file")
    if mutable is None:
        click.echo(f"  what was stored stays until its leases are over, in {LEASE_DAYS} days")
    else:
        click.echo(f"  {speed.deleted} of {speed.count} were deleted again")


async def _test(node: Any, count: int, size: int, kind: Kind) -> Speed:
    from grid import join_grid
    from grid.measure import speed_test

    async with join_grid(node) as client:
        await client.need_servers(node.encoding.happy)
        return await speed_test(client, count=count, size=size, kind=kind)
