"""The files that hold the block store's records, one after the other.

    <number, 8 hex digits>.pack   records:
        magic 4 | length u32 | segment size u64 | key 32 | salt 16 | code 16 | payload, `length` bytes

`code` is a GMAC of the payload under a key of this record alone: the HMAC-SHA256 of all before the code, under a secret
that follows from the file's read key. Who cannot read the file cannot make a record of it that is believed, and a torn
or flipped one is none. It is checked at every read; SHA-256 over the payload would take most of the time of one.

A pack is appended to by one process, which holds its lock (flock), and read by all. One whose process is gone is
continued by the next. Numbers grow: a lower one is older. All functions may be called from any thread.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from attrs import frozen

from grid.crypto import one_time_code

MAGIC: Final = b"TFb2"
HEADER: Final = struct.Struct(">4sIQ32s16s16s")
SALT_BYTES: Final = 16
PACK_NUMBER_MAX: Final = (1 << 32) - 1
RESUME_TRIES: Final = 8  # packs looked at for one to go on with
_CODED_BYTES: Final = HEADER.size - 16
_NAME: Final = re.compile(r"([0-9a-f]{8})\.pack")


@frozen
class Record:
    """One block, proven to be what was stored under its key."""

    segment_size: int  # bytes in each segment of its file but the last
    payload: memoryview


def encode(
    key: bytes, secret: bytes, segment_size: int, payload: bytes | memoryview
) -> tuple[bytes, bytes | memoryview]:
    """Header and payload of a record, to be written in this order."""
    salt = secrets.token_bytes(SALT_BYTES)  # so that the code's key is new, whatever was kept under `key` before
    head = HEADER.pack(MAGIC, len(payload), segment_size, key, salt, b"")[:_CODED_BYTES]
    return head + _code(secret, head, payload), payload


def decode(head: bytes | bytearray, payload: memoryview, key: bytes, secret: bytes) -> Record | None:
    """The record of that header and payload, if it is whole and of this key."""
    magic, length, segment_size, found, _, code = HEADER.unpack(head)
    if magic != MAGIC or found != key or len(payload) != length:
        return None
    if not hmac.compare_digest(_code(secret, head[:_CODED_BYTES], payload), code):
        return None
    return Record(segment_size, payload)


def _code(secret: bytes, head: bytes | bytearray, payload: bytes | memoryview) -> bytes:
    return one_time_code(hmac.digest(secret, head, hashlib.sha256), payload)


def pack_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08x}.pack"


def list_packs(folder: Path) -> dict[int, int]:
    """{number: bytes} of all packs there, the oldest first. Raises OSError."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if match := _NAME.fullmatch(entry.name):
                try:
                    found[int(match[1], 16)] = entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue  # another process evicted it just now
    return dict(sorted(found.items()))


def read_at(folder: Path, number: int, offset: int, payload: memoryview, key: bytes, secret: bytes) -> Record | None:
    """The record of `key` that begins at `offset`, its payload in the place given. None: not there. Raises OSError."""
    try:
        fd = os.open(pack_path(folder, number), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    head = bytearray(HEADER.size)
    try:
        count = os.preadv(fd, [head, payload], offset)
    finally:
        os.close(fd)
    return decode(head, payload, key, secret) if count == len(head) + len(payload) else None


def walk(fd: int) -> Iterator[tuple[int, bytes, int]]:
    """(offset, key, payload bytes) of each record, up to the first place where none can be. Believes headers."""
    offset, stop = 0, os.fstat(fd).st_size
    while len(head := os.pread(fd, HEADER.size, offset)) == HEADER.size:
        magic, length, _, key, _, _ = HEADER.unpack(head)
        if magic != MAGIC or offset + HEADER.size + length > stop:
            return
        yield offset, key, length
        offset += HEADER.size + length


class OpenPack:
    """A pack this process appends to."""

    def __init__(self, fd: int, number: int, size: int) -> None:
        self._fd = fd
        self.number = number
        self.size = size

    @classmethod
    def create(cls, folder: Path, number: int) -> Self:
        """Raises FileExistsError when another process was faster, OSError."""
        fd = os.open(pack_path(folder, number), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return cls(fd, number, 0)

    @classmethod
    def resume(cls, folder: Path, number: int) -> Self | None:
        """Go on with a pack that was left; None when a living process has it, or it is gone. Raises OSError."""
        try:
            fd = os.open(pack_path(folder, number), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return None
        end = 0
        for offset, _, length in walk(fd):
            end = offset + HEADER.size + length
        os.ftruncate(fd, end)  # a record that was being written when its process died
        return cls(fd, number, end)

    def close(self) -> None:
        os.close(self._fd)

    @property
    def gone(self) -> bool:
        """Was it removed, by another process or by somebody who cleaned up?"""
        return os.fstat(self._fd).st_nlink == 0

    def append(self, head: bytes, payload: bytes | memoryview) -> int:
        """Returns the offset of the new record. Raises OSError; the pack is then as before."""
        offset, wanted = self.size, len(head) + len(payload)
        done = os.pwritev(self._fd, [head, payload], offset)
        rest = memoryview(payload)[max(0, done - len(head)) :]
        while done < wanted:  # a disk that is nearly full takes a part first, and says so at the next try
            if done < len(head):
                raise OSError(f"only {done} bytes of a record were written")
            written = os.pwrite(self._fd, rest, offset + done)
            done, rest = done + written, rest[written:]
        self.size += wanted
        return offset

    def read(self, offset: int, length: int) -> bytes:
        """Fewer bytes at the end. Raises OSError."""
        return os.pread(self._fd, length, offset)

    def flush(self) -> None:
        """Have all that was appended on the disk. Raises OSError."""
        os.fdatasync(self._fd)


def resume_pack(folder: Path, packs: dict[int, int], room: int, pack_bytes: int) -> OpenPack | None:
    """One of `packs` that a process which is gone left with `room` bytes to spare. Raises OSError."""
    for number in [*reversed(packs)][:RESUME_TRIES]:
        if packs[number] + room <= pack_bytes:
            pack = OpenPack.resume(folder, number)
            if pack is not None and not pack.gone:
                return pack
            if pack is not None:
                pack.close()
    return None


def create_pack(folder: Path, packs: dict[int, int]) -> OpenPack:
    """An empty one, younger than all `packs`. Raises OSError."""
    number = max(packs, default=0)
    while number < PACK_NUMBER_MAX:
        number += 1
        try:
            return OpenPack.create(folder, number)
        except FileExistsError:
            continue  # another process took it
    raise OSError("the block cache has used up its numbers")
