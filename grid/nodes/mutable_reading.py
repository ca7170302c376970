"""Reading a mutable file: which version is the best one there is, and what to do when it is replaced meanwhile.

Source: Tahoe-LAFS 1.20's mutable files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import trio
from attrs import field, frozen

from grid.errors import GridError, NotEnoughSharesError, UncoordinatedWriteError
from grid.formats.caps import MDMFReadCap, MDMFWriteCap, SDMFReadCap, SDMFWriteCap
from grid.formats.mutable_share import MUTABLE_SHARES_MAX, MutableHeader, header_of_prefix
from grid.interfaces import IDownloadTarget, IStorageBroker
from grid.operations.check import check_cap
from grid.operations.check_results import CheckResults
from grid.operations.keys import MutableKeys
from grid.operations.leases import Secrets
from grid.operations.retrieve import MutableVersion, version_of
from grid.operations.servermap import MapMode, MapRequest, ServerMap, update_servermap
from grid.operations.slot_share import ShareReplacedError, ShareVerifier

log = logging.getLogger(__name__)

READ_TRIES: Final = 4  # when versions are replaced while we read them
DOWNLOAD_SEGMENTS: Final = 8  # of a download to a target, in memory at a time

MutableCap = SDMFWriteCap | SDMFReadCap | MDMFWriteCap | MDMFReadCap
T = TypeVar("T")


def _at_most_max(n: int) -> int:
    return min(n, MUTABLE_SHARES_MAX)


@frozen
class MutableAccess:
    """What every mutable node of one client shares."""

    broker: IStorageBroker
    secrets: Secrets = field(repr=False)
    k: int  # of new files; files keep what they have
    n: int = field(converter=_at_most_max)
    random_bytes: Callable[[int], bytes] = os.urandom
    happy: int = 1  # servers that must hold a share of their own before a version counts as published


class MutableFileReader:
    """The half of MutableFileNode that reads."""

    def __init__(self, access: MutableAccess, cap: MutableCap, *, keys: MutableKeys | None = None) -> None:
        self._access = access
        self._cap = cap
        read_cap = cap.readonly
        self._readkey: bytes = read_cap.readkey
        self._storage_index: bytes = read_cap.verifier.storage_index
        self._keys = keys
        self._verifier = ShareVerifier(cap.fingerprint)
        self._holders: frozenset[str] = frozenset()  # server ids where shares were seen
        self._latest: MutableHeader | None = None  # highest version we read or wrote
        self._raced_at: int | None = None  # seqnum at which writers were seen to have raced

    def __repr__(self) -> str:
        return f"<MutableFileNode {self._cap.kind}>"

    @property
    def cap(self) -> MutableCap:
        return self._cap

    def get_uri(self) -> str:
        return self._cap.to_string()

    def get_readonly_uri(self) -> str:
        return self._cap.readonly.to_string()

    def get_verifier(self) -> Any:
        return self._cap.verifier

    def get_storage_index(self) -> bytes:
        return self._storage_index

    def get_writekey(self) -> bytes | None:
        return self._cap.writekey if isinstance(self._cap, SDMFWriteCap | MDMFWriteCap) else None

    def is_readonly(self) -> bool:
        return self._cap.is_readonly

    def is_mutable(self) -> bool:
        return True

    def get_size(self) -> int | None:
        """Bytes in the latest version we know of; None before the first look."""
        return self._latest.data_size if self._latest else None

    async def get_current_size(self) -> int:
        return (await self.get_best_version()).size

    async def open_snapshot(self) -> MutableVersion:
        return await self.get_best_version()

    async def get_best_version(self) -> MutableVersion:
        """The newest recoverable version on the grid, now. Raises NotEnoughSharesError."""
        servermap = await self._make_map(MapMode.READ)
        best = servermap.best()
        if best is None or (self._latest is not None and best.seqnum < self._latest.seqnum):
            servermap = await self._make_map(MapMode.WRITE)  # look further: we know there is, or was, more
        return self._version(servermap)

    def version_of_prefix(self, signed_prefix: bytes) -> MutableVersion:
        """A version seen before, as its signed prefix tells: segments that are kept of it can be decrypted, and no
        others be had. Raises FormatError.
        """
        header = header_of_prefix(signed_prefix)
        return MutableVersion(ServerMap(), header, storage_index=self._storage_index, readkey=self._readkey)

    async def use_best_version(self, use: Callable[[MutableVersion], Awaitable[T]]) -> T:
        """`use` it; again with the next one if it is replaced while being read."""
        for last in [False] * (READ_TRIES - 1) + [True]:
            version = await self.get_best_version()
            try:
                return await use(version)
            except NotEnoughSharesError as error:
                if last or not (raced(error) or self._knows_newer(version)):
                    raise
                log.info("a mutable file was replaced while it was read: reading the new version")
        raise AssertionError("unreachable")

    async def download_to_data(self) -> bytes:
        return await self.use_best_version(lambda version: version.read_all())

    async def download(self, target: IDownloadTarget) -> Any:
        """The whole contents of one version, DOWNLOAD_SEGMENTS in memory. Raises NotEnoughSharesError, as well when the
        file is replaced after the first of them were written: versions are never mixed.
        """
        with trio.CancelScope() as scope:
            target.register_canceller(scope.cancel)
            try:
                version, data = await self.use_best_version(_begin)
                target.open(version.size)
                await target.write(data)
                for first in range(DOWNLOAD_SEGMENTS, version.num_segments, DOWNLOAD_SEGMENTS):
                    segments = range(first, min(first + DOWNLOAD_SEGMENTS, version.num_segments))
                    await target.write(await version.read_segments(segments))
            except GridError as error:
                target.fail(error)
                raise
            target.close()
        return None if scope.cancelled_caught else target.finish()

    def _knows_newer(self, version: MutableVersion) -> bool:
        return self._latest is not None and self._latest.seqnum > version.header.seqnum

    async def _make_map(self, mode: MapMode) -> ServerMap:
        want_key = self._keys is None and mode is not MapMode.READ
        request = MapRequest.of_cap(self._cap, self._access.k, self._access.n, want_key=want_key, holders=self._holders)
        servermap = await update_servermap(self._access.broker, request, mode, verifier=self._verifier)
        if servermap.keys is not None:
            self._keys = servermap.keys
        self._holders |= servermap.holders()
        self._note(servermap.best())
        return servermap

    def _note(self, header: MutableHeader | None) -> None:
        """From now on nothing older will do, as long as this can be found."""
        if header is not None and (self._latest is None or header.seqnum >= self._latest.seqnum):
            self._latest = header

    def _version(self, servermap: ServerMap, ours_failed: frozenset[bytes] = frozenset()) -> MutableVersion:
        """The best version of a map. Of several heads not one of `ours_failed`: that writer's change is yet to be
        redone, ours will be.
        """
        heads = servermap.recoverable()
        if not heads:
            failures = (*(bad.error for bad in servermap.bad.values()), *servermap.failures.values())
            raise NotEnoughSharesError(self._access.k, servermap.found, failures)
        if servermap.needs_merge and heads[0].seqnum != self._raced_at:  # said once, not at every look
            self._raced_at = heads[0].seqnum
            log.warning("a mutable file has several newest versions: two writers raced")
        rivals = [head for head in heads if head.seqnum == heads[0].seqnum and version_of(head) not in ours_failed]
        header = (rivals or heads)[0]
        self._note(header)
        return self._version_at(servermap, header, is_our_try=version_of(header) in ours_failed)

    def _version_at(self, servermap: ServerMap, header: MutableHeader, *, is_our_try: bool = False) -> MutableVersion:
        return MutableVersion(
            servermap,
            header,
            storage_index=self._storage_index,
            readkey=self._readkey,
            remap=lambda: self._make_map(MapMode.WRITE),
            is_our_try=is_our_try,
        )

    async def check(self) -> CheckResults:
        """As IChecker.check."""
        return await check_cap(self._access.broker, self._cap)


async def _begin(version: MutableVersion) -> tuple[MutableVersion, bytes]:
    return version, await version.read_segments(range(min(DOWNLOAD_SEGMENTS, version.num_segments)))


def raced(error: GridError) -> bool:
    """Whether another writer's version came between."""
    if isinstance(error, NotEnoughSharesError):
        return any(isinstance(failure, ShareReplacedError) for failure in error.failures)
    return isinstance(error, UncoordinatedWriteError)
