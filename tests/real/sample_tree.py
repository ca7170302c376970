"""The tree that both directions of the interoperation tests move: every size where something changes."""

from __future__ import annotations

import random
from pathlib import Path

SEGMENT = 1 << 20  # the immutable segment size before it is rounded up to a multiple of k
ENTRIES = 500


def content(size: int, seed: int) -> bytes:
    """Bytes that do not compress or repeat; the same for the same arguments."""
    return random.Random(seed).randbytes(size)


def sample_files() -> dict[str, bytes]:
    """{path: content}: literals, the smallest CHK, one segment exactly and one byte less and more, a ragged tail."""
    sizes = {
        "empty": 0,
        "literal": 1,
        "largest-literal": 55,
        "smallest-chk": 56,
        "segment-minus-one": SEGMENT + 1,
        "segment": SEGMENT + 2,  # 1,048,578: the least multiple of 3 that holds 1 MiB
        "segment-plus-one": SEGMENT + 3,
        "ragged": 10 * SEGMENT + 12_345,
        "nested/deeper/file": 4_000,
        "größe-数-🙂.txt": 300,
        "n" * 255: 70,
        "ü" * 127 + "x": 80,  # 255 bytes in UTF-8
        "with space & % # ? : chars": 90,
    }
    return {name: content(size, seed) for seed, (name, size) in enumerate(sizes.items())}


def many_files() -> dict[str, bytes]:
    """Small files for a directory of 500 entries: mostly literals, so that making them is quick."""
    return {f"entry-{number:03}": content(40 if number % 25 else 100, 1000 + number) for number in range(ENTRIES)}


def write_tree(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
