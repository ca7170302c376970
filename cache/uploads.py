"""Pending files on their way: small ones are not held up by big ones, and each is tried until it is there.

    queue ─► resting (cache/settling.py) ─► small or big line ─► upload ─► stored
                └─ at once when somebody waits for it  └───── back-off ◄─┘ failed

No locks: queues and sets are changed between awaits only.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Final

import trio

from cache.contents import FILE_BYTES_MAX, FileTooLargeError
from cache.options import WorkspaceOptions
from cache.pending import PendingFile, UploadProgress
from cache.sealed import SealedFile
from cache.settling import Settling
from cache.spool import Spool, SpoolFullError
from cache.throughput import Meter
from cache.uploadables import base_is_read, uploadable_of
from grid.errors import GridError, WrongKindError
from grid.formats.caps import Cap, LiteralCap, parse_known_cap
from grid.formats.segments import LITERAL_BYTES_MAX
from grid.operations.changes import MDMF_DATA_BYTES_MAX, Changes

log = logging.getLogger(__name__)

SMALL_BYTES: Final = 1 << 20  # files up to here are small
SMALL_AT_ONCE: Final = 8
BIG_AT_ONCE: Final = 2
RESTING_NEW_MAX: Final = 8  # files stored for the first time that wait whether they are stored again; more need not
SDMF_BYTES_MAX: Final = 64 << 20  # such a file is held in memory whole
_BYTES_MAX: Final = {"none": FILE_BYTES_MAX, "sdmf": SDMF_BYTES_MAX, "mdmf": MDMF_DATA_BYTES_MAX}


class Uploads:
    """Takes files in with `queue`, gives them up with `drop`; `ended(file)` is called after each try."""

    def __init__(
        self,
        nursery: trio.Nursery,
        client: Any,
        spool: Spool,
        options: WorkspaceOptions,
        ended: Callable[[PendingFile], None],
        retry_delay_s: Callable[[int], float],
        is_awaited: Callable[[PendingFile], bool],
    ) -> None:
        self._nursery = nursery
        self._client = client
        self._spool = spool
        self._options = options
        self._ended = ended
        self._retry_delay_s = retry_delay_s
        self._is_awaited = is_awaited
        self._small: deque[PendingFile] = deque()
        self._big: deque[PendingFile] = deque()
        self._running = {True: 0, False: 0}  # small?: tasks
        self._files: dict[PendingFile, None] = {}  # all that are not stored yet
        self._settling = Settling(options.settle_s, options.settle_latest_s, trio.current_time)
        self._resting: dict[PendingFile, trio.CancelScope] = {}  # not in line yet; in it once the scope has ended
        self._resting_new: dict[PendingFile, None] = {}  # of these, those not known to keep changing, oldest first
        self._retry = trio.Event()
        self.failing: dict[PendingFile, None] = {}
        self.on_stored: Callable[[SealedFile, Cap], None] = lambda sealed, cap: None  # somebody may want to keep it
        self.stored = 0
        self.meter = Meter()  # of bytes of shares that were pushed
        self.fetched_bytes = 0  # of what files were written over, to send them whole

    def queue(self, file: PendingFile) -> None:
        """See that it gets uploaded, if that is not under way. Also when it gets another name."""
        if file.sealed is None:
            raise GridError("this file was dropped before it was stored")
        self._files[file] = None
        due, keeps_changing = self._settling.note(file)
        if not file.queued:
            file.queued = True
            self._resting[file] = scope = trio.CancelScope(deadline=due)
            self._nursery.start_soon(self._rest, file, scope)
            if not keeps_changing:
                self._resting_new[file] = None
        elif (resting := self._resting.get(file)) is not None:
            resting.deadline = max(resting.deadline, due)
        if keeps_changing:
            self._resting_new.pop(file, None)
        if len(self._resting_new) > RESTING_NEW_MAX:  # many files are being copied in: they need not wait
            self._end_rest(next(iter(self._resting_new)))
        if file in self._resting and self._is_awaited(file):
            self._end_rest(file)

    async def _rest(self, file: PendingFile, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep_forever()
        self._end_rest(file)
        if file.wanted:
            self._line_up(file)

    def _end_rest(self, file: PendingFile) -> None:
        self._resting_new.pop(file, None)
        if (scope := self._resting.pop(file, None)) is not None:
            scope.cancel()

    def _line_up(self, file: PendingFile) -> None:
        (self._small if file.size <= SMALL_BYTES else self._big).append(file)
        self._start()

    def drop(self, file: PendingFile) -> None:
        """Nobody wants it any more: its upload is cancelled, its bytes are let go."""
        self._files.pop(file, None)
        self.failing.pop(file, None)
        self._settling.dropped(file)
        self._end_rest(file)
        if file.scope is not None:
            file.scope.cancel()
        if file.cap is None and file.sealed is not None:
            sealed, file.sealed = file.sealed, None
            sealed.release()

    def hurry(self) -> None:
        """Somebody waits: what failed is tried again, and what he waits for rests no longer."""
        for file in list(self._resting):
            if self._is_awaited(file):
                self._end_rest(file)
        self._retry.set()
        self._retry = trio.Event()

    def pending(self) -> Iterator[PendingFile]:
        return iter(self._files)

    def _start(self) -> None:
        for small, line, at_once in ((True, self._small, SMALL_AT_ONCE), (False, self._big, BIG_AT_ONCE)):
            while line and self._running[small] < at_once:
                file = line.popleft()
                if file.wanted:
                    self._running[small] += 1
                    file.scope = trio.CancelScope()
                    self._nursery.start_soon(self._try, file, file.scope, small)

    async def _try(self, file: PendingFile, scope: trio.CancelScope, small: bool) -> None:
        error: Exception | None = None
        file.sending = True
        try:
            with scope:
                if (sealed := file.sealed) is not None:
                    self._succeeded(file, sealed, await self._send(file, sealed))
        except Exception as problem:  # noqa: BLE001  logged below; whatever it is, others must go on
            error = problem
        finally:
            file.scope = None
            file.sending = False
            self._running[small] -= 1
            self._start()
        if error is not None and file.wanted:
            self._failed(file, error)
            self._nursery.start_soon(self._try_later, file)

    async def _send(self, file: PendingFile, sealed: SealedFile) -> Cap:
        sealed = sealed.retain()
        try:
            await sealed.check()
            if not sealed.complete:
                await self._fetch_base(sealed)
            if file.mutable != "none":
                return await self._make_mutable(sealed, file.mutable)
            if file.size <= LITERAL_BYTES_MAX:
                return LiteralCap(await read_all(sealed))
            return await self._upload(file, sealed)
        finally:
            sealed.release()

    async def _fetch_base(self, sealed: SealedFile) -> None:
        """What is on the grid only, if there is room for it: else it is read from there while the file is sent.

        What may change on the grid meanwhile has to be fetched. Raises BaseUnreadableError, SpoolFullError.
        """
        with base_is_read():
            if not sealed.pinned:
                await sealed.fill(self._spool, self._options.spool_wait_s, self._note_fetched)
            elif self._spool.has_spare(sealed.lacking().total):
                with suppress(SpoolFullError):  # others were faster
                    await sealed.fill(self._spool, 0, self._note_fetched)

    def _note_fetched(self, count: int) -> None:
        self.fetched_bytes += count

    async def _make_mutable(self, sealed: SealedFile, kind: str) -> Cap:
        uploadable = uploadable_of(sealed, self._note_fetched)
        try:
            made = Changes.everything(sealed.size, uploadable.fetch)
            return parse_known_cap(await self._client.create_mutable_file(made, format=kind))
        finally:
            with trio.CancelScope(shield=True):  # lets go of a descriptor, waits for nothing
                await uploadable.close()

    async def _upload(self, file: PendingFile, sealed: SealedFile) -> Cap:
        uploadable = uploadable_of(sealed, self._note_fetched)
        try:
            file.progress = UploadProgress(self.meter)
            await uploadable.get_encryption_key()
            results = await self._client.upload(uploadable, file.progress)
        finally:
            with trio.CancelScope(shield=True):  # lets go of a descriptor, waits for nothing
                await uploadable.close()
        cap = parse_known_cap(results.uri)
        if cap.is_mutable or cap.is_directory:
            raise WrongKindError("the grid made something else than a file")
        return cap

    def _succeeded(self, file: PendingFile, sealed: SealedFile, cap: Cap) -> None:
        file.cap, file.error, file.attempts = cap, None, 0
        self.stored += 1
        self._settling.sent(file)
        self._files.pop(file, None)
        self.failing.pop(file, None)
        file.sealed = None
        sealed.stored_as(cap)
        if cap.storage_index is not None and not cap.is_mutable and sealed.complete:
            self._spool.keep(cap.storage_index, sealed)
            self.on_stored(sealed, cap)
        sealed.release()
        self._ended(file)

    def _failed(self, file: PendingFile, error: Exception) -> None:
        file.error = error
        file.attempts += 1
        file.progress = None
        self.failing[file] = None
        if isinstance(error, GridError | OSError):
            log.warning("storing a file of %d bytes failed, attempt %d: %s", file.size, file.attempts, error)
        else:
            log.error("storing a file failed in an unforeseen way", exc_info=error)
        self._ended(file)

    async def _try_later(self, file: PendingFile) -> None:
        with trio.move_on_after(self._retry_delay_s(file.attempts)):
            await self._retry.wait()
        if file.wanted:
            self._line_up(file)


async def read_all(sealed: SealedFile) -> bytes:
    """A whole sealed file, which must be small enough for memory."""
    contents = sealed.open()
    try:
        return await contents.read(0, sealed.size)
    finally:
        contents.close()


def stored_as(size: int, mutable: str | None, default: str) -> str:
    """What a file of `size` bytes becomes: "none" (immutable), "sdmf" or "mdmf".

    That is `mutable`, which was asked for; or else `default`, as far as the size allows. Raises FileTooLargeError.
    """
    if mutable is None:
        return default if size <= _BYTES_MAX[default] else "none"
    require_size(size, mutable)
    return mutable


def require_size(size: int, mutable: str) -> None:
    """Raises FileTooLargeError."""
    if size > (most := _BYTES_MAX[mutable]):
        raise FileTooLargeError(f"a file of this kind has at most {most} bytes")
