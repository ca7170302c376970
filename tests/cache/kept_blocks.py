"""Blocks by number, to be put into a block store and known again. Run as a program it puts and reads them for ever.

python -m tests.cache.kept_blocks CACHE_DIR NUMBER      says `go` when it begins, with that number
"""

from __future__ import annotations

import hashlib
import random
import sys
from pathlib import Path

from cache.block_store import BlockStore

SECRET = bytes(range(32))
LIMIT = 4 << 20
NUMBERS = 400


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def block(number: int, size: int | None = None) -> bytes:
    """What is stored under key(number), always."""
    source = random.Random(number)
    return source.randbytes(source.randrange(1, 40_000) if size is None else size)


def put(store: BlockStore, number: int, size: int | None = None) -> bool:
    return store.put(key(number), SECRET, 1000 + number, block(number, size))


def is_right(store: BlockStore, number: int, size: int | None = None) -> bool:
    """Whether it is there. Fails when something else is."""
    record = store.get(key(number), SECRET)
    if record is None:
        return False
    assert (record.segment_size, bytes(record.payload)) == (1000 + number, block(number, size))
    return True


def main(cache_dir: Path, number: int) -> None:
    store = BlockStore.open(cache_dir, LIMIT)
    print("go", flush=True)
    while True:
        put(store, number % NUMBERS)
        is_right(store, number * 7 % NUMBERS)
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
