"""A mutable file as its holder sees it: read the best version, replace it, or change it in a race with others.

One node per file (see `nodemaker`), so that the writers in this process wait for each other (`_lock`) and only
writers elsewhere can surprise us. After a publish the node knows where every share is: for MAP_FRESH_S the next
publish starts from that, without asking first. It is the servers' test-and-set that makes this safe; when it
fails, the map is made anew.

Source: Tahoe-LAFS 1.20's mutable files. Retry times are ours.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

import trio
from attrs import define, field, frozen

from grid.errors import GridError, NotEnoughSharesError, NotWriteableError, UncoordinatedWriteError
from grid.formats.caps import MDMFReadCap, MDMFWriteCap, SDMFReadCap, SDMFWriteCap
from grid.formats.mutable_share import MUTABLE_SHARES_MAX, SALT_BYTES, MutableHeader, header_of_prefix
from grid.interfaces import IDownloadTarget, IStorageBroker
from grid.operations.check import check_cap
from grid.operations.check_results import CheckResults
from grid.operations.keys import MutableKeys
from grid.operations.leases import Secrets
from grid.operations.publish import EncodedVersion, prepare_sdmf, publish
from grid.operations.retrieve import MutableVersion, version_of
from grid.operations.servermap import MapMode, MapRequest, ServerMap, update_servermap
from grid.operations.slot_share import ShareReplacedError, ShareVerifier

log = logging.getLogger(__name__)

MAP_FRESH_S: Final = 60.0
READ_TRIES: Final = 4  # when versions are replaced while we read them
UPDATE_TRIES: Final = 8  # when other writers keep being faster
BACK_OFF_S: Final = 0.25  # before the second try; e times longer for each further one, and a random part of it
BACK_OFF_S_MAX: Final = 20.0

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


@define(eq=False)
class _Attempt:
    """Where one try of an update starts from."""

    servermap: ServerMap
    version: MutableVersion
    remembered: bool  # the map is from our last publish, so others may have written since


class MutableFileNode:
    """IMutableFileNode, for SDMF and (reading) MDMF; with write cap or read cap."""

    def __init__(self, access: MutableAccess, cap: MutableCap, *, keys: MutableKeys | None = None) -> None:
        self._access = access
        self._cap = cap
        read_cap = cap.readonly
        self._readkey: bytes = read_cap.readkey
        self._storage_index: bytes = read_cap.verifier.storage_index
        self._keys = keys
        self._verifier = ShareVerifier(cap.fingerprint)
        self._lock = trio.Lock()  # held over a whole update: writers of this process take turns
        self._map: ServerMap | None = None  # from our last publish or update
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

    # --- reading

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
                if last or not any(isinstance(failure, ShareReplacedError) for failure in error.failures):
                    raise
                log.info("a mutable file was replaced while it was read: reading the new version")
        raise AssertionError("unreachable")

    async def download_to_data(self) -> bytes:
        return await self.use_best_version(lambda version: version.read_all())

    async def download(self, target: IDownloadTarget) -> Any:
        """The whole contents; a mutable file that is replaced meanwhile is never mixed with the new version."""
        with trio.CancelScope() as scope:
            target.register_canceller(scope.cancel)
            try:
                data = await self.download_to_data()
            except GridError as error:
                target.fail(error)
                raise
            target.open(len(data))
            await target.write(data)
            target.close()
        return None if scope.cancelled_caught else target.finish()

    async def _make_map(self, mode: MapMode) -> ServerMap:
        want_key = self._keys is None and mode is not MapMode.READ
        request = MapRequest.of_cap(self._cap, self._access.k, self._access.n, want_key=want_key, holders=self._holders)
        servermap = await update_servermap(self._access.broker, request, mode, verifier=self._verifier)
        if servermap.keys is not None:
            self._keys = servermap.keys
        self._holders |= servermap.holders()
        return servermap

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
        if self._latest is None or header.seqnum >= self._latest.seqnum:
            self._latest = header
        return self._version_at(servermap, header)

    def _version_at(self, servermap: ServerMap, header: MutableHeader) -> MutableVersion:
        return MutableVersion(
            servermap,
            header,
            storage_index=self._storage_index,
            readkey=self._readkey,
            remap=lambda: self._make_map(MapMode.WRITE),
        )

    async def check(self) -> CheckResults:
        """As IChecker.check."""
        return await check_cap(self._access.broker, self._cap)

    # --- writing

    def check_writeable(self) -> None:
        """Raises NotWriteableError."""
        if self._cap.is_readonly:
            raise NotWriteableError("this is a read-only cap")
        if isinstance(self._cap, MDMFWriteCap):
            raise NotWriteableError("MDMF files can be read, but not yet written")

    async def create(self, contents: bytes) -> MutableVersion:
        """Publish the first version of a file whose keys were just made: nobody else can have written to it."""
        self.check_writeable()
        assert self._keys is not None
        async with self._lock:
            encoded = await self._encode(contents, seqnum=1, k=self._access.k, n=self._access.n)
            return await self._publish(encoded, None)

    async def replace(self, newdata: bytes) -> None:
        """Publish `newdata` as the next version, whatever was there. Raises UncoordinatedWriteError,
        NotEnoughServersError, NotEnoughSharesError (when there is no version to replace), NotWriteableError.
        """

        async def make(version: MutableVersion, must: bool) -> bytes:
            return newdata

        await self.update(make, tries=1)

    async def modify(self, modifier: Callable[[bytes], bytes]) -> bytes:
        """Apply `modifier` to the newest contents, again if another writer was faster. Returns the new contents.

        Contents that come back unchanged are not published.
        """
        result = b""

        async def make(version: MutableVersion, must: bool) -> bytes | None:
            nonlocal result
            old = await version.read_all()
            result = modifier(old)
            return result if must or result != old else None

        await self.update(make)
        return result

    async def update(
        self, make: Callable[[MutableVersion, bool], Awaitable[bytes | None]], *, tries: int = UPDATE_TRIES
    ) -> MutableVersion:
        """Read, make the new contents, publish; from the start when another writer was faster.

        `make(version, must)` returns the new contents, or None for no change; the latter not if `must`, since
        after a failed publish the servers may hold a mixture that only another publish clears up. Returns the
        version that is now the newest. Raises UncoordinatedWriteError after `tries`, and what publish() raises.
        """
        self.check_writeable()
        async with self._lock:
            failed: set[bytes] = set()  # versions of ours that lost
            back_off_s = BACK_OFF_S
            while True:
                attempt = await self._start(failed)
                try:
                    data = await make(attempt.version, bool(failed))
                except GridError:
                    if not attempt.remembered:
                        raise
                    data = None
                if data is None and attempt.remembered:
                    self._map = None  # nothing to do, or impossible, by what we remember: look before believing it
                    continue
                if data is None:
                    self._map = attempt.servermap
                    return attempt.version
                header = attempt.version.header
                seqnum = attempt.servermap.highest_seqnum + 1
                encoded = await self._encode(data, seqnum=seqnum, k=header.k, n=header.n)
                try:
                    return await self._publish(encoded, attempt.servermap)
                except UncoordinatedWriteError as error:
                    log.info("publish: %s", error)
                    failed.add(version_of(encoded.header))
                    if attempt.remembered:
                        continue  # no race, only old knowledge: no reason to wait
                    tries -= 1
                    if not tries:
                        raise
                await trio.sleep(back_off_s * random.uniform(0.3, 1.0))
                back_off_s = min(back_off_s * 2.718, BACK_OFF_S_MAX)

    async def repair(self, merge: Callable[[Sequence[bytes]], bytes] | None = None) -> int:
        """Publish the best version again, as a whole: missing, old and damaged shares are replaced.

        `merge` makes one contents of those of all newest versions, best first, where writers raced; without it the
        best one stays. Returns how many versions there were. Raises NotEnoughSharesError when a newer version was
        seen than can be recovered (it may come back with its servers), and as update().
        """
        self.check_writeable()
        async with self._lock:
            servermap = await self._make_map(MapMode.REPAIR)
            best = servermap.best()
            if best is None or servermap.unrecoverable_newer or self._keys is None:
                failures = (*(bad.error for bad in servermap.bad.values()), *servermap.failures.values())
                raise NotEnoughSharesError(best.k if best else self._access.k, 0 if best else servermap.found, failures)
            heads = [head for head in servermap.recoverable() if head.seqnum == best.seqnum]
            contents = [await self._version_at(servermap, head).read_all() for head in (heads if merge else [best])]
            data = merge(contents) if merge else contents[0]
            seqnum = servermap.highest_seqnum + 1
            await self._publish(await self._encode(data, seqnum=seqnum, k=best.k, n=best.n), servermap)
            return len(heads)

    async def _start(self, failed: set[bytes]) -> _Attempt:
        servermap = self._map
        remembered = servermap is not None and trio.current_time() < servermap.made_at + MAP_FRESH_S
        if servermap is None or not remembered:
            servermap = await self._make_map(MapMode.WRITE)
        version = self._version(servermap, frozenset(failed))
        if self._keys is None:
            raise NotEnoughSharesError(1, 0, tuple(servermap.failures.values()))  # none with a good private key
        return _Attempt(servermap, version, remembered)

    async def _encode(self, data: bytes, *, seqnum: int, k: int, n: int) -> EncodedVersion:
        assert self._keys is not None
        salt = self._access.random_bytes(SALT_BYTES)
        return await prepare_sdmf(data, self._keys, seqnum=seqnum, salt=salt, k=k, n=n)

    async def _publish(self, encoded: EncodedVersion, servermap: ServerMap | None) -> MutableVersion:
        assert self._keys is not None
        self._map = None  # of unknown worth until the publish is done, also if that is cancelled
        placed = await publish(self._access.broker, self._access.secrets, self._keys, encoded, servermap)
        if placed.complete(encoded.header.n):
            self._map = placed
        self._latest = encoded.header
        return self._version(placed)
