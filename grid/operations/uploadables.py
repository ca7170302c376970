"""Plaintext on its way to the grid: where it comes from, its key, and its ciphertext.

An uploadable is read once, front to back; with a convergence secret there is one pass before that, to derive
the key from the contents. Those here can also be read from a worker thread (`read_sync`), which saves the
encoder a hop per segment; others only have the awaitable `read` of IUploadable.
"""

from __future__ import annotations

import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from io import BufferedIOBase, RawIOBase
from pathlib import Path
from typing import BinaryIO, Final, Protocol, runtime_checkable

import trio

from grid import crypto
from grid.errors import GridError
from grid.formats import hashutil
from grid.formats.segments import MAX_SEGMENT_BYTES, choose_segment_size
from grid.interfaces import EncodingParameters, IUploadable
from grid.operations.worker import run_cpu_work

Buffer = bytes | memoryview

DEFAULT_PARAMETERS: Final[Mapping[str, int]] = {"k": 3, "happy": 7, "n": 10, "max_segment_size": MAX_SEGMENT_BYTES}
SHARES_MAX: Final = 256
HASH_CHUNK_BYTES: Final = 1 << 20
HASH_HOP_BYTES: Final = 16 << 20  # per thread hop of the key pass, so that cancelling does not wait for a whole file
# Hashes of plaintext would tell a helper, and everybody else, what a file is: shares have zeros instead.
_NO_HASH: Final = bytes(hashutil.HASH_BYTES)


class SourceChangedError(GridError):
    """A file changed while it was uploaded. Nothing was linked; upload it again."""


@runtime_checkable
class ISyncReadable(Protocol):
    """An uploadable that can be read from a worker thread."""

    def read_sync(self, length: int) -> Sequence[Buffer]: ...


@runtime_checkable
class IRewindable(Protocol):
    """An uploadable that can be read again from its start."""

    def rewind(self) -> None: ...


class ICiphertextSource(Protocol):
    """What an encoder needs of an IEncryptedUploadable."""

    async def get_size(self) -> int: ...
    async def get_all_encoding_parameters(self) -> EncodingParameters: ...
    async def get_storage_index(self) -> bytes: ...
    async def read_encrypted(self, length: int, hash_only: bool) -> Sequence[Buffer]: ...


@runtime_checkable
class ISyncEncryptedReadable(Protocol):
    """The same for ciphertext; `reads_in_thread` says whether it can be done with this source."""

    @property
    def reads_in_thread(self) -> bool: ...
    def read_encrypted_sync(self, length: int) -> Sequence[Buffer]: ...


class Keyed(ABC):
    """Parameters and key, the same for every source."""

    def __init__(self, convergence: bytes | None) -> None:
        self._convergence = convergence  # None: a random key, so nobody can tell what was uploaded
        self._defaults = dict(DEFAULT_PARAMETERS)
        self._key: bytes | None = None

    def set_default_encoding_parameters(self, params: Mapping[str, int]) -> None:
        self._defaults.update(params)

    async def get_all_encoding_parameters(self) -> EncodingParameters:
        k, happy, n = (self._defaults[name] for name in ("k", "happy", "n"))
        if not (1 <= k <= n <= SHARES_MAX and 1 <= happy <= n):
            raise ValueError(f"impossible encoding parameters: {k} of {n}, happy {happy}")
        segment_size = choose_segment_size(await self.get_size(), k, self._defaults["max_segment_size"])
        return EncodingParameters(k, happy, n, segment_size)

    async def get_encryption_key(self) -> bytes:
        if self._key is None:
            self._key = secrets.token_bytes(crypto.KEY_BYTES)
            if self._convergence is not None:
                self._key = await self._convergent_key(self._convergence)
        return self._key

    async def _convergent_key(self, secret: bytes) -> bytes:
        params = await self.get_all_encoding_parameters()
        hasher = hashutil.convergence_hasher(secret, params.k, params.n, params.segment_size)
        await self._hash_contents(hasher.update)
        return hasher.digest()[: crypto.KEY_BYTES]

    @abstractmethod
    async def get_size(self) -> int: ...
    @abstractmethod
    async def _hash_contents(self, update: Callable[[Buffer], None]) -> None:
        """Give it all contents, front to back."""


class _Uploadable(Keyed):
    """A source that can be read by position, in a worker thread."""

    async def _hash_contents(self, update: Callable[[Buffer], None]) -> None:
        size = await self.get_size()
        for start in range(0, size, HASH_HOP_BYTES):
            stop = min(start + HASH_HOP_BYTES, size)

            def hash_range(start: int = start, stop: int = stop) -> None:
                for position in range(start, stop, HASH_CHUNK_BYTES):
                    update(self._pread(position, min(HASH_CHUNK_BYTES, stop - position)))

            await run_cpu_work(hash_range, stop - start)

    async def read(self, length: int) -> Sequence[Buffer]:
        return await run_cpu_work(lambda: self.read_sync(length), length)

    @abstractmethod
    def read_sync(self, length: int) -> Sequence[Buffer]: ...
    @abstractmethod
    def _pread(self, offset: int, length: int) -> Buffer: ...


class DataUploadable(_Uploadable):
    """Bytes in memory, not copied: they must not change until the upload is over."""

    def __init__(self, data: Buffer, convergence: bytes | None = None) -> None:
        super().__init__(convergence)
        self._data = memoryview(data)
        self._position = 0

    async def get_size(self) -> int:
        return len(self._data)

    def read_sync(self, length: int) -> Sequence[Buffer]:
        piece = self._pread(self._position, length)
        self._position += len(piece)
        return [piece] if piece else []

    def _pread(self, offset: int, length: int) -> Buffer:
        return self._data[offset : offset + length]

    def rewind(self) -> None:
        self._position = 0

    async def close(self) -> None:
        self._data = memoryview(b"")


class FileUploadable(_Uploadable):
    """A file: by path (opened here, closed here), or open for reading in binary (closing is its owner's job).

    Its size is taken at first use. A file that changes meanwhile raises SourceChangedError: two contents must
    not be encrypted with one convergent key.
    """

    def __init__(self, source: Path | str | BinaryIO | RawIOBase | BufferedIOBase, convergence: bytes | None = None):
        super().__init__(convergence)
        self._path = Path(source) if isinstance(source, str | Path) else None
        self._fd: int | None = None if isinstance(source, str | Path) else source.fileno()
        self._position = 0
        self._seen: tuple[int, int] | None = None  # size in bytes, modification time in ns

    async def get_size(self) -> int:
        if self._fd is None:
            if self._path is None:
                raise ValueError("this uploadable is closed")
            self._fd = await trio.to_thread.run_sync(os.open, self._path, os.O_RDONLY | os.O_CLOEXEC)
        if self._seen is None:
            self._seen = self._look()
        return self._seen[0]

    def _look(self) -> tuple[int, int]:
        assert self._fd is not None
        stat = os.fstat(self._fd)
        return stat.st_size, stat.st_mtime_ns

    def read_sync(self, length: int) -> Sequence[Buffer]:
        assert self._seen is not None, "get_size() comes first"
        length = min(length, self._seen[0] - self._position)
        if length <= 0:
            return []
        piece = self._pread(self._position, length)
        self._position += len(piece)
        if self._look() != self._seen:
            raise SourceChangedError("the file changed while it was being uploaded")
        return [piece]

    def _pread(self, offset: int, length: int) -> Buffer:
        assert self._fd is not None
        piece = os.pread(self._fd, length, offset)
        while len(piece) < length:  # a signal or a network file system may cut a read short
            more = os.pread(self._fd, length - len(piece), offset + len(piece))
            if not more:
                raise SourceChangedError("the file became shorter while it was being uploaded")
            piece += more
        return piece

    def rewind(self) -> None:
        self._position = 0

    async def close(self) -> None:
        if self._path is not None and self._fd is not None:
            fd, self._fd, self._path = self._fd, None, None
            os.close(fd)


class FreshKey:
    """The same plaintext under a random key, from its start again. Its owner still closes the other uploadable."""

    def __init__(self, uploadable: IUploadable) -> None:
        assert isinstance(uploadable, IRewindable)
        uploadable.rewind()
        self._uploadable = uploadable
        self._key = secrets.token_bytes(crypto.KEY_BYTES)

    def set_default_encoding_parameters(self, params: Mapping[str, int]) -> None:
        self._uploadable.set_default_encoding_parameters(params)

    async def get_size(self) -> int:
        return await self._uploadable.get_size()

    async def get_all_encoding_parameters(self) -> EncodingParameters:
        return await self._uploadable.get_all_encoding_parameters()

    async def get_encryption_key(self) -> bytes:
        return self._key

    async def read(self, length: int) -> Sequence[Buffer]:
        return await self._uploadable.read(length)

    async def close(self) -> None:
        await self._uploadable.close()


class EncryptAnUploadable:
    """IEncryptedUploadable: an uploadable's ciphertext, one AES-CTR stream over the file."""

    def __init__(self, uploadable: IUploadable) -> None:
        self._uploadable = uploadable
        self._stream: crypto.AESCTRStream | None = None

    async def get_size(self) -> int:
        return await self._uploadable.get_size()

    async def get_all_encoding_parameters(self) -> EncodingParameters:
        return await self._uploadable.get_all_encoding_parameters()

    async def get_storage_index(self) -> bytes:
        return hashutil.chk_storage_index(await self._prepare())

    async def _prepare(self) -> bytes:
        key = await self._uploadable.get_encryption_key()
        if self._stream is None:
            self._stream = crypto.AESCTRStream(key)
        return key

    @property
    def reads_in_thread(self) -> bool:
        """Whether `read_encrypted_sync` can be used."""
        return isinstance(self._uploadable, ISyncReadable)

    async def read_encrypted(self, length: int, hash_only: bool) -> Sequence[Buffer]:
        """`hash_only`: move on over these bytes, which nobody wants."""
        await self._prepare()
        pieces = await self._uploadable.read(length)
        encrypted = await run_cpu_work(lambda: self._encrypt(pieces), length)
        return [] if hash_only else encrypted

    def read_encrypted_sync(self, length: int) -> Sequence[Buffer]:
        """The same in a worker thread. `get_storage_index` comes first."""
        assert isinstance(self._uploadable, ISyncReadable)
        return self._encrypt(self._uploadable.read_sync(length))

    def _encrypt(self, pieces: Sequence[Buffer]) -> list[Buffer]:
        assert self._stream is not None
        return [self._stream.update(piece) for piece in pieces]

    async def get_plaintext_hashtree_leaves(self, first: int, last: int, num_segments: int) -> Sequence[bytes]:
        return [_NO_HASH] * len(range(num_segments)[first:last])

    async def get_plaintext_hash(self) -> bytes:
        return _NO_HASH

    async def close(self) -> None:
        await self._uploadable.close()
