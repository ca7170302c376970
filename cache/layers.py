"""What can be read (`Contents`), and a spool file laid over what was there before (`Layers`).

    [0, size)   held in the spool file     written since it was opened
                not held, below base_stop  the base's bytes: fetched when they are read, or before they are uploaded
                not held, from base_stop   zeros

so opening costs nothing, truncating up costs nothing, and only what was written takes room.

No locks: `read` takes what it needs from the spool before its first await, so a write or truncate that comes while
it waits for the base cannot make it return garbage.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from cache.spool import SpoolFile
from grid.errors import FormatError, NotEnoughSharesError
from grid.formats.caps import Cap, LiteralCap


class Contents(Protocol):
    """The bytes of one file, or of one version of it, to read."""

    @property
    def size(self) -> int: ...

    @property
    def cap(self) -> Cap | None:
        """Of what it is; None while that is not on the grid."""

    async def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`, fewer only at the end. Raises GridError."""

    def close(self) -> None:
        """Let go of what is held. Harmless when repeated."""


class BytesContents:
    """Contents in memory: a literal cap's."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.cap = LiteralCap(data)

    @property
    def size(self) -> int:
        return len(self._data)

    async def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

    def close(self) -> None:
        pass


class LazyContents:
    """A file on the grid, opened when it is first read."""

    def __init__(self, cap: Cap, size: int, opener: Callable[[Cap], Awaitable[Contents]]) -> None:
        self.cap = cap
        self.size = size
        self._opener = opener
        self._opening = trio.Lock()  # held over the first opening
        self._contents: Contents | None = None

    async def read(self, offset: int, length: int) -> bytes:
        async with self._opening:
            if self._contents is None:
                self._contents = await self._opener(self.cap)
        return await self._contents.read(offset, length)

    def close(self) -> None:
        if self._contents is not None:
            self._contents.close()


class LiveContents:
    """A mutable file that is changed in place, as the grid has it whenever it is read.

    `size` stays what it was: where the file has become shorter there are zeros. `contents`: of the latest version, if
    they are open already.
    """

    def __init__(
        self, cap: Cap, size: int, opener: Callable[[Cap], Awaitable[Contents]], contents: Contents | None = None
    ) -> None:
        self.cap = cap
        self.size = size
        self._opener = opener
        self._opening = trio.Lock()  # held over an opening
        self._contents = contents

    async def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        contents = await self._open(None)
        try:
            data = await contents.read(offset, length)
        except NotEnoughSharesError:  # it was replaced, perhaps, by us or by others
            data = await (await self._open(contents)).read(offset, length)
        return data.ljust(length, b"\0")

    async def _open(self, stale: Contents | None) -> Contents:
        """The latest version that was seen, but not `stale`."""
        async with self._opening:
            if self._contents is None or self._contents is stale:
                contents = await self._opener(self.cap)
                self.close()
                self._contents = contents
            return self._contents

    def close(self) -> None:
        if self._contents is not None:
            self._contents.close()


class Layers:
    """A spool file laid over a base: what WritableContents and SealedFile have in common."""

    def __init__(self, file: SpoolFile, size: int, base: Contents | None, base_stop: int) -> None:
        self.file = file
        self.size = size
        self.base = base
        self.base_stop = base_stop

    async def read(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        if offset >= stop:
            return b""
        base, base_stop = self.base, self.base_stop
        cut = self.file.spans.cut(offset, stop)
        if len(cut) == 1 and cut[0][2]:
            return self.file.read(offset, stop - offset)
        pieces: list[bytes | None] = [self.file.read(a, b - a) if held else None for a, b, held in cut]
        for index, (a, b, held) in enumerate(cut):
            if not held:
                pieces[index] = await read_under(base, base_stop, a, b)
        return b"".join(piece for piece in pieces if piece is not None)

    def missing(self) -> list[tuple[int, int]]:
        """The base's ranges that still show through."""
        stop = min(self.base_stop, self.size)
        return [(a, b) for a, b, held in self.file.spans.cut(0, stop) if not held]


async def read_under(base: Contents | None, base_stop: int, start: int, stop: int) -> bytes:
    shown = min(stop, base_stop)
    if base is None or start >= shown:
        return bytes(stop - start)
    data = await base.read(start, shown - start)
    if len(data) != shown - start:
        raise FormatError("a file is shorter than its cap says")
    return data + bytes(stop - shown) if stop > shown else data
