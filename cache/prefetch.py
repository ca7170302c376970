"""Fetches small files into the block cache before anybody opens them, on a hint that somebody will.

A hint costs nothing to drop: those beyond QUEUE_MAX are, and a fetch that fails is forgotten, since whoever wants the
file will ask again and be told why. What a reader asks for meanwhile joins the fetch under way (`cache/blocks.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Final

import trio

from cache.blocks import BlockCache
from cache.snapshots import SnapshotContents
from grid.errors import GridError
from grid.formats.caps import Cap, CHKReadCap

log = logging.getLogger(__name__)

FILE_BYTES_MAX: Final = 256 << 10  # larger files have read-ahead of their own, once they are read
AT_ONCE: Final = 6
QUEUE_MAX: Final = 32
FETCH_TIMEOUT_S: Final = 30.0


def is_small(cap: Cap | None) -> bool:
    """Is this an immutable file on the grid that may be fetched on a mere hint?"""
    return isinstance(cap, CHKReadCap) and 0 < cap.size <= FILE_BYTES_MAX


class Prefetcher:
    """All tasks live in the nursery given; no locks, as the queue changes between awaits only."""

    def __init__(self, nursery: trio.Nursery, client: Any, blocks: BlockCache) -> None:
        self._nursery = nursery
        self._client = client
        self._blocks = blocks
        self._queue: dict[Cap, None] = {}
        self._running = 0

    def want(self, caps: Iterable[Cap]) -> None:
        """Fetch these, nearest first."""
        for cap in caps:
            if is_small(cap) and len(self._queue) < QUEUE_MAX:
                self._queue.setdefault(cap)
        while self._queue and self._running < AT_ONCE:
            self._running += 1
            self._nursery.start_soon(self._work)

    async def _work(self) -> None:
        try:
            while self._queue:
                cap = next(iter(self._queue))
                del self._queue[cap]
                await self._fetch(cap)
        finally:
            self._running -= 1

    async def _fetch(self, cap: Cap) -> None:
        try:
            with trio.move_on_after(FETCH_TIMEOUT_S):
                snapshot = await self._client.create_node_from_uri(cap).open_snapshot()
                await SnapshotContents(cap, snapshot, self._blocks).warm()
        except GridError as error:
            log.debug("a file was not prefetched: %s", error)
        except Exception:
            log.exception("prefetching failed in an unforeseen way")
