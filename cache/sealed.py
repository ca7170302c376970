"""A finished file in the spool, on its way to the grid: never changes again, and is read as an IUploadable.

It may still show parts of what it was written over (`Layers`); `fill` fetches those, after which it stands by
itself. Reads of more than a chunk, hashing and uploading happen in worker threads, on descriptors that are open only
meanwhile.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, Self

import trio

from cache.convergence import FileEncoding, RunningHash
from cache.layers import Layers, read_under
from cache.spool import Spool, SpoolFile
from grid.crypto import KEY_BYTES
from grid.formats.hashutil import TaggedHasher
from grid.interfaces import EncodingParameters
from grid.operations.worker import run_cpu_work

CHUNK_BYTES: Final = 1 << 20  # read, fetched or hashed at a time
HASH_HOP_BYTES: Final = 16 << 20  # per thread hop of the key pass, so that cancelling does not wait for a whole file


class SealedFile:
    """A finished file in the spool. Owned (once) by whoever sealed it, until `release`."""

    def __init__(self, layers: Layers, encoding: FileEncoding, running: RunningHash, depth: int) -> None:
        self._layers = layers
        self._encoding = encoding
        self._running = running
        self._key: bytes | None = None
        self._filling = trio.Lock()  # held over fetches from the base and spool writes by `fill`, nothing else
        self._owners = 1
        self.size = layers.size
        self.depth = depth

    @property
    def encoding(self) -> FileEncoding:
        return self._encoding

    @property
    def file(self) -> SpoolFile:
        return self._layers.file

    @property
    def held_bytes(self) -> int:
        """Bytes in the spool; a complete file's does not change."""
        return self._layers.file.spans.total

    @property
    def complete(self) -> bool:
        return not self._layers.missing()

    @property
    def gone(self) -> bool:
        return self._owners == 0

    def open(self) -> SealedContents:
        """To read; may be done as long as somebody owns the file, and outlives that."""
        return SealedContents(self)

    def retain(self) -> Self:
        self._owners += 1
        return self

    def release(self) -> None:
        self._owners -= 1
        if self._owners == 0:
            self._layers.file.release()
            if self._layers.base is not None:
                self._layers.base.close()

    async def fill(self, spool: Spool, wait_s: float) -> None:
        """Fetch what is still the base's alone, so that the file stands by itself. Raises GridError."""
        layers = self._layers
        async with self._filling:
            with _opened(layers.file):
                for start, stop in layers.missing():
                    for position in range(start, stop, CHUNK_BYTES):
                        end = min(position + CHUNK_BYTES, stop)
                        data = await read_under(layers.base, layers.base_stop, position, end)
                        await spool.room(len(data), wait_s)
                        await trio.to_thread.run_sync(layers.file.write, position, data)
            base, layers.base, layers.base_stop = layers.base, None, 0
            self.depth = 1
            if base is not None:
                base.close()

    async def encryption_key(self) -> bytes:
        """16 bytes, the same at every call: convergent, or random. The file must be complete."""
        if self._key is None and self.encoding.convergence is None:
            self._key = secrets.token_bytes(KEY_BYTES)
        if self._key is None:
            hasher, done = self._running.take(self.size)
            with _opened(self.file):
                for start in range(done, self.size, HASH_HOP_BYTES):
                    stop = min(start + HASH_HOP_BYTES, self.size)
                    await run_cpu_work(partial(self._hash_range, hasher, start, stop), stop - start)
            self._key = hasher.digest()[:KEY_BYTES]
        return self._key

    def _hash_range(self, hasher: TaggedHasher, start: int, stop: int) -> None:
        for position in range(start, stop, CHUNK_BYTES):
            hasher.update(self.read_sync(position, min(CHUNK_BYTES, stop - position)))

    async def read(self, offset: int, length: int) -> bytes:
        return await self._layers.read(offset, length)

    def read_now(self) -> bytes:
        """All of it, on the spot: for complete files of a few bytes."""
        with _opened(self.file):
            return self.read_sync(0, self.size)

    def read_sync(self, offset: int, length: int) -> bytes:
        """In a worker thread; only of a complete file whose descriptor is open."""
        stop = min(offset + length, self.size)
        pieces = [
            self._layers.file.read(a, b - a) if held else bytes(b - a)
            for a, b, held in self._layers.file.spans.cut(offset, stop)
        ]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class SealedContents:
    """A sealed file, to read."""

    def __init__(self, sealed: SealedFile) -> None:
        self._sealed = sealed.retain()
        self._open = True
        sealed.file.open()

    @property
    def size(self) -> int:
        return self._sealed.size

    @property
    def depth(self) -> int:
        """How many sealed files are laid over each other here."""
        return self._sealed.depth

    async def read(self, offset: int, length: int) -> bytes:
        if not self._open:
            raise ValueError("these contents are closed")
        if length > CHUNK_BYTES and self._sealed.complete:
            return await run_cpu_work(partial(self._sealed.read_sync, offset, length), length)
        return await self._sealed.read(offset, length)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._sealed.file.shut()
            self._sealed.release()


class SpoolUploadable:
    """A complete sealed file as an IUploadable, readable from worker threads. Holds the file open until `close`."""

    def __init__(self, sealed: SealedFile) -> None:
        self._contents = sealed.open()
        self._sealed = sealed
        self._position = 0

    def set_default_encoding_parameters(self, params: Mapping[str, int]) -> None:
        """Has no effect: the encoding was fixed when the file was written, and the key depends on it."""

    async def get_size(self) -> int:
        return self._sealed.size

    async def get_all_encoding_parameters(self) -> EncodingParameters:
        encoding = self._sealed.encoding
        return EncodingParameters(encoding.k, encoding.happy, encoding.n, encoding.segment_size(self._sealed.size))

    async def get_encryption_key(self) -> bytes:
        return await self._sealed.encryption_key()

    async def read(self, length: int) -> Sequence[bytes | memoryview]:
        return await run_cpu_work(partial(self.read_sync, length), length)

    def read_sync(self, length: int) -> Sequence[bytes | memoryview]:
        start = self._position
        self._position = min(start + length, self._sealed.size)
        return [
            self._sealed.read_sync(position, min(CHUNK_BYTES, self._position - position))
            for position in range(start, self._position, CHUNK_BYTES)
        ]

    def rewind(self) -> None:
        self._position = 0

    async def close(self) -> None:
        self._contents.close()


@contextmanager
def _opened(file: SpoolFile) -> Iterator[SpoolFile]:
    file.open()
    try:
        yield file
    finally:
        file.shut()
