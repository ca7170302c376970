"""A mutable file as its holder sees it: read the best version, replace it, or change it in a race with others.

One node per file (see `nodemaker`), so that the writers in this process wait for each other (`_lock`) and only
writers elsewhere can surprise us. After a publish the node knows where every share is: for MAP_FRESH_S the next
publish starts from that, without asking first. It is the servers' test-and-set that makes this safe; when it
fails, the map is made anew.

Source: Tahoe-LAFS 1.20's mutable files. Retry times are ours.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Final

import trio
from attrs import define

from grid.errors import (
    GridError,
    NotEnoughServersError,
    NotEnoughSharesError,
    NotWriteableError,
    UncoordinatedWriteError,
)
from grid.formats.mdmf_share import mdmf_segment_size
from grid.formats.mutable_share import SALT_BYTES, MutableHeader
from grid.formats.segments import div_ceil
from grid.nodes.mutable_reading import MutableAccess, MutableCap, MutableFileReader, raced
from grid.operations.changes import Changes, Step, fits_at_once, plan, segments_at_once
from grid.operations.keys import MutableKeys
from grid.operations.mdmf_update import PatchedVersion, can_update, prepare_update
from grid.operations.mutable_encode import EncodedVersion, NewVersion, prepare_mdmf, prepare_sdmf
from grid.operations.publish import publish
from grid.operations.repair_mutable import MutableRepair
from grid.operations.retrieve import MutableVersion, version_of
from grid.operations.servermap import MapMode, ServerMap, ShareKey

log = logging.getLogger(__name__)

MAP_FRESH_S: Final = 60.0
UPDATE_TRIES: Final = 8  # when other writers keep being faster
BACK_OFF_S: Final = 0.25  # before the second try; e times longer for each further one, and a random part of it
BACK_OFF_S_MAX: Final = 20.0
REPAIR_PASSES_MAX: Final = 3  # when servers fail to take shares, or more turn out damaged
MERGE_BYTES_MAX: Final = 128 << 20  # of the contents of one of several newest versions: all are in memory at once

Make = Callable[[MutableVersion, bool], Awaitable[bytes | Changes | None]]


@define(eq=False)
class _Attempt:
    """Where one try of an update starts from."""

    servermap: ServerMap
    version: MutableVersion
    remembered: bool  # the map is from our last publish, so others may have written since


class MutableFileNode(MutableFileReader):
    """IMutableFileNode, for SDMF and MDMF; with write cap or read cap."""

    def __init__(self, access: MutableAccess, cap: MutableCap, *, keys: MutableKeys | None = None) -> None:
        super().__init__(access, cap, keys=keys)
        self._lock = trio.Lock()  # held over a whole update: writers of this process take turns
        self._map: ServerMap | None = None  # from our last publish or update

    def check_writeable(self) -> None:
        """Raises NotWriteableError."""
        if self._cap.is_readonly:
            raise NotWriteableError("this is a read-only cap")

    async def create(self, contents: bytes | Changes) -> MutableVersion:
        """Publish the first version of a file whose keys were just made: nobody else can have written to it.

        `contents` given as Changes (MDMF) may be large: they are written as a series of versions, see update().
        """
        self.check_writeable()
        assert self._keys is not None
        k, n = self._access.k, self._access.n
        if isinstance(contents, bytes):
            first, rest = contents, None
        else:
            size = contents.new_size(0)
            segment_size = mdmf_segment_size(k)
            stop = size if self._cap.kind == "sdmf" else min(size, segments_at_once(k, n, segment_size) * segment_size)
            first = await contents.over(b"", stop)
            rest = Changes(contents.within(stop, size), contents.read, size) if stop < size else None
        async with self._lock:
            version = await self._publish(await self._encode(first, seqnum=1, k=k, n=n), None)
            del first  # a large part of a large file: not to be held while the rest is written
            return (rest and await self._apply(rest, version, set(), must=False)) or version

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

    async def apply(self, changes: Changes) -> MutableVersion:
        """Make `changes` to the newest version, again if another writer was faster: to what that one wrote.

        MDMF moves only the segments they touch. Raises as update(), and what `changes.read` raises.
        """

        async def make(version: MutableVersion, must: bool) -> Changes:
            return changes

        return await self.update(make)

    async def write_at(self, offset: int, data: bytes) -> None:
        """Beyond the end, zeros fill what is between."""
        await self.apply(Changes.of_bytes(offset, data))

    async def truncate(self, size: int) -> None:
        """Cut, or lengthen with zeros."""
        await self.apply(Changes.to_size(size))

    async def append(self, data: bytes) -> None:
        """Add to the end, wherever that is by then. More than fits in one version is added piece by piece, and what
        others append may come between the pieces. Never lost, but after a race a piece may be there twice: a rival
        may have built on our version though it did not reach all servers.
        """
        done = stop = 0

        async def make(version: MutableVersion, must: bool) -> Changes:
            nonlocal stop
            header = version.header
            segment_size = header.segment_size or len(data)
            segments = segments_at_once(header.k, header.n, segment_size)
            stop = done + segments * segment_size - header.data_size % segment_size
            return Changes.of_bytes(version.size, b"" if version.is_our_try else data[done:stop])

        while done < len(data):
            await self.update(make)
            done = stop

    async def update(self, make: Make, *, tries: int = UPDATE_TRIES) -> MutableVersion:
        """Read, make the new contents or changes, publish; from the start when another writer was faster.

        `make(version, must)` returns whole new contents, which become one version; or Changes, which for MDMF become a
        series of versions if they are large, front to back; or None for no change, but not if `must`, since after a
        failed publish the servers may hold a mixture that only another publish clears up. Returns the version that is
        now the newest. Raises UncoordinatedWriteError after `tries`, and what publish() raises.
        """
        self.check_writeable()
        async with self._lock:
            failed: set[bytes] = set()  # versions of ours that lost
            back_off_s = BACK_OFF_S
            while True:
                attempt = await self._start(failed)
                try:
                    done = await self._try(make, attempt, failed)
                    if done is not None:
                        return done
                    if not attempt.remembered:
                        self._map = attempt.servermap
                        return attempt.version
                    self._map = None  # nothing to do, by what we remember: look before believing it
                    continue
                except GridError as error:
                    if not raced(error) and (not attempt.remembered or isinstance(error, NotEnoughServersError)):
                        raise
                    log.info("update of a mutable file: %s", error)
                    if attempt.remembered:
                        self._map = None
                        continue  # no race, perhaps, only old knowledge: no reason to wait
                    tries -= 1
                    if not tries:
                        raise
                await trio.sleep(back_off_s * random.uniform(0.3, 1.0))
                back_off_s = min(back_off_s * 2.718, BACK_OFF_S_MAX)

    async def repair(
        self, merge: Callable[[Sequence[bytes]], bytes] | None = None, damaged: Collection[ShareKey] = ()
    ) -> int:
        """Make the best version's missing shares again, and right ones in place of old and damaged ones; others stay as
        they are. Where writers raced, so that there are several newest versions, the best becomes the next one.

        `merge` makes one contents of those of all newest versions, best first, which is then published as a whole.
        `damaged`: shares that were found to be. Returns how many newest versions there were. Raises
        NotEnoughSharesError when a newer version was seen than can be recovered (it may come back with its servers),
        NotWriteableError when what is to be merged is over MERGE_BYTES_MAX, InconsistentEncodingError when the shares
        that are there are not of one coding, and as publish().
        """
        self.check_writeable()
        out: set[str] = set()
        bad = set(damaged)
        most = 1
        async with self._lock:
            self._map = None
            for _ in range(REPAIR_PASSES_MAX):
                servermap = await self._make_map(MapMode.REPAIR)
                for key in bad & servermap.shares.keys():
                    share = servermap.shares[key]
                    servermap.mark_bad(share, share.corrupt("it was found damaged"))
                best, heads = self._repairable(servermap)
                most = max(most, len(heads))
                if len(heads) > 1 and (merge is not None or not can_update(best)):
                    await self._publish_anew(servermap, heads if merge else heads[:1], merge)
                    break
                secrets, keys, version = self._access.secrets, self._keys, self._version_at(servermap, best)
                assert keys is not None
                repair = MutableRepair(
                    self._access.broker, secrets, keys, servermap, version, out, renumber=len(heads) > 1
                )
                await repair.run()
                out |= repair.failed
                bad = (bad | repair.found_bad) - repair.made
                if not repair.failed and not repair.found_bad:
                    break
        return most

    def _repairable(self, servermap: ServerMap) -> tuple[MutableHeader, list[MutableHeader]]:
        """The best version, and all of its number. Raises NotEnoughSharesError."""
        best = servermap.best()
        if best is None or servermap.unrecoverable_newer or self._keys is None:
            failures = (*(bad.error for bad in servermap.bad.values()), *servermap.failures.values())
            raise NotEnoughSharesError(best.k if best else self._access.k, 0 if best else servermap.found, failures)
        return best, [head for head in servermap.recoverable() if head.seqnum == best.seqnum]

    async def _publish_anew(
        self, servermap: ServerMap, heads: Sequence[MutableHeader], merge: Callable[[Sequence[bytes]], bytes] | None
    ) -> None:
        if any(head.data_size > MERGE_BYTES_MAX for head in heads):
            raise NotWriteableError(f"versions of over {MERGE_BYTES_MAX} bytes cannot be merged")
        contents = [await self._version_at(servermap, head).read_all() for head in heads]
        data = merge(contents) if merge else contents[0]
        seqnum, k, n = servermap.highest_seqnum + 1, heads[0].k, heads[0].n
        await self._publish(await self._encode(data, seqnum=seqnum, k=k, n=n), servermap)

    async def _start(self, failed: set[bytes]) -> _Attempt:
        servermap = self._map
        remembered = servermap is not None and trio.current_time() < servermap.made_at + MAP_FRESH_S
        if servermap is None or not remembered:
            servermap = await self._make_map(MapMode.WRITE)
        version = self._version(servermap, frozenset(failed))
        if self._keys is None:
            raise NotEnoughSharesError(1, 0, tuple(servermap.failures.values()))  # none with a good private key
        return _Attempt(servermap, version, remembered)

    async def _try(self, make: Make, attempt: _Attempt, failed: set[bytes]) -> MutableVersion | None:
        """The new version; None if there is nothing to change."""
        must = bool(failed) or self._fragile(attempt)
        new = await make(attempt.version, must)
        if isinstance(new, Changes):
            return await self._apply(new, attempt.version, failed, must=must)
        return None if new is None else await self._publish_whole(new, attempt.version, failed)

    def _fragile(self, attempt: _Attempt) -> bool:
        """Whether the newest version is on fewer servers than it should be: its publish may have been cut short."""
        header = attempt.version.header
        wanted = min(self._access.happy, header.n)
        return not attempt.remembered and attempt.servermap.happiness_of(header) < wanted

    async def _publish_whole(self, data: bytes, version: MutableVersion, failed: set[bytes]) -> MutableVersion:
        header, servermap = version.header, version.servermap
        encoded = await self._encode(data, seqnum=servermap.highest_seqnum + 1, k=header.k, n=header.n)
        return await self._publish(encoded, servermap, failed)

    async def _apply(
        self, changes: Changes, version: MutableVersion, failed: set[bytes], *, must: bool
    ) -> MutableVersion | None:
        header = version.header
        size = changes.new_size(header.data_size)
        steps = plan(header.segmentation, header.n, changes) or ([Step([], size)] if must else [])
        for step in steps:
            prepared = await self._prepare(version, changes, step, only=len(steps) == 1)
            if prepared is None:
                kept = b"" if changes.within(0, size) == [(0, size)] else await version.read_start(size)
                return await self._publish_whole(await changes.over(kept, size), version, failed)
            version = await self._publish(prepared, version.servermap, failed)
            del prepared  # not to be held while the next one is made
        return version if steps else None

    async def _prepare(
        self, version: MutableVersion, changes: Changes, step: Step, *, only: bool
    ) -> PatchedVersion | None:
        """One step, as changes to the shares. None if whole shares are to be written instead: nothing of them would
        stay, or some are missing and the file is small enough to make them anew.
        """
        assert self._keys is not None
        header = version.header
        size = changes.new_size(header.data_size)
        if self._cap.kind == "sdmf":
            return None
        small = only and fits_at_once(size, header.k, header.n)

        def incomplete(numbers: Collection[int]) -> bool:
            return len({share.number for share in version.servermap.shares_of(header)} & {*numbers}) < header.n

        all_of_it = only and len(step.segments) == div_ceil(size, header.segment_size)
        if small and (all_of_it or incomplete(range(header.n)) or not can_update(header)):
            return None
        if not can_update(header):
            raise NotWriteableError("a large file whose shares are laid out so that they cannot be changed in place")
        prepared = await prepare_update(
            version,
            changes,
            step,
            self._keys,
            seqnum=version.servermap.highest_seqnum + 1,
            final_size=size,
            random_bytes=self._access.random_bytes,
        )
        return None if small and incomplete(prepared.numbers) else prepared

    async def _encode(self, data: bytes, *, seqnum: int, k: int, n: int) -> EncodedVersion:
        keys, random_bytes = self._keys, self._access.random_bytes
        assert keys is not None
        if self._cap.kind == "sdmf":
            return await prepare_sdmf(data, keys, seqnum=seqnum, salt=random_bytes(SALT_BYTES), k=k, n=n)

        async def read(offset: int, length: int) -> bytes:
            return data[offset : offset + length]

        return await prepare_mdmf(read, len(data), keys, seqnum=seqnum, k=k, n=n, random_bytes=random_bytes)

    async def _publish(
        self, new: NewVersion, servermap: ServerMap | None, failed: set[bytes] | None = None
    ) -> MutableVersion:
        """`failed` takes the version that another writer's came before."""
        assert self._keys is not None
        self._map = None  # of unknown worth until the publish is done, also if that is cancelled
        try:
            access = self._access
            placed = await publish(access.broker, access.secrets, self._keys, new, servermap, happy=access.happy)
        except UncoordinatedWriteError:
            if failed is not None:
                failed.add(version_of(new.header))
            raise
        if placed.complete(new.header.n):
            self._map = placed
        self._latest = new.header
        return self._version(placed)
