"""Encoder: ciphertext in, shares out to their shareholders. One nursery per file.

    segment i+1: read, encrypt, hash, erasure-code, hash blocks    in a worker thread, one hop
    segment i:   on its way to each server                         one task per share (push.py)

Memory is bounded by a few segments, whatever the file's size. Without shareholders it only computes the cap.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Self

import trio

from grid.errors import GridError, NotEnoughServersError, PeerTimeoutError
from grid.interfaces import IUploadProgress
from grid.operations.happiness import happiness
from grid.operations.push import IShareholder, SharePusher, abort_all, watch_for_stalls
from grid.operations.segment_encoder import EncodedTail, SegmentEncoder
from grid.operations.uploadables import ICiphertextSource, ISyncEncryptedReadable
from grid.operations.worker import run_cpu_work

Buffer = bytes | memoryview


class Encoder:
    """IEncoder. After start(), `pushed` tells the share numbers that were stored now, `ueb` is in every share."""

    def __init__(self) -> None:
        self.pushed: frozenset[int] = frozenset()
        self.ueb = b""
        self._pushers: list[SharePusher] = []
        self._sharemap: dict[int, set[str]] = {}

    async def set_encrypted_uploadable(self, u: ICiphertextSource) -> Self:
        self._uploadable = u
        self._params = await u.get_all_encoding_parameters()
        self._storage_index = await u.get_storage_index()
        self.segments = SegmentEncoder(await u.get_size(), self._params)
        return self

    def get_param(self, name: str) -> Any:
        params, segmentation = self._params, self.segments.segmentation
        values = {
            "storage_index": self._storage_index,
            "share_counts": (params.k, params.happy, params.n),
            "num_segments": segmentation.num_segments,
            "segment_size": segmentation.segment_size,
            "block_size": segmentation.block_size,
            "share_size": self.segments.share_size,
            "serialized_params": f"{segmentation.segment_size}-{params.k}-{params.n}".encode(),
        }
        return values[name]

    def set_shareholders(
        self,
        shareholders: Mapping[int, IShareholder],
        existing: Mapping[int, AbstractSet[str]] | None = None,
        progress: IUploadProgress | None = None,
    ) -> None:
        """`existing`: {share number: ids of servers that hold it already}; it counts for happiness."""
        self._pushers = [SharePusher(shareholders[number], progress) for number in sorted(shareholders)]
        self._sharemap = {number: set(servers) for number, servers in (existing or {}).items()}
        if progress is not None:
            placed = len(self._sharemap.keys() - shareholders.keys())
            progress.begin(placed, self._params.n, len(shareholders) * self.segments.layout.data_size)
        for number, writer in shareholders.items():
            self._sharemap.setdefault(number, set()).add(writer.server_id)

    @property
    def sharemap(self) -> dict[int, frozenset[str]]:
        """{share number: server ids} of what is, or will be, stored."""
        return {number: frozenset(servers) for number, servers in self._sharemap.items() if servers}

    @property
    def stalled_servers(self) -> set[str]:
        """Ids of servers whose shares were dropped because they did not answer."""
        return {pusher.writer.server_id for pusher in self._pushers if isinstance(pusher.failed, PeerTimeoutError)}

    async def start(self) -> tuple[bytes, int, int, int]:
        """(UEB hash, k, n, size). Raises NotEnoughServersError when happiness is lost on the way.

        On that, on any other error and on cancellation every share not yet closed is aborted.
        """
        try:
            tail = await self._push_all() if self._pushers else await self._encode_only()
        except BaseException:
            await abort_all([pusher.writer for pusher in self._pushers if not pusher.done])
            raise
        self.pushed = frozenset(pusher.writer.share_number for pusher in self._pushers if pusher.done)
        self.ueb = tail.ueb
        size = self.segments.segmentation.size
        return tail.ueb_hash, self._params.k, self._params.n, size

    async def _encode_only(self) -> EncodedTail:
        for segment in range(self.segments.segmentation.num_segments):
            await self._encode_segment(segment)
        return await self._finish_hashing()

    async def _push_all(self) -> EncodedTail:
        failure: GridError | OSError | None = None

        def on_failure(pusher: SharePusher) -> None:
            nonlocal failure
            nursery.start_soon(abort_all, [pusher.writer])
            self._sharemap[pusher.writer.share_number].discard(pusher.writer.server_id)
            reached = happiness(self._sharemap)
            if reached < self._params.happy and failure is None:
                failure = NotEnoughServersError(self._params.happy, reached, self._servers_left())
                nursery.cancel_scope.cancel()

        async def feed() -> None:
            nonlocal failure
            try:
                await self._feed()
            except (GridError, OSError) as error:  # the source's; raised below, where no nursery wraps it
                failure = error
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as watch:
            watch.start_soon(watch_for_stalls, self._pushers)
            async with trio.open_nursery() as nursery:
                for pusher in self._pushers:
                    nursery.start_soon(pusher.run, on_failure)
                nursery.start_soon(feed)
            watch.cancel_scope.cancel()
        if failure is not None:
            raise failure
        assert self._tail is not None
        return self._tail

    async def _feed(self) -> None:
        """Make segments and hand them out; the last one handed out, finish every share."""
        for segment in range(self.segments.segmentation.num_segments):
            blocks = await self._encode_segment(segment)
            for pusher in self._pushers:
                await pusher.put(segment, blocks[pusher.writer.share_number])
        self._tail = await self._finish_hashing()
        for pusher in self._pushers:
            pusher.finish(self._tail)

    async def _encode_segment(self, segment: int) -> list[Buffer]:
        length = self.segments.segmentation.segment_bytes(segment)
        source = self._uploadable
        if isinstance(source, ISyncEncryptedReadable) and source.reads_in_thread:
            read = source.read_encrypted_sync
            return await run_cpu_work(lambda: self.segments.encode(read(length)), length)
        ciphertext = await source.read_encrypted(length, hash_only=False)
        return await run_cpu_work(partial(self.segments.encode, ciphertext), length)

    async def _finish_hashing(self) -> EncodedTail:
        hashes = self.segments.segmentation.num_segments * self._params.n
        return await run_cpu_work(self.segments.finish, 1000 * hashes)  # a hash costs about what 1000 bytes do

    def _servers_left(self) -> int:
        return len(set().union(*self._sharemap.values()))
