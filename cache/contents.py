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
from cache.sealed import SealedContents, SealedFile, share
from cache.spool import Spool, SpoolFullError
from grid.errors import GridError

INLINE_BYTES_MAX: Final = 1 << 20  # spool I/O up to here is done on the spot
CATCH_UP_BYTES_MAX: Final = 1 << 20  # hashed per write when writes came out of order
FILE_BYTES_MAX: Final = 8 << 40  # what a local file, though sparse, can be on any common file system
MERGE_RATIO: Final = 2  # what lies beneath is taken over if it holds at most so many times what lies over it
PIECE_BYTES: Final = 4096  # what a file, or a piece of one, takes at least
LAYERS_MAX: Final = 64  # sealed files laid over each other, when there is no room to merge them


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

    async def seal(self, *, complete: bool = False) -> SealedFile:
        """What was written, as it is now; this object is of no use after that.

        What is on the grid only is fetched when it is needed, or now if `complete`. If that fails or is cancelled,
        these contents stay open.
        """
        self._check_open()
        self._open = False
        layers = self._layers
        try:
            await self._merge()
            sealed = SealedFile(layers, self._encoding, self._hash)
            if complete:
                await sealed.fill(self._spool, self._wait_s)
        except BaseException:
            self._open = True
            raise
        self._here = False
        layers.file.shut()
        return sealed

    async def _merge(self) -> None:
        """Have few sealed files lie over each other, and move few bytes for it.

        Each one that stays holds more than MERGE_RATIO times what all over it hold: so there are few, and whatever is
        written is copied once for each time the bytes over it have tripled, not each time something is sealed.
        """
        layers = self._layers
        while layers.base is not None:
            if not layers.missing():
                layers.base.close()
                layers.base, layers.base_stop = None, 0
            elif (below := self._little_below()) is not None:
                try:
                    await self._take_over(below)
                except (SpoolFullError, OSError):  # what was written is safe all the same
                    if below.sealed.depth >= LAYERS_MAX:
                        raise
                    return
            else:
                return

    def _little_below(self) -> SealedContents | None:
        below = self._layers.base
        if not isinstance(below, SealedContents):
            return None
        if below.cap is not None and below.cap.is_mutable:
            return None  # what was written over that is all that is sent
        shown = min(below.sealed.file.spans.total, self._layers.base_stop)
        if shown + PIECE_BYTES > MERGE_RATIO * (self._layers.file.spans.total + PIECE_BYTES):
            return None
        return below

    async def _take_over(self, below: SealedContents) -> None:
        """All that shows of it, so that these contents lie over what it lies over.

        As it is now: it may be filled meanwhile, which changes what it holds and what it lies over.
        """
        layers, beneath = self._layers, below.sealed.layers
        spans, base_stop = beneath.file.spans, beneath.base_stop
        base = None if beneath.base is None else share(beneath.base)
        try:
            moved = 0
            for held_start, held_stop in spans:
                for first, last in layers.file.spans.without(held_start, min(held_stop, layers.base_stop)):
                    for start in range(first, last, INLINE_BYTES_MAX):
                        length = min(INLINE_BYTES_MAX, last - start)
                        await self._spool.room(length, 0)
                        layers.file.write(start, beneath.file.read(start, length))
                        moved += max(length, PIECE_BYTES)
                        if moved >= INLINE_BYTES_MAX:
                            moved = 0
                            await trio.lowlevel.checkpoint()
        except BaseException:
            if base is not None:
                base.close()
            raise
        layers.base, layers.base_stop = base, min(layers.base_stop, base_stop)
        below.close()

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
