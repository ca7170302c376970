"""Verified ciphertext on the local disk, to be read again without the grid. Format version 2.

    <state_dir>/cache/blocks-2/index             where which record stands (`cache/block_index.py`)
                               <number>.pack     the records (`cache/block_packs.py`)

A log: records are appended to packs, and what goes first is the oldest pack as a whole. So writing costs one append
however small the block is, evicting one unlink however many blocks go, and neither a million small files nor a huge
one makes it slower. What was read again since it was written is appended anew before its pack goes (a second chance),
at most RESCUE_SHARE of the pack, so one step of eviction costs at most that much copying.

Records prove themselves at every read, so a crash, a flipped bit or a removed file makes a miss and never wrong
bytes. Nothing is flushed, and nothing has to be: what a power cut takes is fetched again.

All processes with this node directory share it: each appends to a pack of its own and reads all. The bound counts
every pack as full, so it holds whoever writes. A record is never over a quarter of it. What is pinned
(`cache/pin_store.py`) counts within it: this store gives way to that one.

Plain blocking code, for worker threads: `get` and `put` may be called from several at once; `_writing` is held over
one append, and over the eviction that it may need.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from cache.block_index import BlockIndex, Location, slots_for
from cache.block_packs import (
    HEADER,
    PACK_NUMBER_MAX,
    OpenPack,
    Record,
    create_pack,
    encode,
    list_packs,
    pack_path,
    read_at,
    resume_pack,
    walk,
)

log = logging.getLogger(__name__)

FORMAT: Final = "blocks-2"
FREE_BYTES_MIN: Final = 1 << 30  # of the disk; never taken for the cache
PACK_BYTES_MAX: Final = 64 << 20
PACK_BYTES_MIN: Final = 64 << 10
PACKS: Final = 32  # the bound is about so many packs, so that evicting one is a small step
RECORD_BYTES_USUAL: Final = 4 << 10  # the index has room for records of this size on average
RECORD_BYTES_MAX: Final = 256 << 20  # with its header
RESCUE_SHARE: Final = 0.5  # of a pack that goes: kept, if it was read since it was written
EVICTIONS_MAX: Final = 64  # packs in one step: more than one when the bound was lowered, or the disk is full


class BlockStore:
    """Records by key (32 bytes). `secret` is what proves that a record was made by somebody who may read it."""

    def __init__(
        self, path: Path, limit_bytes: int, index: BlockIndex, beside: Callable[[int], int] = lambda pack_bytes: 0
    ) -> None:
        """`beside`: bytes that others hold within the same bound, each of their packs counted as full."""
        self.limit_bytes = limit_bytes
        self._beside = beside
        self._path = path
        self._index = index
        self._old_index: BlockIndex | None = None  # until the next one: a reader may be at it
        self._pack: OpenPack | None = None
        self._pack_bytes = max(PACK_BYTES_MIN, min(PACK_BYTES_MAX, (limit_bytes - index.disk_bytes) // PACKS))
        self._writing = threading.Lock()
        self._used_bytes = sum(list_packs(path).values())

    @classmethod
    def open(cls, cache_dir: Path, limit_bytes: int, beside: Callable[[int], int] = lambda pack_bytes: 0) -> Self:
        """The store in `cache_dir`, made if there is none; other versions' are removed. Raises OSError."""
        path = cache_dir / FORMAT
        return cls(path, limit_bytes, _open_index(path, limit_bytes), beside)

    def close(self) -> None:
        with self._writing:
            if self._pack is not None:
                self._pack.close()
                self._pack = None
            for index in (self._index, self._old_index):
                if index is not None:
                    index.close()

    @property
    def used_bytes(self) -> int:
        """On the disk, by all processes, as of the last look; exact for what this one writes."""
        return self._used_bytes

    @property
    def pack_bytes(self) -> int:
        """What a pack may have, but for one with a single larger record."""
        return self._pack_bytes

    @property
    def record_bytes_max(self) -> int:
        """What a payload may have; larger ones are not kept."""
        return max(0, min(self.limit_bytes // 4, RECORD_BYTES_MAX) - HEADER.size)

    def get(self, key: bytes, secret: bytes, into: memoryview | None = None) -> Record | None:
        """What was put last under `key`, if it is still here. Never raises, never wrong bytes.

        `into`: where to put the payload, if it fits; whatever comes of it, what was there is gone.
        """
        index = self._index
        try:
            where = index.find(key)
            if where is None or where.length > (RECORD_BYTES_MAX if into is None else len(into)):
                return None
            payload = memoryview(bytearray(where.length)) if into is None else into[: where.length]
            record = read_at(self._path, where.pack, where.offset, payload, key, secret)
            if record is not None and not where.used:
                index.mark_used(where)
        except OSError as error:
            log.warning("the block cache cannot be read: %s", error)
            return None
        return record

    def has(self, key: bytes) -> bool:
        """Does the index know of it? (`get` may still find that it is gone, or damaged.) Never raises."""
        try:
            return self._index.find(key) is not None
        except OSError:
            return False

    def put(self, key: bytes, secret: bytes, segment_size: int, payload: bytes | memoryview) -> bool:
        """Keep it, in place of what had the key. False: there is no room, or the disk does not take it."""
        if len(payload) > self.record_bytes_max:
            return False
        head, payload = encode(key, secret, segment_size, payload)
        with self._writing:
            try:
                return self._append(key, head, payload)
            except OSError as error:
                log.warning("the block cache cannot be written: %s", error)
                return False

    # --- for what is pinned

    def give_way(self, size: int) -> bool:
        """Have room for a pack of `size` bytes beside this store. False: not on this disk. Raises OSError."""
        with self._writing:
            self._notice_removal()
            self._evict(list_packs(self._path), size)
            return self._make_room_on_disk(size)

    def adopt(self, pack: Path, records: Iterable[tuple[bytes, int, int]]) -> None:
        """Take over a pack of another store that nobody appends to, with its (key, offset, payload bytes) that count.

        Raises OSError.
        """
        with self._writing:
            self._notice_removal()
            number = max(list_packs(self._path), default=0) + 1
            while True:
                if number > PACK_NUMBER_MAX:
                    raise OSError("the block cache has used up its numbers")
                try:
                    pack_path(self._path, number).hardlink_to(pack)
                    break
                except FileExistsError:  # another process took it
                    number += 1
            pack.unlink()
            for key, offset, length in records:
                self._index.put(key, number, offset, length)
            self._evict(list_packs(self._path), 0)

    # --- writing, with the lock held

    def _append(self, key: bytes, head: bytes, payload: bytes | memoryview) -> bool:
        size = len(head) + len(payload)
        if self._pack is None or self._pack.gone or self._pack.size + size > max(self._pack_bytes, size):
            self._begin_pack(size)
        if not self._make_room_on_disk(size):
            return False
        self._write(key, head, payload)
        return True

    def _write(self, key: bytes, head: bytes, payload: bytes | memoryview) -> None:
        assert self._pack is not None
        offset = self._pack.append(head, payload)
        self._used_bytes += len(head) + len(payload)
        self._index.put(key, self._pack.number, offset, len(payload))

    def _begin_pack(self, size: int) -> None:
        starting = self._pack is None or self._pack.gone
        if self._pack is not None:
            self._pack.close()
            self._pack = None
        self._notice_removal()
        packs = list_packs(self._path)
        if starting and (resumed := resume_pack(self._path, packs, size, self._pack_bytes)) is not None:
            self._pack = resumed
            return
        rescued = self._evict(packs, size)
        self._pack = create_pack(self._path, packs)
        for key, head, payload in rescued:
            self._write(key, head, payload)

    def _notice_removal(self) -> None:
        """Begin anew when the cache was cleaned away under us. Raises OSError."""
        if not self._index.is_at(self._path / "index"):
            if self._old_index is not None:
                self._old_index.close()
            self._old_index, self._index = self._index, _open_index(self._path, self.limit_bytes)

    def _evict(self, packs: dict[int, int], size: int) -> list[tuple[bytes, bytes, bytes]]:
        """Make room for a pack that begins with a record of `size` bytes. Returns what gets a second chance."""
        limit = self.limit_bytes - self._index.disk_bytes - self._beside(self._pack_bytes)
        room = max(self._pack_bytes, size)
        budget = int(min(self._pack_bytes * RESCUE_SHARE, self._pack_bytes - size))
        rescued: list[tuple[bytes, bytes, bytes]] = []
        for number in list(packs)[:EVICTIONS_MAX]:
            if sum(max(held, self._pack_bytes) for held in packs.values()) + room <= limit:
                break
            rescued = self._rescue(number, budget)  # of several only the last one's: it was written last
            self._remove(packs, number)
        self._used_bytes = sum(packs.values())
        return rescued

    def _rescue(self, number: int, budget: int) -> list[tuple[bytes, bytes, bytes]]:
        """(key, header, payload) of records that were read since they were written, `budget` bytes at most."""
        try:
            fd = os.open(pack_path(self._path, number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return []
        found = []
        try:
            for offset, key, length in walk(fd):
                size = HEADER.size + length
                if self._deserves_rescue(self._index.find(key), number, offset) and size <= budget:
                    data = os.pread(fd, size, offset)
                    found.append((key, data[: HEADER.size], data[HEADER.size :]))
                    budget -= size
        finally:
            os.close(fd)
        return found

    def _deserves_rescue(self, where: Location | None, number: int, offset: int) -> bool:
        return where is not None and where.used and (where.pack, where.offset) == (number, offset)

    def _remove(self, packs: dict[int, int], number: int) -> None:
        del packs[number]
        with suppress(FileNotFoundError):  # another process was faster
            pack_path(self._path, number).unlink()

    def _make_room_on_disk(self, size: int) -> bool:
        """Is there more than FREE_BYTES_MIN left after `size` bytes? What we have gives way first."""
        if self._free_bytes() - size >= FREE_BYTES_MIN:
            return True
        packs = list_packs(self._path)
        for number in list(packs)[:EVICTIONS_MAX]:
            if self._pack is None or number != self._pack.number:
                self._remove(packs, number)
                if self._free_bytes() - size >= FREE_BYTES_MIN:
                    break
        self._used_bytes = sum(packs.values())
        return self._free_bytes() - size >= FREE_BYTES_MIN

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._path)
        return disk.f_bavail * disk.f_frsize


def _open_index(path: Path, limit_bytes: int) -> BlockIndex:
    """With the folder around it. One that is too small for the bound, or broken, is built anew from the packs."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    guard = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)  # two processes that start together make one index
        _remove_other_versions(path)
        path.mkdir(mode=0o700, exist_ok=True)
        wanted = slots_for(limit_bytes, RECORD_BYTES_USUAL)
        index = BlockIndex.open(path / "index")
        if index is not None and index.slots >= wanted:
            return index
        if index is not None:
            index.close()
        index = BlockIndex.create(path / "index", wanted)
        _fill_index(path, index)
        return index
    finally:
        os.close(guard)


def _fill_index(path: Path, index: BlockIndex) -> None:
    for number in list_packs(path):
        with suppress(FileNotFoundError):
            fd = os.open(pack_path(path, number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                for offset, key, length in walk(fd):
                    index.put(key, number, offset, length)
            finally:
                os.close(fd)


def _remove_other_versions(path: Path) -> None:
    for other in path.parent.iterdir():
        if other.name.startswith("blocks-") and other != path:
            log.info("removing a block cache of another version, %s", other.name)
            shutil.rmtree(other, ignore_errors=True)
