"""The ciphertext an upload helper holds, one file for each storage index, while it is on its way.

    helper/CHK_incoming/SI     the first so many bytes
    helper/CHK_encoding/SI     all of it; removed once its shares are on the grid

A file's length is all that is remembered: that is where fetching goes on, after a lost connection or a restart. What
nobody came back for makes room when room is needed, the oldest first, and goes after a while in any case.
Source: the directories of Tahoe-LAFS 1.20's helper, so that either program goes on with what the other has.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from attrs import define

from grid.formats.base32 import b2a
from grid.interfaces import EncodingParameters
from grid.operations.worker import run_cpu_work

Buffer = bytes | memoryview

SPOOL_BYTES_MAX: Final = 64 << 30  # of all files together
ABANDONED_S: Final = 14 * 86400  # nobody has come back for it


class HelperFiles:
    """The two directories. Calls are made from worker threads, for one storage index by one at a time."""

    def __init__(self, directory: Path, *, reserved_space: int) -> None:
        """`reserved_space`: bytes that must stay free on the disk."""
        self._incoming = directory / "CHK_incoming"
        self._encoding = directory / "CHK_encoding"
        self._reserved_space = reserved_space

    def prepare(self) -> None:
        """Raises OSError."""
        for directory in (self._incoming, self._encoding):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def whole(self, storage_index: bytes) -> Path | None:
        """The file that holds all of the ciphertext, if there is one."""
        path = self._encoding / b2a(storage_index)
        return path if path.is_file() else None

    def partial(self, storage_index: bytes) -> Partial:
        """What was fetched so far, open; made when there is nothing."""
        path = self._incoming / b2a(storage_index)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        return Partial(path, self._encoding / path.name, descriptor, os.fstat(descriptor).st_size)

    def remove(self, storage_index: bytes) -> None:
        for directory in (self._incoming, self._encoding):
            (directory / b2a(storage_index)).unlink(missing_ok=True)

    def bytes_held(self) -> int:
        return sum(size for _, size, _ in self._files())

    def make_room(self, wanted_bytes: int, in_use: Collection[bytes]) -> bool:
        """Whether so many bytes more may be kept. Removes files of storage indexes that nobody uses, if it has to."""
        used = {b2a(storage_index) for storage_index in in_use}
        files = sorted(self._files())
        held = sum(size for _, size, _ in files)
        for modified, size, path in files:
            expired = time.time() - modified > ABANDONED_S
            if path.name not in used and (expired or not self._fits(held + wanted_bytes, wanted_bytes)):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                held -= size
        return self._fits(held + wanted_bytes, wanted_bytes)

    def _fits(self, total: int, more: int) -> bool:
        status = os.statvfs(self._incoming)
        return total <= SPOOL_BYTES_MAX and more <= status.f_frsize * status.f_bavail - self._reserved_space

    def _files(self) -> list[tuple[float, int, Path]]:
        """(modification time, bytes, path) of every file."""
        found = []
        for path in (*self._incoming.iterdir(), *self._encoding.iterdir()):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found


@define
class Partial:
    """A file being fetched. `length`: bytes it has."""

    path: Path
    final_path: Path
    _descriptor: int
    length: int

    def append(self, pieces: Sequence[Buffer]) -> None:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                written = os.pwrite(self._descriptor, rest, self.length)
                self.length += written
                rest = rest[written:]

    def start_over(self) -> None:
        os.ftruncate(self._descriptor, 0)
        self.length = 0

    def complete(self) -> Path:
        """All is there, and on the disk."""
        os.fsync(self._descriptor)
        self.path.replace(self.final_path)
        return self.final_path

    def close(self) -> None:
        os.close(self._descriptor)


class CiphertextFile:
    """ICiphertextSource: a file of ciphertext, read front to back, in worker threads."""

    reads_in_thread = True

    def __init__(self, path: Path, storage_index: bytes, params: EncodingParameters) -> None:
        self._file = path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._storage_index = storage_index
        self._params = params

    async def get_size(self) -> int:
        return self._size

    async def get_all_encoding_parameters(self) -> EncodingParameters:
        return self._params

    async def get_storage_index(self) -> bytes:
        return self._storage_index

    async def read_encrypted(self, length: int, hash_only: bool) -> Sequence[Buffer]:
        return await run_cpu_work(lambda: self.read_encrypted_sync(length), length)

    def read_encrypted_sync(self, length: int) -> Sequence[Buffer]:
        pieces: list[Buffer] = []
        while length and (piece := self._file.read(length)):
            pieces.append(piece)
            length -= len(piece)
        return pieces

    def close(self) -> None:
        self._file.close()
