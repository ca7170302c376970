"""A finished file in the spool, on its way to the grid: never changes again, and is uploaded (`cache/uploadables.py`).

It may still show parts of what it was written over (`Layers`): of other sealed files, which stay as long as this one
does, and of a file on the grid. It is *complete* when it shows nothing that is on the grid only; `fill` fetches that.
Reads of more than a chunk, hashing and uploading of complete files happen in worker threads, on descriptors that are
open only meanwhile.

In the journal it has a row of its own (`row`), from which a later process makes it anew (`cache/replay.py`). Short
contents stand in the row itself, so that a thousand small files are on the disk with one fsync; for longer ones the row
has a digest of what is held, which is checked before a restored file is believed.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any, Final, Self

import trio

from cache.cap_json import cap_to_json
from cache.convergence import FileEncoding, RunningHash
from cache.layers import Contents, Layers
from cache.spans import Spans
from cache.spool import Spool, SpoolFile
from grid.crypto import KEY_BYTES
from grid.errors import GridError
from grid.formats.caps import Cap
from grid.formats.hashutil import TaggedHasher
from grid.operations.worker import run_cpu_work

CHUNK_BYTES: Final = 1 << 20  # read, fetched or hashed at a time
ROW_DATA_BYTES_MAX: Final = 32 << 10  # contents up to here stand in the journal itself
BASE_TIMEOUT_S: Final = 120.0  # for one chunk of what a file was written over
HASH_HOP_BYTES: Final = 16 << 20  # per thread hop of the key pass, so that cancelling does not wait for a whole file


class DamagedFileError(GridError):
    """Contents that are nowhere but here, and are not here either. Nothing can be done but write them again."""


class SealedFile:
    """A finished file in the spool. Owned (once) by whoever sealed it, until `release`."""

    def __init__(
        self,
        layers: Layers,
        encoding: FileEncoding,
        running: RunningHash,
        *,
        digest: bytes | None = None,
        synced: bool = False,
    ) -> None:
        self.id = 0
        self.on_change: Callable[[SealedFile], None] | None = None  # told when the row must change
        self.cap: Cap | None = None  # once it is stored
        self.layers = layers
        self._encoding = encoding
        self._running = running
        self._key: bytes | None = None
        self._digest = digest  # of all that is held, as it stands on the disk; None until somebody took it
        self._in_row_bytes = 0
        self._synced = synced  # on the disk, and `digest` known
        self.doubted = False  # comes from another process, so that it must be checked before it is believed
        self._filling = trio.Lock()  # held over fetches from the base and spool writes by `fill`, and over `check`
        self._complete = False  # known to be
        self._owners = 1
        self.size = layers.size

    @property
    def encoding(self) -> FileEncoding:
        return self._encoding

    @property
    def file(self) -> SpoolFile:
        return self.layers.file

    @property
    def below(self) -> SealedFile | None:
        """The sealed file it is laid over, if it is one."""
        base = self.layers.base
        return base.sealed if isinstance(base, SealedContents) else None

    @property
    def depth(self) -> int:
        """How many sealed files are laid over each other here, this one included."""
        below = self.below
        return 1 if below is None else 1 + below.depth

    @property
    def held_bytes(self) -> int:
        """Bytes in the spool, its own and those of all it is laid over."""
        below = self.below
        return self.file.spans.total + (0 if below is None else below.held_bytes)

    @property
    def complete(self) -> bool:
        """Whether all of it can be read from the spool. Once it can, that stays so."""
        self._complete = self._complete or not self.lacking().total
        return self._complete

    @property
    def pinned(self) -> bool:
        """Whether what it shows of the grid cannot change."""
        below, base = self.below, self.layers.base
        if below is not None:
            return below.pinned
        return base is None or base.cap is None or not base.cap.is_mutable

    def lacking(self) -> Spans:
        """Where its bytes are on the grid only."""
        below, missing = self.below, self.layers.missing()
        if below is None:
            return Spans(missing)
        deeper = below.lacking()
        return Spans((a, b) for start, stop in missing for a, b, held in deeper.cut(start, stop) if held)

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
            self._note_change()  # before what the row speaks of is gone: so the two are written together
            self.layers.file.release(remove=self.on_change is None)  # else the journal does, when the row is gone
            if self.layers.base is not None:
                self.layers.base.close()

    def stored_as(self, cap: Cap) -> None:
        """It is on the grid: that is all the journal needs to know from now on."""
        self.cap = cap
        self._note_change()

    def _note_change(self) -> None:
        if self.on_change is not None:
            self.on_change(self)

    # --- in the journal

    @property
    def parts(self) -> Iterable[SealedFile]:
        below = self.below
        return (below,) if below is not None and below.cap is None else ()

    @property
    def needs_sync(self) -> bool:
        return not (self._synced or self.gone or self.cap is not None or self._fits_row)

    @property
    def _fits_row(self) -> bool:
        return self.file.spans.total <= ROW_DATA_BYTES_MAX

    def row(self, number_of: Callable[[Any], int]) -> dict[str, Any] | None:
        """See `cache/replay.py` for the way back."""
        self._account_row()
        if self.gone:
            return None
        if self.cap is not None:
            return {"is": "file", "cap": cap_to_json(self.cap)}
        layers = self.layers
        base: dict[str, Any] | None = None
        if layers.base is not None:
            cap = layers.base.cap
            base = {"file": number_of(*self.parts)} if cap is None else {"cap": cap_to_json(cap)}
        row = {
            "is": "file",
            "number": self.file.number,
            "key": self.file.key.hex(),
            "size": self.size,
            "spans": list(self.file.spans),
            "base": base,
            "base_stop": layers.base_stop,
            "synced": self._synced,
        }
        if self._fits_row:
            with contextlib.suppress(OSError):  # somebody removed the file: its upload will say so, other rows go on
                row["data"] = base64.b64encode(b"".join(self.file.stored_ranges())).decode()
        elif self._digest is not None:
            row["digest"] = self._digest.hex()
        return row

    def _account_row(self) -> None:
        """Contents that stand in the row count twice: they are on the disk twice."""
        in_row = 0 if self.gone or self.cap is not None or not self._fits_row else self.file.spans.total
        self.file.account(in_row - self._in_row_bytes)
        self._in_row_bytes = in_row

    def sync(self) -> None:
        """In a thread: have it on the disk, and know its digest. Raises OSError."""
        if not self.needs_sync:
            return
        spans = self.file.spans.total
        digest = self._take_digest()
        self.sync_data()
        if spans == self.file.spans.total:  # or `fill` was at it: then it is recorded once more
            self._digest, self._synced = digest, True

    def sync_data(self) -> None:
        self.file.sync()

    def _take_digest(self) -> bytes:
        digest = sha256()
        for data in self.file.stored_ranges():
            digest.update(data)
        return digest.digest()

    async def check(self) -> None:
        """What comes from a process before this one: is it what that one wrote? Raises DamagedFileError."""
        if self.below is not None:
            await self.below.check()
        if not self.doubted:
            return
        async with self._filling:
            if self.doubted:
                await trio.to_thread.run_sync(self._check)
                self.doubted = False

    def _check(self) -> None:
        try:
            whole = self._digest is None or self._take_digest() == self._digest
        except OSError as error:
            raise DamagedFileError(f"the local copy cannot be read: {error.strerror}") from None
        if not whole:
            raise DamagedFileError("the local copy, the only one there is, was damaged on the disk")

    def showing(self, cap: Cap) -> Spans:
        """Where nothing was written over the file on the grid that `cap` names, so that it shows through."""
        below, base, missing = self.below, self.layers.base, self.layers.missing()
        if base is None or (base.cap is not None and base.cap != cap):
            return Spans()
        if base.cap is None and below is not None:
            deeper = below.showing(cap)
            return Spans((a, b) for start, stop in missing for a, b, held in deeper.cut(start, stop) if held)
        return Spans(missing)

    async def fill(self, spool: Spool, wait_s: float, told: Callable[[int], None] = lambda count: None) -> None:
        """Fetch what is on the grid only, so that the file is complete; `told` how many bytes came.

        Readers go on meanwhile: what is held is made known at the end, at once. Raises GridError, trio.TooSlowError.
        """
        async with self._filling:
            layers = self.layers
            if not (lacking := self.lacking()).total:
                return
            held = self.file.spans.copy()
            try:
                with _opened(self.file):
                    for start, stop in chunks(lacking):
                        with trio.fail_after(BASE_TIMEOUT_S):
                            data = await self.read(start, stop - start)
                        await spool.room(len(data), wait_s)
                        await trio.to_thread.run_sync(self.file.put, start, data)
                        self.file.account(len(data))
                        held.add(start, stop)
                        told(len(data))
            finally:
                self.file.spans = held
                self._digest, self._synced = None, False
                self._note_change()
            if self.below is None and layers.base is not None:  # what is local may be in somebody's reading just now
                base, layers.base, layers.base_stop = layers.base, None, 0
                self._note_change()  # before the base may go
                base.close()

    async def encryption_key(self, fetch: Callable[[int, int], Awaitable[bytes]] | None = None) -> bytes:
        """16 bytes, the same at every call: convergent, or random.

        `fetch(offset, length)`: how to read a file that is not complete.
        """
        if self._key is None and self.encoding.convergence is None:
            self._key = secrets.token_bytes(KEY_BYTES)
        if self._key is None:
            hasher, done = self._running.take(self.size)
            with _opened(self.file):
                if self.complete:
                    for start in range(done, self.size, HASH_HOP_BYTES):
                        stop = min(start + HASH_HOP_BYTES, self.size)
                        await run_cpu_work(partial(self._hash_range, hasher, start, stop), stop - start)
                else:
                    for start in range(done, self.size, CHUNK_BYTES):
                        data = await (fetch or self.read)(start, min(CHUNK_BYTES, self.size - start))
                        await run_cpu_work(partial(hasher.update, data), len(data))
            self._key = hasher.digest()[:KEY_BYTES]
        return self._key

    def _hash_range(self, hasher: TaggedHasher, start: int, stop: int) -> None:
        for position in range(start, stop, CHUNK_BYTES):
            hasher.update(self.read_sync(position, min(CHUNK_BYTES, stop - position)))

    async def read(self, offset: int, length: int) -> bytes:
        return await self.layers.read(offset, length)

    def read_now(self) -> bytes:
        """All of it, on the spot: for complete files of a few bytes."""
        with _opened(self.file):
            return self.read_sync(0, self.size)

    def read_sync(self, offset: int, length: int) -> bytes:
        """In a worker thread; only of a complete file whose descriptor is open."""
        stop = min(offset + length, self.size)
        below, base_stop = self.below, self.layers.base_stop
        pieces = []
        for a, b, held in self.file.spans.cut(offset, stop):
            shown = min(b, max(a, base_stop))
            if held:
                pieces.append(self.file.read(a, b - a))
                continue
            if shown > a:
                assert below is not None, "not complete"
                pieces.append(below.read_sync(a, shown - a))
            pieces.append(bytes(b - shown))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class SealedContents:
    """A sealed file, to read."""

    def __init__(self, sealed: SealedFile) -> None:
        self.sealed = sealed.retain()
        self._open = True
        sealed.file.open()

    @property
    def size(self) -> int:
        return self.sealed.size

    @property
    def cap(self) -> Cap | None:
        return self.sealed.cap

    async def read(self, offset: int, length: int) -> bytes:
        if not self._open:
            raise ValueError("these contents are closed")
        if length > CHUNK_BYTES and self.sealed.complete:
            return await run_cpu_work(partial(self.sealed.read_sync, offset, length), length)
        return await self.sealed.read(offset, length)

    def close(self) -> None:
        if self._open:
            self._open = False
            self.sealed.file.shut()
            self.sealed.release()


def share(contents: Contents) -> Contents:
    """The same to read, for another owner: what is on the grid can be read on after somebody closed it."""
    return contents.sealed.open() if isinstance(contents, SealedContents) else contents


def chunks(spans: Spans) -> Iterator[tuple[int, int]]:
    """The same ranges in order, in pieces of at most CHUNK_BYTES."""
    for start, stop in spans:
        for position in range(start, stop, CHUNK_BYTES):
            yield position, min(position + CHUNK_BYTES, stop)


@contextmanager
def _opened(file: SpoolFile) -> Iterator[SpoolFile]:
    file.open()
    try:
        yield file
    finally:
        file.shut()
