"""ImmutableDownload: verified ciphertext segments of one immutable file, from any k good shares.

Each read of a segment is one nursery. It asks the k shares that promise to be fastest, from different servers
where possible. A share that is late keeps its lane and another one is asked beside it; the k-th good block ends
all others. Block hashes, decoding and the segment's hash take one hop to a worker thread. Reads of different
segments run side by side and share what they learn: shares, hash trees, and how fast each server is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Final

import trio
from attrs import define, field

from grid import stats
from grid.errors import (
    CorruptShareError,
    GridError,
    InconsistentEncodingError,
    NotEnoughSharesError,
    PeerError,
    PeerTimeoutError,
    ShareError,
    short_si,
)
from grid.formats import base32, hashutil
from grid.formats.caps import CHKReadCap, CHKVerifyCap
from grid.interfaces import IStorageBroker, IStorageServer
from grid.operations.corruption import reports_of
from grid.operations.find_shares import ShareFinder
from grid.operations.responsiveness import Bell, Responsiveness, responsiveness_of
from grid.operations.share_reader import Block, FileState, RemoteShare
from grid.operations.worker import run_cpu_work

log = logging.getLogger(__name__)

SEGMENT_BYTES: Final = stats.counter("download_bytes", "Verified bytes read from immutable files on the grid.")
SEGMENT_SECONDS: Final = stats.histogram("download_seconds", "Seconds one segment of an immutable file took to come.")

SPARE_SHARES: Final = 2  # known beyond k, so that a late or bad one can be replaced at once
DIVERSITY_WAIT_S: Final = 0.05  # before taking two shares from one server while others are still being asked
SHARE_TIMEOUT_S: Final = 60.0  # for one share's answer, late or not
ADVISE_TIMEOUT_S: Final = 0.5

_BAD_BLOCK: Final = "block {} does not match its hash"


class ImmutableDownload:
    """One file; share one object between all its readers. Holds no segments, only hashes and small shares."""

    def __init__(
        self, broker: IStorageBroker, cap: CHKReadCap | CHKVerifyCap, responsiveness: Responsiveness | None = None
    ) -> None:
        self.file = FileState(cap.storage_index, cap.ueb_hash, cap.k, cap.n, cap.size)
        self.responsiveness = responsiveness or responsiveness_of(broker)
        self.reports = reports_of(broker)
        self.finder = ShareFinder(broker, self.file, self.responsiveness)

    async def get_segment_size(self) -> int:
        """Bytes in each segment but the last. Raises NotEnoughSharesError."""
        if self.file.ueb is None:
            # k shares and not one: those will be read next, and a small share comes whole with its first read.
            try:
                await _Read(self, None).run()
            except NotEnoughSharesError:
                if self.file.ueb is None:
                    raise
        return self.file.segmentation.segment_size

    async def get_segment(self, segment: int) -> bytes:
        """Verified ciphertext of one segment.

        Raises NotEnoughSharesError, InconsistentEncodingError, or ValueError when there is no such segment.
        """
        if self.file.ueb is None and (segment != 0 or not self.file.size):
            await self.get_segment_size()  # whether there is such a segment
        if self.file.ueb is not None and not 0 <= segment < self.file.segmentation.num_segments:
            raise ValueError(f"no segment {segment} of {self.file.segmentation.num_segments}")
        began = trio.current_time()
        data = await _Read(self, segment).run()
        assert data is not None
        SEGMENT_BYTES.add(len(data))
        SEGMENT_SECONDS.observe(trio.current_time() - began)
        return data


@define(eq=False)
class _Read:
    """One read of one segment, or (`segment` None) the opening of k shares."""

    download: ImmutableDownload
    segment: int | None
    blocks: dict[int, Block | None] = field(factory=dict, init=False)  # {share number: good so far}
    lanes: dict[RemoteShare, float] = field(factory=dict, init=False)  # {share being read: since when, trio time}
    tried: set[RemoteShare] = field(factory=set, init=False)
    failures: list[Exception] = field(factory=list, init=False)
    reports: list[tuple[RemoteShare, str]] = field(factory=list, init=False)
    bell: Bell = field(factory=Bell, init=False)
    began: float = field(factory=trio.current_time, init=False)
    searching: bool = field(default=False, init=False)
    searches_before: int = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.searches_before = self.download.finder.searches

    async def run(self) -> bytes | None:
        result: bytes | None = None
        failure: GridError | None = None
        # Errors are carried out by hand: raised inside, they would come wrapped in an ExceptionGroup.
        async with trio.open_nursery() as nursery:
            try:
                result = await self._gather(nursery)
            except (NotEnoughSharesError, InconsistentEncodingError) as error:
                failure = error
            nursery.cancel_scope.cancel()
        await self._report_corruption()
        if failure is not None:
            raise failure
        return result

    async def _gather(self, nursery: trio.Nursery) -> bytes | None:
        file, finder = self.download.file, self.download.finder
        while True:
            if len(self.blocks) >= file.k:
                if self.segment is None:
                    return None
                if (data := await self._decode(self.segment)) is not None:
                    return data
                continue
            self._search_if_short(nursery)
            wake_at = self._start_lanes(nursery)
            if not self.lanes and not self.searching and self._best_candidate() is None:
                if finder.searches > self.searches_before:
                    raise NotEnoughSharesError(file.k, len(self.blocks), self._all_failures())
                finder.restart()  # what was found by an earlier read may have moved or come back since
                self.tried.clear()
                continue
            await self.bell.wait_until(wake_at)

    def _all_failures(self) -> tuple[Exception, ...]:
        """Those of this read, of the search for shares, and what earlier reads have found out about shares."""
        finder, segment = self.download.finder, self.segment
        seen = {(error.server, error.share_number) for error in self.failures if isinstance(error, CorruptShareError)}
        earlier: list[Exception] = [error for error in finder.condemned.values() if error not in self.failures]
        for share in finder.shares:
            if segment in share.bad_segments and (share.server.name, share.number) not in seen:
                earlier.append(share.corrupt(_BAD_BLOCK.format(segment)))
        return (*self.failures, *earlier, *finder.failures.values())

    # --- which shares to ask

    def _search_if_short(self, nursery: trio.Nursery) -> None:
        finder, wanted = self.download.finder, self.download.file.k + SPARE_SHARES
        if self.searching or finder.exhausted:
            return

        def enough() -> bool:
            return len({*self.blocks} | {share.number for share in finder.shares if self._is_usable(share)}) >= wanted

        async def search() -> None:
            await finder.find(enough, self.bell)
            self.searching = False
            self.bell.ring()

        if not enough():
            self.searching = True
            nursery.start_soon(search)

    def _is_usable(self, share: RemoteShare) -> bool:
        """It is being read, or could be."""
        return share in self.lanes or (share not in self.tried and self.segment not in share.bad_segments)

    def _start_lanes(self, nursery: trio.Nursery) -> float:
        """Ask as many shares as blocks are missing, not counting late ones. Returns when to look again."""
        responsiveness = self.download.responsiveness
        # The more shares were asked beyond k, the more likely it is the line that is slow, and asking makes it worse.
        hedged = max(0, len(self.tried) - self.download.file.k)
        now, delay = trio.current_time(), responsiveness.hedge_delay_s * (1 + hedged // SPARE_SHARES)
        wake_at = math.inf
        on_time: set[int] = set()
        for share, since in self.lanes.items():
            if now < (late_at := since + delay):
                on_time.add(share.number)
                wake_at = min(wake_at, late_at)
            else:
                responsiveness.late(share.server.server_id)
        while len(self.blocks.keys() | on_time) < self.download.file.k:
            share_or_none = self._best_candidate(on_time)
            if share_or_none is None:
                break
            if self.searching and share_or_none.server in self._servers_used() and now < self.began + DIVERSITY_WAIT_S:
                return min(wake_at, self.began + DIVERSITY_WAIT_S)
            self.lanes[share_or_none] = now
            self.tried.add(share_or_none)
            on_time.add(share_or_none.number)
            wake_at = min(wake_at, now + delay)
            nursery.start_soon(self._lane, share_or_none)
        return wake_at

    def _servers_used(self) -> list[IStorageServer]:
        return [share.server for share in self.lanes] + [b.share.server for b in self.blocks.values() if b is not None]

    def _best_candidate(self, on_time: set[int] | None = None) -> RemoteShare | None:
        """Of the shares not asked yet: from a server that answers, without bad blocks so far, from a server not used
        yet, fast; a primary share, if equal.
        """
        responsiveness, used = self.download.responsiveness, self._servers_used()
        taken = self.blocks.keys() | (on_time or set())
        file = self.download.file

        def rank(share: RemoteShare) -> tuple[bool, bool, int, int, bool]:
            server_id, damaged = share.server.server_id, bool(share.bad_segments)
            speed = responsiveness.speed_class(server_id)
            return responsiveness.is_late(server_id), damaged, used.count(share.server), speed, share.number >= file.k

        candidates = [
            share
            for share in self.download.finder.shares
            if share not in self.tried and share.number not in taken and self.segment not in share.bad_segments
        ]
        return min(candidates, key=rank, default=None)

    # --- one share

    async def _lane(self, share: RemoteShare) -> None:
        finder, responsiveness = self.download.finder, self.download.responsiveness
        began = trio.current_time()
        try:
            with trio.move_on_after(SHARE_TIMEOUT_S) as scope:
                if self.segment is None:
                    await share.open()
                    self.blocks.setdefault(share.number, None)
                else:
                    block = await share.fetch(self.segment)
                    self.blocks.setdefault(share.number, block)
            if scope.cancelled_caught:
                raise PeerTimeoutError(f"server {share.server.name} did not answer in time")
            responsiveness.answered(share.server.server_id, trio.current_time() - began)
        except ShareError as error:
            self.failures.append(error)
            finder.condemn(share, error)
            if isinstance(error, CorruptShareError):
                self._note_corrupt(share, error)
        except PeerError as error:
            log.info("share %d on server %s: %s", share.number, share.server.name, error)
            self.failures.append(error)
            finder.lost(share)
        finally:
            del self.lanes[share]
            self.bell.ring()

    def _note_corrupt(self, share: RemoteShare, error: CorruptShareError) -> None:
        if not self.download.reports.is_news(self.download.file.storage_index, share.server.server_id, share.number):
            return
        log.warning("%s (file %s)", error, short_si(base32.b2a(self.download.file.storage_index)))
        self.reports.append((share, error.reason))

    async def _report_corruption(self) -> None:
        if not self.reports:
            return
        with trio.move_on_after(ADVISE_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for share, reason in self.reports:
                    nursery.start_soon(share.reader.advise_corrupt_share, reason)

    # --- k blocks into a segment

    async def _decode(self, segment: int) -> bytes | None:
        """None when some blocks were bad; they are gone from `blocks` then."""
        file = self.download.file
        blocks = [block for _, block in sorted(self.blocks.items()) if block is not None][: file.k]
        length = file.segmentation.segment_bytes(segment)
        data, bad = await run_cpu_work(partial(_verify_and_decode, file, segment, blocks), length)
        for block in bad:
            error = block.share.corrupt(_BAD_BLOCK.format(segment))
            self.failures.append(error)
            self._note_corrupt(block.share, error)
            block.share.bad_segments.add(segment)
            del self.blocks[block.share.number]
        return data


def _verify_and_decode(file: FileState, segment: int, blocks: Sequence[Block]) -> tuple[bytes | None, list[Block]]:
    """(the segment, nothing) or (None, the bad blocks). Raises InconsistentEncodingError."""
    bad = [block for block in blocks if hashutil.block_hash(block.data) != block.block_hash]
    if bad:
        return None, bad
    pieces = file.decoder.decode([block.data for block in blocks], [block.share.number for block in blocks])
    length = file.segmentation.segment_bytes(segment)
    data = b"".join(_cut(pieces, length))
    if hashutil.crypttext_segment_hash(data) != file.crypttext_tree.get_leaf(segment):
        raise InconsistentEncodingError(f"segment {segment} decodes to other bytes than were encoded")
    return data, []


def _cut(pieces: Sequence[bytes | memoryview], length: int) -> list[memoryview]:
    """The first `length` bytes of the pieces together, without copying."""
    cut = []
    for piece in pieces:
        view = memoryview(piece)[: max(length, 0)]
        cut.append(view)
        length -= len(piece)
    return cut
