"""Pins blocks by number, for ever, and says which is pinned: to be killed meanwhile.

python -m tests.cache.pinned_blocks CACHE_DIR FIRST
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from cache.disk_tier import DiskTier
from cache.pin_store import Item
from tests.cache.kept_blocks import LIMIT, SECRET, block, key

SIZE = 30_000
CHANGING = key(-1)


def main(cache_dir: Path, first: int) -> None:
    pins = DiskTier.open(cache_dir, 16 * LIMIT).pins
    for number in itertools.count(first):
        pins.put("one", 1, [Item(key(number), SECRET, 1000 + number, block(number, SIZE))])
        print(number, flush=True)
        if number % 5 == 4:  # superseded ones make garbage, which a sweep has to move things out of
            for seed in range(4):
                pins.put("one", 1, [Item(CHANGING, SECRET, 1, block(seed, SIZE))])
            pins.sweep("one", 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
