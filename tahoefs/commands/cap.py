"""`tahoefs cap WHAT`, `tahoefs cap --of FILE [--shares K/H/N] [--segment-size BYTES] [--convergence BASE32]`"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click

from tahoefs.cli import UserError, node_dir_option
from tahoefs.what import WhatError, resolve_what


@click.command("cap", short_help="what a cap is; which cap a local file has")
@click.argument("what", required=False)
@click.option("--of", "file", type=click.Path(path_type=Path, dir_okay=False), help="A local file: print its cap.")
@click.option("--shares", metavar="K/H/N", help="With --of: another encoding than the node directory's.")
@click.option("--segment-size", type=click.IntRange(min=1), metavar="BYTES", help="With --of: largest segment.")
@click.option("--convergence", metavar="BASE32", help="With --of: another convergence secret; '' for none.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@node_dir_option
def command(
    what: str | None,
    file: Path | None,
    shares: str | None,
    segment_size: int | None,
    convergence: str | None,
    as_json: bool,
    node_dir: Path,
) -> None:
    """Show what the cap WHAT is, with its read-only and verify caps.

    With --of: the cap that FILE has on this grid, computed without sending a byte.
    """
    if (what is None) == (file is None):
        raise click.UsageError("give either WHAT or --of FILE")
    if what is not None:
        if shares or segment_size or convergence is not None:
            raise click.UsageError("--shares, --segment-size and --convergence go with --of")
        _show(_describe(what, node_dir), as_json)
        return
    assert file is not None
    cap = _cap_of(file, shares, segment_size, convergence, node_dir)
    click.echo(json.dumps({"cap": cap}) if as_json else cap)


def _describe(what: str, node_dir: Path) -> dict[str, Any]:
    from grid import parse_known_cap

    try:
        target = resolve_what(what, node_dir)
    except WhatError as error:
        raise UserError(str(error), 2) from None
    if target.path:
        raise UserError("give a cap or an alias without a path: a path needs the grid ('getfattr' tells in a mount)", 2)
    cap = parse_known_cap(target.cap)
    from grid.formats.base32 import b2a

    return {
        "kind": cap.kind,
        "directory": cap.is_directory,
        "mutable": cap.is_mutable,
        "writeable": not cap.is_readonly,
        "size": cap.size,
        "storage_index": b2a(cap.storage_index) if cap.storage_index is not None else None,
        "cap": str(cap),
        "readonly_cap": str(cap.readonly),
        "verify_cap": str(cap.verifier) if cap.verifier is not None else None,
    }


def _show(description: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(description, indent=2))
        return
    for name, value in description.items():
        shown = {"True": "yes", "False": "no", "None": "-"}.get(str(value), value)
        click.echo(f"{name.replace('_', ' '):>14}: {shown}")


def _cap_of(file: Path, shares: str | None, segment_size: int | None, convergence: str | None, node_dir: Path) -> str:
    import trio

    import grid
    from grid.formats.base32 import a2b

    if shares is not None and convergence is not None:
        k, happy, n = parse_shares(shares)
        secret = a2b(convergence)
    else:
        node = grid.NodeDirectory.open(node_dir)
        k, happy, n = parse_shares(shares) if shares is not None else node.encoding
        secret = a2b(convergence) if convergence is not None else node.convergence

    async def compute() -> str:
        uploadable = grid.FileUploadable(file, convergence=secret)
        defaults = {"k": k, "happy": happy, "n": n}
        if segment_size is not None:
            defaults["max_segment_size"] = segment_size
        uploadable.set_default_encoding_parameters(defaults)
        try:
            return str(await grid.chk_cap_of(uploadable))
        finally:
            await uploadable.close()

    try:
        return trio.run(compute)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def parse_shares(text: str) -> tuple[int, int, int]:
    """`K/H/N` to numbers. Raises UsageError."""
    match = re.fullmatch(r"([0-9]{1,3})/([0-9]{1,3})/([0-9]{1,3})", text)
    numbers = tuple(map(int, match.groups())) if match else (0, 0, 0)
    k, happy, n = numbers
    if not 1 <= k <= happy <= n <= 256:
        raise click.UsageError(f"--shares {text!r}: expected K/H/N with 1 <= K <= H <= N <= 256, as 3/7/10")
    return k, happy, n
