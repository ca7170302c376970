"""Sealed files as IUploadables: from the spool alone, or with what is on the grid only read from there meanwhile.

    complete      read in worker threads (`SpoolUploadable`)
    not complete  twice front to back: once for the convergent key, once to be encoded; held nowhere but for a chunk,
                  and in the block cache as far as that goes. So a few bytes of a file can be changed that is larger
                  than the spool may be.

What the file was written over must stay what it is between the two (`SealedFile.pinned`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

import trio

from cache.backoff import delay_s
from cache.sealed import BASE_TIMEOUT_S, CHUNK_BYTES, SealedFile
from cache.spool import SpoolFullError
from grid.errors import GridError
from grid.interfaces import EncodingParameters
from grid.operations.worker import run_cpu_work

BASE_TRIES: Final = 3  # to read it, before the whole upload has failed
BASE_RETRY_FIRST_S: Final = 1.0
BASE_RETRY_MOST_S: Final = 10.0


class BaseUnreadableError(GridError):
    """What a file was written over cannot be read, so that it cannot be sent. Trying again may help."""


@contextmanager
def base_is_read() -> Iterator[None]:
    """Whatever fails meanwhile is the base's fault, not that of the servers the file is sent to."""
    try:
        yield
    except SpoolFullError:
        raise
    except (GridError, trio.TooSlowError) as error:
        said = str(error) or "the grid takes too long"
        raise BaseUnreadableError(f"what it was written over cannot be read: {said}") from error


class SealedUploadable:
    """A sealed file as an IUploadable. Holds the file open until `close`; `told` how many bytes were read."""

    def __init__(self, sealed: SealedFile, told: Callable[[int], None] = lambda count: None) -> None:
        self._contents = sealed.open()
        self._sealed = sealed
        self._told = told
        self._position = 0

    def set_default_encoding_parameters(self, params: Mapping[str, int]) -> None:
        """Has no effect: the encoding was fixed when the file was written, and the key depends on it."""

    async def get_size(self) -> int:
        return self._sealed.size

    async def get_all_encoding_parameters(self) -> EncodingParameters:
        encoding = self._sealed.encoding
        return EncodingParameters(encoding.k, encoding.happy, encoding.n, encoding.segment_size(self._sealed.size))

    async def get_encryption_key(self) -> bytes:
        """Raises BaseUnreadableError."""
        return await self._sealed.encryption_key(self.fetch)

    async def fetch(self, offset: int, length: int) -> bytes:
        """Any part of it, of at most a few chunks. Tries several times; raises BaseUnreadableError."""
        attempt = 0
        while True:
            attempt += 1
            try:
                with base_is_read(), trio.fail_after(BASE_TIMEOUT_S):
                    data = await self._sealed.read(offset, length)
            except BaseUnreadableError:
                if attempt == BASE_TRIES:
                    raise
                await trio.sleep(delay_s(attempt, BASE_RETRY_FIRST_S, BASE_RETRY_MOST_S))
            else:
                self._told(len(data))
                return data

    async def read(self, length: int) -> Sequence[bytes | memoryview]:
        """Raises BaseUnreadableError."""
        return [await self.fetch(start, stop - start) for start, stop in self._next(length)]

    def _next(self, length: int) -> list[tuple[int, int]]:
        """Moves on."""
        start = self._position
        self._position = min(start + length, self._sealed.size)
        return [(at, min(at + CHUNK_BYTES, self._position)) for at in range(start, self._position, CHUNK_BYTES)]

    def rewind(self) -> None:
        self._position = 0

    async def close(self) -> None:
        self._contents.close()


class SpoolUploadable(SealedUploadable):
    """A complete one: can be read in worker threads, and needs no grid."""

    async def read(self, length: int) -> Sequence[bytes | memoryview]:
        return await run_cpu_work(partial(self.read_sync, length), length)

    def read_sync(self, length: int) -> Sequence[bytes | memoryview]:
        return [self._sealed.read_sync(start, stop - start) for start, stop in self._next(length)]


def uploadable_of(sealed: SealedFile, told: Callable[[int], None]) -> SealedUploadable:
    return SpoolUploadable(sealed) if sealed.complete else SealedUploadable(sealed, told)
