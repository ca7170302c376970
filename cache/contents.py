"""Contents open for writing: a spool file over what was there before, until it is sealed or thrown away.

Writes of up to INLINE_BYTES_MAX go to the page cache on the spot: a hop to a thread would cost more. Longer ones are
cut into such pieces with a checkpoint between them. The hash for the convergent key is taken on the way as long as
writes come in order, or nearly so.

No locks: after `write` has waited for room in the spool, each piece is written, hashed and accounted for without an
await between.
"""

from __future__ import annotations

from typing import Final

import trio

from cache.convergence import FileEncoding, RunningHash
from cache.layers import Contents, Layers
from cache.sealed import SealedContents, SealedFile
from cache.spool import Spool
from grid.errors import GridError

INLINE_BYTES_MAX: Final = 1 << 20  # spool I/O up to here is done on the spot
CATCH_UP_BYTES_MAX: Final = 1 << 20  # hashed per write when writes came out of order
FILE_BYTES_MAX: Final = 8 << 40  # what a local file, though sparse, can be on any common file system
CHAIN_MAX: Final = 4  # sealed files laid over each other before they are copied into one


class FileTooLargeError(GridError):
    """A size no file can have here: the mount answers EFBIG."""


class WritableContents:
    """A file open for writing. `dirty` once it differs from its base, or would."""

    def __init__(
        self,
        spool: Spool,
        encoding: FileEncoding,
        wait_s: float,
        base: Contents | None = None,
        keep: int | None = None,
    ) -> None:
        """Takes `base` over and closes it in the end; only its first `keep` bytes count (None: all)."""
        size = 0 if base is None else base.size if keep is None else min(keep, base.size)
        self._spool = spool
        self._encoding = encoding
        self._wait_s = wait_s
        self._layers = Layers(spool.create(), size, base, size)
        self._hash = RunningHash(encoding)
        self._open = True
        self._here = True  # still readable: until it is sealed or closed for good
        self.dirty = base is None or size != base.size

    @property
    def size(self) -> int:
        return self._layers.size

    async def read(self, offset: int, length: int) -> bytes:
        """As Contents. Works while `seal` is at it, not after."""
        if not self._here:
            raise ValueError("these contents are sealed or closed")
        return await self._layers.read(offset, length)

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        """Raises SpoolFullError (after a wait), FileTooLargeError."""
        self._check_open()
        stop = offset + len(data)
        if stop > FILE_BYTES_MAX:
            raise FileTooLargeError(f"a file cannot reach {stop} bytes")
        if not data:
            return
        if growth := self._layers.file.spans.missing_bytes(offset, stop):
            await self._spool.room(growth, self._wait_s)
            self._check_open()
        for start in range(0, len(data), INLINE_BYTES_MAX):
            self._put(offset + start, memoryview(data)[start : start + INLINE_BYTES_MAX])
            if start:
                await trio.lowlevel.checkpoint()

    def _put(self, offset: int, data: memoryview) -> None:
        layers = self._layers
        self.dirty = True
        self._hash.changed_from(offset)
        layers.file.write(offset, data)
        layers.size = max(layers.size, offset + len(data))
        if offset == self._hash.done and not self._hash.spoiled:
            self._hash.extend(data)
        elif (stop := layers.file.spans.run_from(self._hash.done)) > self._hash.done and not self._hash.spoiled:
            start = self._hash.done
            self._hash.extend(layers.file.read(start, min(stop - start, CATCH_UP_BYTES_MAX)))

    async def truncate(self, size: int) -> None:
        self._check_open()
        if size > FILE_BYTES_MAX:
            raise FileTooLargeError(f"a file cannot have {size} bytes")
        layers = self._layers
        if size == layers.size:
            return
        self.dirty = True
        if size < layers.size:
            layers.file.cut(size)
            layers.base_stop = min(layers.base_stop, size)
            if size == 0:
                self._hash.restart()
            else:
                self._hash.changed_from(size)
        layers.size = size

    async def seal(self, *, complete: bool = False, under: Contents | None = None) -> SealedFile:
        """What was written, as it is now; this object is of no use after that.

        What is still the base's is fetched when it is needed, or now if `complete`; but not what is `under`'s, a file
        that is changed in place. If that fails or is cancelled, these contents stay open.
        """
        self._check_open()
        self._open = False
        layers = self._layers
        depth = layers.base.depth if isinstance(layers.base, SealedContents) else 0
        sealed = SealedFile(layers, self._encoding, self._hash, depth + 1)
        try:
            if complete or sealed.depth > CHAIN_MAX:
                await sealed.fill(self._spool, self._wait_s, under)
        except BaseException:
            self._open = True
            raise
        self._here = False
        layers.file.shut()
        return sealed

    def close(self) -> None:
        """Throw away what was written, unless it was sealed."""
        if self._open:
            self._open = self._here = False
            self._layers.file.shut()
            self._layers.file.release()
            if self._layers.base is not None:
                self._layers.base.close()

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError("these contents are sealed or closed")
