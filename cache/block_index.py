"""Where the block store's records stand: a hash table in one file, shared by all processes of a node directory.

    index   header 4096 bytes: magic 8 | slots u64 | zeros
            slots, 32 bytes each, in buckets of 16:
            key 16 (the first half of the record's key) | pack u32 | offset u32 | length u32 | used u8 | zeros 3
            pack 0: the slot is empty

It is a hint and nothing more. Records prove themselves (`cache/block_packs.py`), so whatever is wrong here, by a
crash, by two processes that write one slot, or by a flipped bit, makes a miss and never wrong bytes. Hence no locks
and no flushing. It is read and written with pread and pwrite: a mapping would kill the process with SIGBUS when
somebody truncates the file or the disk fills up.

A bucket that is full gives up the slot whose record is oldest. All methods may be called from any thread.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from attrs import frozen

MAGIC: Final = b"tfsidx\x00\x01"
HEADER_BYTES: Final = 4096
SLOT: Final = struct.Struct(">16sIIIB3x")
BUCKET_SLOTS: Final = 16
BUCKET_BYTES: Final = BUCKET_SLOTS * SLOT.size
SLOTS_MIN: Final = 1 << 8
SLOTS_MAX: Final = 1 << 28
KEY_BYTES: Final = 32
_HEADER: Final = struct.Struct(">8sQ")
_USED_AT: Final = SLOT.size - 4  # of the flag, in a slot


@frozen
class Location:
    """Where a record stands, as far as the index knows."""

    pack: int
    offset: int  # bytes, of the record's header
    length: int  # bytes of its payload
    used: bool  # since it was written
    slot_at: int  # of its slot in the index file


class BlockIndex:
    """One open index file. A missing or shorter file reads as empty."""

    def __init__(self, fd: int, slots: int) -> None:
        self._fd = fd
        self.slots = slots

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """The index at `path`; None if there is none, or it is none of ours. Raises OSError."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        header = os.pread(fd, _HEADER.size, 0)
        magic, slots = _HEADER.unpack(header) if len(header) == _HEADER.size else (b"", 0)
        if magic != MAGIC or not SLOTS_MIN <= slots <= SLOTS_MAX or slots & (slots - 1):
            os.close(fd)
            return None
        return cls(fd, slots)

    @classmethod
    def create(cls, path: Path, slots: int) -> Self:
        """An empty one, which takes the place of what is at `path`. Raises OSError."""
        made = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        fd = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.pwrite(fd, _HEADER.pack(MAGIC, slots), 0)
        os.ftruncate(fd, HEADER_BYTES + slots * SLOT.size)
        made.rename(path)
        return cls(fd, slots)

    def close(self) -> None:
        os.close(self._fd)

    def is_at(self, path: Path) -> bool:
        """Is this still the file of that name? It may have been removed or replaced under us."""
        try:
            there, ours = path.stat(), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    @property
    def disk_bytes(self) -> int:
        """What it may come to take on the disk."""
        return HEADER_BYTES + self.slots * SLOT.size

    def find(self, key: bytes) -> Location | None:
        """Raises OSError."""
        for at, (half, pack, offset, length, used) in self._bucket(key):
            if pack and half == key[:16]:
                return Location(pack, offset, length, bool(used), at)
        return None

    def put(self, key: bytes, pack: int, offset: int, length: int) -> None:
        """Remember a record, in place of an earlier one of the same key. Raises OSError."""
        choice, oldest = -1, 1 << 32
        for at, (half, held_by, _, _, _) in self._bucket(key):
            if held_by and half == key[:16]:
                choice = at
                break
            if held_by < oldest:  # an empty slot has pack 0
                choice, oldest = at, held_by
        os.pwrite(self._fd, SLOT.pack(key[:16], pack, offset, length, 0), choice)

    def mark_used(self, location: Location) -> None:
        """For whoever decides what is evicted. Raises OSError."""
        os.pwrite(self._fd, b"\x01", location.slot_at + _USED_AT)

    def _bucket(self, key: bytes) -> Iterator[tuple[int, tuple[bytes, int, int, int, int]]]:
        number = int.from_bytes(key[16:24], "big") % (self.slots // BUCKET_SLOTS)
        start = HEADER_BYTES + number * BUCKET_BYTES
        data = os.pread(self._fd, BUCKET_BYTES, start).ljust(BUCKET_BYTES, b"\0")
        for place, slot in enumerate(SLOT.iter_unpack(data)):
            yield start + place * SLOT.size, slot


def slots_for(limit_bytes: int, record_bytes: int) -> int:
    """A power of two that has room for `limit_bytes` of records of that size."""
    wanted = max(SLOTS_MIN, min(SLOTS_MAX, -(-limit_bytes // record_bytes)))
    return 1 << (wanted - 1).bit_length()
