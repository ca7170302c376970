"""The block store as the event loop sees it: reads in worker threads, writes later and in batches.

What is to be kept waits in a queue and is read from there meanwhile. When the disk is slower than the grid the queue
is full and blocks are left out: they are a cache. What is queued when the mount ends is still written, for a moment.

What is pinned (`cache/pin_store.py`) is looked for first, and is written where it is.

No locks: the queue is changed between awaits only. One task, `run`, writes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, Self

import trio
from attrs import frozen

from cache import pin_store
from cache.block_packs import Record
from cache.block_store import BlockStore
from cache.pin_store import Item, PinStore

log = logging.getLogger(__name__)

LIMIT_BYTES_MIN: Final = 4 << 20  # a cache that may have less is in memory only
QUEUE_BYTES_MAX: Final = 32 << 20  # waiting to be written; more is left out
BATCH_BYTES: Final = 4 << 20  # written in one hop to a thread
READS_AT_ONCE: Final = 8
FLUSH_TIMEOUT_S: Final = 5.0  # for writing what is queued when the mount ends


@frozen
class BlockName:
    """What a block is kept under. `secret` follows from the file's read key, `key` from that and what it is."""

    key: bytes
    secret: bytes

    @classmethod
    def of(cls, secret: bytes, version: bytes, number: int) -> BlockName:
        """`version`: empty for immutable files. `number`: of the segment, or one of those set aside above 2^63."""
        digest = hashlib.sha256(secret + bytes([len(version)]) + version + number.to_bytes(8, "big"))
        return cls(digest.digest(), secret)


class DiskTier:
    def __init__(self, store: BlockStore, pins: PinStore) -> None:
        self.pins = pins
        self._store = store
        self._claimed: set[BlockName] = set()
        self._queue: dict[BlockName, Record] = {}
        self._queued_bytes = 0
        self._pinned_bytes = pins.used_bytes()
        self._waiting = trio.Event()
        self._written = trio.Event()
        self._readers = trio.CapacityLimiter(READS_AT_ONCE)

    @classmethod
    def open(cls, cache_dir: Path, limit_bytes: int) -> Self:
        """What is in `cache_dir`, and what comes there. Blocks. Raises OSError."""
        pinned = cache_dir / pin_store.FORMAT
        store = BlockStore.open(cache_dir, limit_bytes, partial(pin_store.disk_bytes, pinned))
        return cls(store, PinStore(pinned, store))

    @property
    def used_bytes(self) -> int:
        return self._store.used_bytes + self._pinned_bytes

    @property
    def limit_bytes(self) -> int:
        return self._store.limit_bytes

    def close(self) -> None:
        """When nobody reads or writes any more."""
        self.pins.close()
        self._store.close()

    async def get(self, *names: BlockName) -> Record | None:
        """The first of them that is here."""
        for name in names:
            if (record := self._queue.get(name)) is not None:
                return record
        return await trio.to_thread.run_sync(self._get, names, limiter=self._readers)

    def _get(self, names: tuple[BlockName, ...]) -> Record | None:
        for name in names:
            record = self.pins.get(name.key, name.secret) or self._store.get(name.key, name.secret)
            if record is not None:
                return record
        return None

    def has(self, name: BlockName) -> bool:
        """Is it on the disk? Blocks, and may be called from any thread; so does `read_into`."""
        return self.pins.has(name.key) or self._store.has(name.key)

    def read_into(self, name: BlockName, buffer: memoryview) -> Record | None:
        """What is on the disk, at the front of `buffer`; None when there is nothing, or it does not fit."""
        return self.pins.get(name.key, name.secret, buffer) or self._store.get(name.key, name.secret, buffer)

    def put(self, name: BlockName, segment_size: int, payload: bytes | memoryview) -> bool:
        """Keep it, soon. False: too much waits to be written."""
        size = len(payload)
        if name in self._claimed:
            return True
        if self._queued_bytes + size > QUEUE_BYTES_MAX or size > self._store.record_bytes_max:
            return False
        if (replaced := self._queue.pop(name, None)) is not None:
            self._queued_bytes -= len(replaced.payload)
        self._queue[name] = Record(segment_size, memoryview(payload))
        self._queued_bytes += size
        self._waiting.set()
        return True

    async def room(self, size: int) -> None:
        """Return once `size` bytes more fit in the queue. For what must not be left out; needs `run`."""
        while self._queued_bytes and self._queued_bytes + size > QUEUE_BYTES_MAX:
            await self._written.wait()
        await trio.lowlevel.checkpoint()

    @contextmanager
    def claimed(self, name: BlockName) -> Iterator[None]:
        """Whoever puts it meanwhile need not: it is going to be pinned."""
        self._claimed.add(name)
        try:
            yield
        finally:
            self._claimed.discard(name)

    async def pin(self, owner: str, epoch: int, records: dict[BlockName, Record]) -> None:
        """As PinStore.put. Not interrupted."""
        items = [Item(name.key, name.secret, each.segment_size, each.payload) for name, each in records.items()]

        def put() -> int:
            self.pins.put(owner, epoch, items)
            return self.pins.used_bytes()

        with trio.CancelScope(shield=True):
            self._pinned_bytes = await trio.to_thread.run_sync(put)
        for name, record in records.items():
            if (queued := self._queue.get(name)) is not None and queued.payload is record.payload:
                del self._queue[name]
                self._queued_bytes -= len(queued.payload)
        self._tell_written()

    async def sweep(self, owner: str, epoch: int) -> None:
        """As PinStore.sweep. Not interrupted."""

        def sweep() -> int:
            self.pins.sweep(owner, epoch)
            return self.pins.used_bytes()

        with trio.CancelScope(shield=True):
            self._pinned_bytes = await trio.to_thread.run_sync(sweep)

    async def written(self, name: BlockName) -> None:
        """Return when what is queued under this name is written; needs `run`."""
        while name in self._queue:
            await self._written.wait()

    async def run(self) -> None:
        """Write what is queued, until cancelled."""
        try:
            while True:
                await self._waiting.wait()
                self._waiting = trio.Event()
                await self._write_all()
        finally:
            with trio.move_on_after(FLUSH_TIMEOUT_S, shield=True):
                await self._write_all()

    async def _write_all(self) -> None:
        while self._queue:
            batch, size = [], 0
            for item in self._queue.items():
                batch.append(item)
                size += len(item[1].payload)
                if size >= BATCH_BYTES:
                    break
            await trio.to_thread.run_sync(self._write, batch)
            for name, record in batch:
                if self._queue.get(name) is record:  # else a newer one took its place meanwhile
                    del self._queue[name]
                    self._queued_bytes -= len(record.payload)
            self._tell_written()

    def _tell_written(self) -> None:
        self._written.set()
        self._written = trio.Event()

    def _write(self, batch: list[tuple[BlockName, Record]]) -> None:
        for name, record in batch:
            if not self._replace_pinned(Item(name.key, name.secret, record.segment_size, record.payload)):
                self._store.put(name.key, name.secret, record.segment_size, record.payload)

    def _replace_pinned(self, item: Item) -> bool:
        try:
            return self.pins.replace(item)
        except OSError as error:
            log.warning("what is pinned could not be brought up to date: %s", error)
            return False


@asynccontextmanager
async def open_disk(cache_dir: Path, limit_bytes: int) -> AsyncIterator[DiskTier | None]:
    """The block store under `cache_dir`. None, and a line in the log, when there can be none: all works without."""
    disk: DiskTier | None = None
    try:
        if limit_bytes >= LIMIT_BYTES_MIN:
            disk = await trio.to_thread.run_sync(DiskTier.open, cache_dir, limit_bytes)
    except OSError as error:
        log.warning("there is no block cache on disk: %s", error)
    if disk is None:
        yield None
        return
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.run)
            try:
                yield disk
            except trio.Cancelled:
                raise
            except BaseException as error:  # noqa: BLE001  raised again below, not in a group
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        disk.close()
    if failure is not None:
        raise failure
