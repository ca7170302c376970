"""File nodes of immutable files: literal ones (in their cap) and CHK ones (on the grid).

Both offer a snapshot, which is what caches and readers work with: ciphertext by segment and its decryption.
A literal has no ciphertext; its one segment is its data.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio
from attrs import field, frozen

from grid.crypto import aes_ctr
from grid.errors import GridError
from grid.formats import hashutil
from grid.formats.caps import CHKReadCap, CHKVerifyCap, LiteralCap
from grid.formats.segments import div_ceil
from grid.interfaces import IDownloadTarget, IReadableSnapshot, IStorageBroker
from grid.operations.check import check_immutable
from grid.operations.check_results import CheckResults
from grid.operations.download import ImmutableDownload
from grid.operations.worker import run_cpu_work

CACHE_TAG: Final = b"tahoefs_immutable_cache_v1"
SEGMENTS_AT_ONCE: Final = 3  # fetched side by side while as many before them are handed on


@frozen
class LiteralSnapshot:
    """IReadableSnapshot of a literal: one segment, nothing to decrypt."""

    _data: bytes = field(repr=False)
    storage_index: None = None
    cache_secret: None = None
    version: bytes = b""

    @property
    def size(self) -> int:
        return len(self._data)

    async def get_segment_size(self) -> int:
        await trio.lowlevel.checkpoint()
        return max(len(self._data), 1)

    def remember_segment_size(self, segment_size: int) -> None:
        pass

    async def get_segment(self, number: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if number != 0 or not self._data:
            raise ValueError(f"no segment {number} in a literal of {len(self._data)} bytes")
        return self._data

    def decrypt(self, segment: int, offset: int, data: bytes | memoryview) -> bytes:
        return bytes(data)


def cache_secret_of(cap: CHKReadCap) -> bytes:
    """ImmutableSnapshot.cache_secret."""
    return hashutil.tagged_hash(CACHE_TAG, cap.key)


class ImmutableSnapshot:
    """IReadableSnapshot of a CHK file: it never changes, so there is one for all readers."""

    version: Final = b""

    def __init__(self, cap: CHKReadCap, broker: IStorageBroker) -> None:
        self._cap = cap
        self._download = ImmutableDownload(broker, cap)
        self._segment_size: int | None = None

    @property
    def storage_index(self) -> bytes:
        return self._cap.storage_index

    @property
    def cache_secret(self) -> bytes:
        return cache_secret_of(self._cap)

    @property
    def size(self) -> int:
        return self._cap.size

    def remember_segment_size(self, segment_size: int) -> None:
        """For a cache that kept it with segments that were verified: they can be decrypted without the grid."""
        if self._segment_size is None:
            self._segment_size = segment_size

    async def get_segment_size(self) -> int:
        if self._segment_size is None:
            self._segment_size = await self._download.get_segment_size()
        return self._segment_size

    async def get_segment(self, number: int) -> bytes:
        segment = await self._download.get_segment(number)
        # A remembered size gives way to the one that was proven just now.
        self._segment_size = self._download.file.segmentation.segment_size
        return segment

    def decrypt(self, segment: int, offset: int, data: bytes | memoryview) -> bytes:
        """The segment size must be known: by get_segment_size(), get_segment() or remember_segment_size()."""
        if self._segment_size is None:
            raise ValueError("the segment size is not known yet")
        return aes_ctr(self._cap.key, data, segment * self._segment_size + offset)


class _ImmutableNode:
    """What both kinds answer alike."""

    cap: LiteralCap | CHKReadCap

    def get_uri(self) -> str:
        return str(self.cap)

    def get_readonly_uri(self) -> str:
        return str(self.cap)

    def is_readonly(self) -> bool:
        return True

    def is_mutable(self) -> bool:
        return False

    def get_size(self) -> int:
        return self.cap.size

    async def open_snapshot(self) -> IReadableSnapshot:
        raise NotImplementedError

    async def download(self, target: IDownloadTarget) -> Any:
        """All of the file to `target`, which is told of failures, too. Returns what target.finish() does."""
        target.open(self.get_size())
        with trio.CancelScope() as scope:
            target.register_canceller(scope.cancel)
            try:
                await read_whole(await self.open_snapshot(), target.write)
            except GridError as error:
                target.fail(error)
                raise
            target.close()
        return None if scope.cancelled_caught else target.finish()

    async def download_to_data(self) -> bytes:
        pieces: list[bytes] = []

        async def keep(piece: bytes) -> None:
            pieces.append(piece)

        await read_whole(await self.open_snapshot(), keep)
        return b"".join(pieces)


class LiteralFileNode(_ImmutableNode):
    """IFileNode of a file that is in its cap. Never touches the network."""

    def __init__(self, cap: LiteralCap) -> None:
        self.cap: LiteralCap = cap

    def get_verifier(self) -> None:
        return None

    def get_storage_index(self) -> None:
        return None

    async def check(self) -> CheckResults:
        """As IChecker.check: always well."""
        await trio.lowlevel.checkpoint()
        return CheckResults()

    async def open_snapshot(self) -> LiteralSnapshot:
        await trio.lowlevel.checkpoint()
        return LiteralSnapshot(self.cap.data)


class ImmutableFileNode(_ImmutableNode):
    """IFileNode of a CHK file. Share one object per file: it remembers where the shares are."""

    def __init__(self, cap: CHKReadCap, broker: IStorageBroker) -> None:
        self.cap: CHKReadCap = cap
        self._broker = broker
        self._snapshot: ImmutableSnapshot | None = None

    def get_verifier(self) -> CHKVerifyCap:
        return self.cap.verifier

    def get_storage_index(self) -> bytes:
        return self.cap.storage_index

    async def check(self) -> CheckResults:
        """As IChecker.check."""
        return await check_immutable(self._broker, self.cap.verifier)

    async def open_snapshot(self) -> ImmutableSnapshot:
        """Asks nobody: what a snapshot needs from the grid it fetches when it is used. Raises FormatError (cap)."""
        await trio.lowlevel.checkpoint()
        if self._snapshot is None:
            self._snapshot = ImmutableSnapshot(self.cap, self._broker)
        return self._snapshot


async def read_whole(snapshot: IReadableSnapshot, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Hand the plaintext to `write`, in order, in pieces of a segment. Raises what get_segment() raises."""
    if not snapshot.size:
        return
    count = div_ceil(snapshot.size, await snapshot.get_segment_size())
    failure: GridError | None = None

    async def fetch(number: int, batch: dict[int, bytes]) -> None:
        nonlocal failure
        try:
            batch[number] = await snapshot.get_segment(number)
        except GridError as error:
            failure = error  # raised below: out of a nursery it would come in a group
            nursery.cancel_scope.cancel()

    async def fetch_all(send: trio.MemorySendChannel[dict[int, bytes]]) -> None:
        async with send:
            for first in range(0, count, SEGMENTS_AT_ONCE):
                batch: dict[int, bytes] = {}
                async with trio.open_nursery() as fetches:
                    for number in range(first, min(first + SEGMENTS_AT_ONCE, count)):
                        fetches.start_soon(fetch, number, batch)
                await send.send(batch)

    async with trio.open_nursery() as nursery:
        send, receive = trio.open_memory_channel[dict[int, bytes]](0)
        nursery.start_soon(fetch_all, send)
        async with receive:
            async for batch in receive:
                for number in sorted(batch):
                    data = batch[number]
                    await write(await run_cpu_work(partial(snapshot.decrypt, number, 0, data), len(data)))
    if failure is not None:
        raise failure
