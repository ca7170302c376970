"""Immutable shares on an HTTP server: writing with several requests under way, and reading.

    write ─ PATCH ─┬─>          each write is one request; at most about WINDOW_BYTES of them unanswered a server,
    write ─ PATCH ─┴─> server   then writers wait, whichever file they write

A server publishes a share with the request that brings its last missing byte and answers 201 to that one: there
is no call that closes. So close() writes zeros where nothing was written, as a Foolscap server has them there.
Closing a connection aborts nothing: an upload left behind blocks its share for half an hour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import trio

from grid.errors import ConnectionLostError, FormatError, PeerError, RemoteFailure, RemoteProtocolError
from grid.peers import deadlines
from grid.peers.giving_back import GivingBack
from grid.peers.http_pool import ConnectionPool, all_of
from grid.transports.http import ERROR_BYTES_MAX, Answer
from grid.wire import gbs, gbs_bodies
from grid.wire.gbs import Secret

T = TypeVar("T")

WINDOW_BYTES: Final = 2 << 20  # unanswered, per server; one write more may be under way from each writer
REQUEST_BYTES: Final = 500  # what a request costs beside its data
WRITE_ANSWER_BYTES_MAX: Final = 1 << 20  # it lists what is still missing; we know
ZEROS_BYTES: Final = 1 << 20  # written at a time where nothing else was
LIGHT_BYTES_MAX: Final = 16 << 10  # reads that move more say more about the line than about latency
REASON_CHARS_MAX: Final = 900
READ_BYTES_MAX: Final = 4 << 20  # in one request; longer reads are cut into several
ABORT_WAIT_S: Final = 2.0  # for the answer to an abort, which nothing depends on
LAST_ABORTS_S: Final = 2.0  # for giving back all shares when the grid is left

_NAMES: Final = {400: "BadRequest", 401: "Unauthorized", 404: "NotFound", 409: "ConflictingWriteError"}


def failure(answer: Answer, what: str) -> RemoteFailure:
    """The error for an answer of a status that is not a success."""
    name = _NAMES.get(answer.status, "ServerError" if answer.status >= 500 else "UnexpectedStatus")
    return RemoteFailure(f"http.{name}", f"status {answer.status} for {what}")


class Uploads:
    """All writes on their way to one server, and the shares that are not finished."""

    def __init__(self, pool: ConnectionPool, nursery: trio.Nursery) -> None:
        self.pool = pool
        self._nursery = nursery
        self._bytes_in_flight = 0
        self._progress = trio.lowlevel.ParkingLot()
        self._open: set[GBSBucketWriter] = set()
        self._giving_back = GivingBack()
        self._ended = False

    def writer(self, storage_index: bytes, number: int, secret: bytes, size: int) -> GBSBucketWriter:
        writer = GBSBucketWriter(self, storage_index, number, secret, size)
        self._open.add(writer)
        return writer

    def post(self, writer: GBSBucketWriter, offset: int, data: bytes | memoryview) -> None:
        if self._ended:
            raise ConnectionLostError("connection lost")
        weight = len(data) + REQUEST_BYTES
        self._bytes_in_flight += weight
        writer.unanswered += 1
        self._nursery.start_soon(self._send, writer, offset, data, weight, self._bytes_in_flight)

    async def _send(
        self, writer: GBSBucketWriter, offset: int, data: bytes | memoryview, weight: int, in_flight: int
    ) -> None:
        failure: PeerError | None = ConnectionLostError("connection lost while writing")  # when cancelled
        try:
            with trio.CancelScope() as scope:
                writer.scopes.add(scope)
                await writer.send(offset, data, in_flight)
                failure = None
        except PeerError as error:
            failure = error
        finally:
            writer.failure = writer.failure or failure
            writer.scopes.discard(scope)
            self._bytes_in_flight -= weight
            writer.unanswered -= 1
            self._progress.unpark_all()

    async def wait_for_room(self) -> None:
        while self._bytes_in_flight > WINDOW_BYTES:
            await self._progress.park()

    async def wait_until_answered(self, writer: GBSBucketWriter) -> None:
        while writer.unanswered and writer.failure is None:
            await self._progress.park()

    def forget(self, writer: GBSBucketWriter) -> None:
        self._open.discard(writer)

    def give_back(self, storage_index: bytes, number: int, secret: bytes) -> trio.Event:
        """Abort an upload in the background; the event is set when the server has answered, or will not."""
        done = trio.Event()
        if self._ended:
            done.set()
        else:
            self._giving_back.note(storage_index, done)
            self._nursery.start_soon(self._abort, storage_index, number, secret, done)
        return done

    async def wait_until_given_back(self, storage_index: bytes) -> None:
        """Before shares of it are allocated anew."""
        await self._giving_back.wait(storage_index)

    async def _abort(self, storage_index: bytes, number: int, secret: bytes, done: trio.Event) -> None:
        try:
            with suppress(PeerError):
                await self._ask_to_abort(storage_index, number, secret)
        finally:
            done.set()

    async def _ask_to_abort(self, storage_index: bytes, number: int, secret: bytes) -> bool:
        """Whether there was an upload under this secret."""
        answer = await self.pool.request(
            b"PUT",
            gbs.path("immutable", storage_index, number, "abort"),
            gbs.secret_headers({Secret.UPLOAD: secret}),
            answer_bytes_max=ERROR_BYTES_MAX,
            timeout_s=deadlines.CLOSE_TIMEOUT_S,
            what="abort",
        )
        return answer.status == 200

    async def take_back(self, storage_index: bytes, numbers: Iterable[int], secret: bytes) -> bool:
        """Abort what was begun under this secret and is nobody's now; whether there was any. Raises PeerError."""
        mine = {writer.identity for writer in self._open}
        left = [number for number in numbers if (storage_index, number, secret) not in mine]
        return any(await all_of([partial(self._ask_to_abort, storage_index, number, secret) for number in left]))

    def refuse(self) -> None:
        """From now on nothing is sent in the background."""
        self._ended = True

    async def end(self) -> None:
        """When no more can be asked: what is unfinished is given back, for servers would keep it from others."""
        self.refuse()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + LAST_ABORTS_S):
            async with trio.open_nursery() as nursery:
                for writer in self._open:
                    nursery.start_soon(self._abort, *writer.identity, trio.Event())
        self._open.clear()
        self._progress.unpark_all()


class GBSBucketWriter:
    """IBucketWriter over HTTP."""

    def __init__(self, uploads: Uploads, storage_index: bytes, number: int, secret: bytes, size: int) -> None:
        self.failure: PeerError | None = None  # set by the uploads
        self.unanswered = 0  # writes; counted by the uploads
        self.scopes: set[trio.CancelScope] = set()  # of writes on their way
        self.identity = storage_index, number, secret
        self._path = gbs.path("immutable", storage_index, number)
        self._secret_headers = gbs.secret_headers({Secret.UPLOAD: secret})
        self._uploads = uploads
        self._size = size
        self._written: list[tuple[int, int]] = []  # (begin, end)
        self._published = False
        self._over = False  # closed or aborted

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        self._check()
        if offset + len(data) > self._size:
            raise RemoteFailure("http.DataTooLargeError", "a write beyond the allocated size")
        if data:
            self._written.append((offset, offset + len(data)))
            self._uploads.post(self, offset, data)
            await self._uploads.wait_for_room()
        await trio.lowlevel.checkpoint()
        self._check()

    async def send(self, offset: int, data: bytes | memoryview, in_flight: int) -> None:
        """One write's request, for the uploads. Raises PeerError."""
        answer = await self._uploads.pool.request(
            b"PATCH",
            self._path,
            (*self._secret_headers, (b"content-range", gbs.content_range_header(offset, len(data)))),
            (data,),
            answer_bytes_max=WRITE_ANSWER_BYTES_MAX,
            timeout_s=deadlines.with_data(deadlines.WRITE_TIMEOUT_S, in_flight - len(data)),
            moved_bytes=len(data),
            what="a write",
        )
        if answer.status == 201 or (answer.status == 404 and await self._is_published()):
            self._published = True
        elif answer.status != 200:
            raise failure(answer, "a write")

    async def _is_published(self) -> bool:
        """Whether an answer of 201 got lost, and the write was repeated."""
        storage_index, number, _ = self.identity
        return self._published or number in await list_shares(self._uploads.pool, "immutable", storage_index)

    async def close(self) -> None:
        try:
            self._check()
            for begin, end in self._gaps():
                for offset in range(begin, end, ZEROS_BYTES):
                    await self.write(offset, bytes(min(ZEROS_BYTES, end - offset)))
            await self._uploads.wait_until_answered(self)
            self._check()
            if not self._published:
                raise RemoteProtocolError("a server did not finish a share of which it has every byte")
        except BaseException:
            self._discard()
            raise
        self._over = True
        self._uploads.forget(self)

    def _gaps(self) -> list[tuple[int, int]]:
        gaps, position = [], 0
        for begin, end in sorted(self._written):
            if begin > position:
                gaps.append((position, begin))
            position = max(position, end)
        return [*gaps, (position, self._size)] if position < self._size else gaps

    async def abort(self) -> None:
        """Waits for the answer a little, so that nothing is left behind by a program that ends now."""
        done = self._discard()
        if done is not None:
            with trio.move_on_after(ABORT_WAIT_S):
                await done.wait()
        else:
            await trio.lowlevel.checkpoint()

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure
        if self._over:
            raise PeerError("this share was closed or aborted already")

    def _discard(self) -> trio.Event | None:
        if self._over:
            return None
        self._over = True
        for scope in self.scopes:
            scope.cancel()
        self._uploads.forget(self)
        return self._uploads.give_back(*self.identity)


class GBSBucketReader:
    """IBucketReader over HTTP."""

    def __init__(self, pool: ConnectionPool, storage_index: bytes, number: int) -> None:
        self._pool = pool
        self._storage_index = storage_index
        self._number = number
        self._path = gbs.path("immutable", storage_index, number)

    async def read(self, offset: int, length: int) -> bytes:
        data = await read_share(self._pool, self._path, offset, length)
        if data is None:
            raise RemoteFailure("http.NotFound", "the server does not have this share any more")
        return data

    async def advise_corrupt_share(self, reason: str) -> None:
        await advise(self._pool, "immutable", self._storage_index, self._number, reason)


# --- requests that several places make ----------------------------------------------------------------------


async def list_shares(pool: ConnectionPool, kind: str, storage_index: bytes) -> frozenset[int]:
    """Raises PeerError."""
    answer = await pool.request(
        b"GET",
        gbs.path(kind, storage_index, "shares"),
        answer_bytes_max=gbs_bodies.SMALL_BYTES_MAX,
        timeout_s=deadlines.GET_BUCKETS_TIMEOUT_S,
        light=True,
        what="the list of shares",
    )
    if answer.status != 200:
        raise failure(answer, "the list of shares")
    return cbor_answer(answer, gbs_bodies.read_share_numbers)


def cbor_answer(answer: Answer, read: Callable[[bytes], T]) -> T:
    """The body of a good answer. Raises RemoteProtocolError."""
    try:
        if not gbs.is_cbor(answer.header(b"content-type")):
            raise FormatError("not CBOR")
        return read(answer.body)
    except FormatError as error:
        raise RemoteProtocolError(f"a server's answer: {error}") from None


async def read_share(pool: ConnectionPool, path: bytes, offset: int, length: int) -> bytes | None:
    """Up to `length` bytes, fewer at the end of the share; None when there is no such share. Raises PeerError."""
    if length <= 0:
        return b""
    pieces = []
    while True:
        wanted = min(length, READ_BYTES_MAX)
        answer = await pool.request(
            b"GET",
            path,
            ((b"range", gbs.range_header(offset, wanted)),),
            answer_bytes_max=wanted,
            timeout_s=deadlines.READ_TIMEOUT_S,
            moved_bytes=wanted,
            light=wanted <= LIGHT_BYTES_MAX,
            what="a read",
        )
        if answer.status == 404:
            return None
        if answer.status not in (204, 206):
            raise failure(answer, "a read")
        if answer.status == 206:
            _check_range(answer, offset)
            pieces.append(answer.body)
        offset += wanted
        length -= wanted
        if not length or len(answer.body) < wanted:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_range(answer: Answer, offset: int) -> None:
    try:
        begin, length = gbs.read_content_range(answer.header(b"content-range") or b"")
    except FormatError as error:
        raise RemoteProtocolError(f"a server's answer: {error}") from None
    if begin != offset or length != len(answer.body):
        raise RemoteProtocolError("a server sent another range than it was asked for")


async def advise(pool: ConnectionPool, kind: str, storage_index: bytes, number: int, reason: str) -> None:
    """Never raises PeerError."""
    with suppress(PeerError):
        await pool.request(
            b"POST",
            gbs.path(kind, storage_index, number, "corrupt"),
            ((b"content-type", gbs.CBOR_TYPE),),
            gbs_bodies.corrupt_request(reason[:REASON_CHARS_MAX]),
            answer_bytes_max=ERROR_BYTES_MAX,
            timeout_s=deadlines.ADVISE_TIMEOUT_S,
            what="advice",
        )
