"""Brings single files and listings into the pin store: says what is lacking of them, and fetches that.

A file is held when every segment of it is, by the segment size that stands with the first one; a mutable file when that
is so for the version there is now, and that version is held as well; a listing is one record (`cache/kept.py`).

Fetches go through the block cache, so one that a reader is waiting for is shared. At most SEGMENTS_AT_ONCE are under
way. What came goes to the disk in groups: while one is being written the next gathers. `_turn` is held over one group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import trio
from attrs import define, field, frozen

from cache.block_packs import Record
from cache.blocks import BlockCache
from cache.disk_tier import BlockName, DiskTier
from cache.kept import Kept, version_name
from cache.pin_store import PinsFullError
from grid.errors import FormatError, GridError
from grid.formats.caps import Cap, CHKReadCap
from grid.formats.segments import div_ceil
from grid.interfaces import IReadableSnapshot
from grid.nodes.immutable import cache_secret_of
from grid.operations.lanes import in_lanes

SEGMENTS_AT_ONCE: Final = 12  # over all files
LANES: Final = 6  # of one file
LOOKED_AT_ONCE: Final = 1024  # segments of one file whose records are looked for in one hop to a thread
FILES_LOOKED_AT_ONCE: Final = 256  # small files, the same
FETCH_TIMEOUT_S: Final = 120.0  # for one segment
OPEN_TIMEOUT_S: Final = 60.0  # for the version of a mutable file


@frozen
class _File:
    """One immutable file, or one version of a mutable one."""

    secret: bytes = field(repr=False)
    version: bytes
    size: int  # bytes

    def name(self, number: int) -> BlockName:
        return BlockName.of(self.secret, self.version, number)


@frozen
class Look:
    """What there is of one file: `bytes` to read, of which `held` are here."""

    is_held: bool
    bytes: int
    bytes_held: int
    error: Exception | None = None


@define(eq=False)
class _Waiting:
    """A record on its way to the disk."""

    name: BlockName
    record: Record
    done: bool = False
    error: Exception | None = None


class Holder:
    """For the pins of one root, `owner`."""

    def __init__(self, kept: Kept, blocks: BlockCache, disk: DiskTier, owner: str) -> None:
        self.epoch = 0
        self.owner = owner
        self._kept = kept
        self._blocks = blocks
        self._disk = disk
        self._waiting: list[_Waiting] = []
        self._turn = trio.Lock()
        self._lanes = trio.CapacityLimiter(SEGMENTS_AT_ONCE)

    # --- what is here

    async def look(self, caps: Sequence[Cap]) -> list[Look]:
        """Of files; what is here is marked as wanted. Raises OSError."""
        looks: list[Look] = []
        for start in range(0, len(caps), FILES_LOOKED_AT_ONCE):
            some = caps[start : start + FILES_LOOKED_AT_ONCE]
            opened = await in_lanes(LANES, dict.fromkeys(cap for cap in some if cap.is_mutable), self._find)
            found = [opened[cap] if cap.is_mutable else _immutable(cap) for cap in some]
            looks += await trio.to_thread.run_sync(self._look, found)
        return looks

    async def _find(self, cap: Cap) -> _File | Look:
        """What a mutable file is now."""
        try:
            return _file_of(await self._open(cap))
        except PinsFullError:
            raise
        except (GridError, trio.TooSlowError) as error:
            return Look(False, 0, 0, error)

    async def _open(self, cap: Cap) -> IReadableSnapshot:
        """What a file is now; of a mutable one this is held."""
        with trio.fail_after(OPEN_TIMEOUT_S):
            snapshot = await self._kept.open_file(cap)
        if cap.is_mutable:
            name = version_name(cap)
            if name is None or await self._disk.get(name) is None or not await self.hold(name):
                raise FormatError("its version could not be kept")
        return snapshot

    def _look(self, found: Sequence[_File | Look]) -> list[Look]:
        """In a thread. Most files are one segment: these are marked together."""
        looks = list(found)
        singles = []
        for place, file in enumerate(found):
            if isinstance(file, Look):
                continue
            segment_size = self._disk.pins.segment_size(file.name(0).key) if file.size else 0
            if not segment_size:
                looks[place] = Look(not file.size, file.size, 0)
            elif file.size <= segment_size:
                singles.append(place)
            else:
                looks[place] = self._look_at(file, segment_size)
        files = [file for place in singles if isinstance(file := found[place], _File)]
        here = self._disk.pins.mark(self.owner, self.epoch, [file.name(0).key for file in files])
        for place, file, is_here in zip(singles, files, here, strict=True):
            looks[place] = Look(is_here, file.size, file.size * is_here)
        return [look for look in looks if isinstance(look, Look)]

    def _look_at(self, file: _File, segment_size: int) -> Look:
        count, lacking = div_ceil(file.size, segment_size), 0
        for start in range(0, count, LOOKED_AT_ONCE):
            keys = [file.name(number).key for number in range(start, min(count, start + LOOKED_AT_ONCE))]
            lacking += self._disk.pins.mark(self.owner, self.epoch, keys).count(False)
        return Look(not lacking, file.size, max(0, file.size - lacking * segment_size))

    # --- fetching

    async def hold(self, name: BlockName) -> bool:
        """Hold what is kept under this name; False if nothing is. Raises PinsFullError, OSError."""
        if (await self._mark([name]))[0]:
            return True
        record = await self._disk.get(name)
        if record is None or not record.payload:
            return False
        await self._put(name, record)
        return True

    async def fetch(self, cap: Cap, tell: Callable[[int], None]) -> None:
        """Have all of a file here, one that is no literal. `tell` hears of each segment that came, how long it is.

        Raises GridError, TooSlowError, PinsFullError, OSError.
        """
        snapshot = await self._open(cap)
        if not snapshot.size:
            return
        file = _file_of(snapshot)
        with trio.fail_after(FETCH_TIMEOUT_S):
            segment_size = await self._blocks.segment_size(snapshot)
        count = div_ceil(file.size, segment_size)

        async def fetch_segment(number: int) -> None:
            size = segment_size if number < count - 1 else file.size - number * segment_size
            name = file.name(number)
            async with self._lanes:
                with self._disk.claimed(name), trio.fail_after(FETCH_TIMEOUT_S):
                    data = await self._blocks.get(snapshot, number, size)
                await self._put(name, Record(segment_size, memoryview(data)))
            tell(size)

        for start in range(0, count, LOOKED_AT_ONCE):
            numbers = range(start, min(count, start + LOOKED_AT_ONCE))
            here = await self._mark([file.name(number) for number in numbers])
            lacking = [number for number, is_here in zip(numbers, here, strict=True) if not is_here]
            await in_lanes(LANES, lacking, fetch_segment)

    async def _mark(self, names: Sequence[BlockName]) -> list[bool]:
        keys = [name.key for name in names]
        return await trio.to_thread.run_sync(self._disk.pins.mark, self.owner, self.epoch, keys)

    async def _put(self, name: BlockName, record: Record) -> None:
        """Return when it is on the disk. Raises PinsFullError, OSError."""
        mine = _Waiting(name, record)
        self._waiting.append(mine)
        async with self._turn:
            if not mine.done:
                group, self._waiting = self._waiting, []
                error: Exception | None = None
                try:
                    await self._disk.pin(self.owner, self.epoch, {each.name: each.record for each in group})
                except (GridError, OSError) as raised:
                    error = raised
                for each in group:
                    each.done, each.error = True, error
        if mine.error is not None:
            raise mine.error


def is_file(cap: Cap) -> bool:
    """Is it something with bytes that this cap can read?"""
    return not cap.is_directory and not cap.is_verifier and cap.kind != "unknown"


def _immutable(cap: Cap) -> _File | Look:
    if isinstance(cap, CHKReadCap):
        return _File(cache_secret_of(cap), b"", cap.size)
    return Look(True, cap.size or 0, cap.size or 0)  # all of it stands in its cap


def _file_of(snapshot: IReadableSnapshot) -> _File:
    secret = snapshot.cache_secret
    assert secret is not None
    return _File(secret, snapshot.version, snapshot.size)
