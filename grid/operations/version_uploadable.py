"""The contents of one version of a mutable file, on their way to become an immutable one, a few segments at a time.

With a convergence secret the version is read twice, once for the key. When it is replaced meanwhile the upload fails
with NotEnoughSharesError, as reading it does: versions are never mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from grid.operations.retrieve import MutableVersion
from grid.operations.uploadables import Buffer, Keyed
from grid.operations.worker import run_cpu_work

SEGMENTS_AT_ONCE: Final = 8  # in memory, and as many while they are read


class VersionUploadable(Keyed):
    """IUploadable."""

    def __init__(self, version: MutableVersion, convergence: bytes | None = None) -> None:
        super().__init__(convergence)
        self._version = version
        self.rewind()

    def rewind(self) -> None:
        self._next = 0  # segment
        self._rest = memoryview(b"")  # read and not taken yet

    async def get_size(self) -> int:
        return self._version.size

    async def _hash_contents(self, update: Callable[[Buffer], None]) -> None:
        while data := await self._read_more():
            await run_cpu_work(lambda data=data: update(data), len(data))  # type: ignore[misc]  # bound by default
        self.rewind()

    async def _read_more(self) -> bytes:
        """The next segments; nothing at the end. Raises NotEnoughSharesError."""
        segments = range(self._next, min(self._next + SEGMENTS_AT_ONCE, self._version.num_segments))
        self._next = segments.stop
        return await self._version.read_segments(segments)

    async def read(self, length: int) -> Sequence[Buffer]:
        """Raises NotEnoughSharesError."""
        pieces: list[Buffer] = []
        while length and (self._rest or (rest := await self._read_more())):
            if not self._rest:
                self._rest = memoryview(rest)
            pieces.append(self._rest[:length])
            self._rest = self._rest[length:]
            length -= len(pieces[-1])
        return pieces

    async def close(self) -> None:
        self._rest = memoryview(b"")
