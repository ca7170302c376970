"""Pushes shares to their servers, each at its own pace.

One task per share takes blocks from its own short queue, so a slow server may lag by a few segments and then
holds the others up; one that makes no progress for too long is dropped. What is too long is judged by how
long writes to the others take, so that a slow line is not mistaken for dead servers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol

import trio

from grid.errors import PeerError, PeerTimeoutError
from grid.interfaces import IStorageBucketWriter, IUploadProgress
from grid.operations.segment_encoder import EncodedTail

log = logging.getLogger(__name__)

LAG_SEGMENTS_MAX: Final = 2  # blocks a share's queue holds: bounds memory to a few segments
PROGRESS_TIMEOUT_S: Final = 600.0  # no write to a server takes longer than this, however slow everything is
STALL_TIMEOUT_S: Final = 20.0  # nor longer than this while most others have nothing left to do …
STALL_FACTOR: Final = 3.0  # … and than this many times their slowest write
WATCH_INTERVAL_S: Final = 1.0
ABORT_TIMEOUT_S: Final = 3.0


class IShareholder(IStorageBucketWriter, Protocol):
    """A share writer that knows where it writes to and can be told to give up."""

    share_number: int
    server_id: str
    server_name: str

    async def abort(self) -> None: ...


class SharePusher:
    """One share on its way. `failed` says why it is not any more."""

    def __init__(self, writer: IShareholder, progress: IUploadProgress | None = None) -> None:
        self.writer = writer
        self._progress = progress
        self.failed: PeerError | None = None
        self.done = False
        self.busy_since: float | None = None  # trio time at which the write under way began
        self.slowest_write_s = 0.0
        self._scope = trio.CancelScope()
        self._send, self._receive = trio.open_memory_channel[tuple[int, bytes | memoryview]](LAG_SEGMENTS_MAX)
        self._tail: EncodedTail | None = None

    @property
    def live(self) -> bool:
        return self.failed is None

    async def put(self, segment: int, block: bytes | memoryview) -> None:
        """Queue a block; waits while the queue is full. Nothing happens once the share has failed."""
        try:
            await self._send.send((segment, block))
        except trio.BrokenResourceError:
            await trio.lowlevel.checkpoint()

    def finish(self, tail: EncodedTail) -> None:
        self._tail = tail
        self._send.close()

    def drop(self, error: PeerError) -> None:
        self.failed = error
        self._scope.cancel()

    async def run(self, on_failure: Callable[[SharePusher], None]) -> None:
        """Write everything and close the share, or call `on_failure` once."""
        try:
            with self._scope, self._receive:
                async for segment, block in self._receive:
                    await self._timed(self.writer.put_block, segment, block)
                    if self._progress is not None:
                        self._progress.pushed(len(block))
                await self._write_tail()
                self.done = True
                if self._progress is not None:
                    self._progress.placed()
        except PeerError as error:
            self.failed = error
        if self.failed is not None and not self.done:
            log.info("share %d to %s dropped: %s", self.writer.share_number, self.writer.server_name, self.failed)
            on_failure(self)

    async def _write_tail(self) -> None:
        tail, writer, number = self._tail, self.writer, self.writer.share_number
        assert tail is not None, "the queue was closed without finish()"
        dead_region = [b""] * len(tail.crypttext_hashes)
        await self._timed(writer.put_plaintext_hashes, dead_region)
        await self._timed(writer.put_crypttext_hashes, tail.crypttext_hashes)
        await self._timed(writer.put_block_hashes, tail.block_hashes[number])
        await self._timed(writer.put_share_hashes, tail.share_hashes[number])
        await self._timed(writer.put_uri_extension, tail.ueb)
        await self._timed(writer.close)

    async def _timed(self, write: Callable[..., object], *args: object) -> None:
        self.busy_since = began = trio.current_time()
        await write(*args)  # type: ignore[misc]
        self.busy_since = None
        self.slowest_write_s = max(self.slowest_write_s, trio.current_time() - began)


async def watch_for_stalls(pushers: list[SharePusher]) -> None:
    """Drop shares whose servers make no progress; runs until cancelled."""
    while True:
        await trio.sleep(WATCH_INTERVAL_S)
        now = trio.current_time()
        live = [pusher for pusher in pushers if pusher.live]
        idle = [pusher for pusher in live if pusher.busy_since is None]
        patience = PROGRESS_TIMEOUT_S
        if 2 * len(idle) >= len(live):
            slowest = max((pusher.slowest_write_s for pusher in idle), default=0.0)
            patience = min(patience, max(STALL_TIMEOUT_S, STALL_FACTOR * slowest))
        for pusher in live:
            if pusher.busy_since is not None and now - pusher.busy_since > patience:
                pusher.drop(PeerTimeoutError(f"{pusher.writer.server_name} made no progress for {patience:.0f} s"))


async def abort_all(writers: list[IShareholder]) -> None:
    """Leave nothing behind on the servers: also while being cancelled, but for a bounded time only."""
    with trio.CancelScope(shield=True, deadline=trio.current_time() + ABORT_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(writer.abort)
