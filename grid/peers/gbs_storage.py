"""A storage server reached over HTTP: looked after for as long as the grid is joined, and dialled again when lost.

Requests go over a pool of connections that are opened at need (`grid/peers/http_pool.py`). One more is kept open
all the time and asked now and then: it is how we learn that the server is gone, which a Foolscap connection
tells by itself. Every call has its deadline (`grid/peers/deadlines.py`) and raises PeerError.

Source: the storage protocol of Tahoe-LAFS 1.20 over HTTP, version 1. Reads of several ranges are several requests
there, which another writer may come between: see `slot_readv`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final

import trio
from attrs import frozen

from grid.errors import ConnectionLostError, FormatError, PeerError, PeerTimeoutError, RemoteFailure
from grid.formats.announcement import Announcement
from grid.formats.hashutil import tagged_hash
from grid.interfaces import IBucketReader, IBucketWriter, LeaseSecrets, SlotSecrets, SlotWrite
from grid.peers import deadlines
from grid.peers.announced import AnnouncedServer
from grid.peers.gbs_buckets import (
    GBSBucketReader,
    Uploads,
    advise,
    cbor_answer,
    failure,
    list_shares,
    read_share,
)
from grid.peers.http_pool import ConnectionPool, all_of, common_headers, dial, limit
from grid.peers.pulse import Pulse
from grid.peers.reconnect import Backoff, Reconnector
from grid.transports.http import ERROR_BYTES_MAX, Answer, HTTPConnection
from grid.wire import gbs, gbs_bodies
from grid.wire.gbs import Nurl, Secret

log = logging.getLogger(__name__)

UPLOAD_SECRET_BYTES: Final = 20
_UPLOAD_SECRET_TAG: Final = b"tahoefs_upload_secret_v1"
PING_S: Final = 40.0  # servers close a connection after 60 s without a request
ONE_READ_BYTES_MAX: Final = 128 << 10  # ranges that lie within so many bytes are read as one
SLOT_ANSWER_BYTES: Final = 64 << 10  # what an answer to read-test-write has beside the data


@frozen(eq=False)
class _Connection:
    """What lives as long as the server is taken for connected."""

    nurl: Nurl
    pool: ConnectionPool
    pulse: Pulse
    uploads: Uploads
    nursery: trio.Nursery


class GBSStorageServer(AnnouncedServer[_Connection]):
    """IStorageServer over HTTP. `run()` keeps it connected."""

    def __init__(self, announcement: Announcement, *, changed: Callable[[], None] = lambda: None) -> None:
        """Raises FormatError when the announcement has no FURL, or no NURL we can dial."""
        super().__init__(announcement, changed=changed)
        self._nurls = gbs.usable_nurls(announcement.nurls)
        if not self._nurls:
            raise FormatError("a storage server is announced without a usable NURL")

    # --- being connected --------------------------------------------------------------------------------------------

    async def run(self, reconnector: Reconnector, dials: trio.CapacityLimiter) -> None:
        """Stay connected, until cancelled."""
        backoff = reconnector.join()
        self._dialling_since = trio.current_time()
        try:
            while True:
                try:
                    async with dials:
                        nurl, line = await self._dial_any()
                    await self._stay_connected(nurl, line, backoff)
                except PeerError as error:
                    self._failed(error)
                await backoff.wait()
        finally:
            reconnector.leave(backoff)

    async def _dial_any(self) -> tuple[Nurl, HTTPConnection]:
        """All NURLs at once; the first that answers is used for as long as it does."""
        errors: list[PeerError] = []
        found: list[tuple[Nurl, HTTPConnection]] = []

        async def attempt(nurl: Nurl) -> None:
            line = None
            try:
                line = await dial(nurl)
                await self._ask_version(nurl, line)
                if not found:
                    found.append((nurl, line))
                    line = None
                    nursery.cancel_scope.cancel()
            except PeerError as error:
                errors.append(error)
            finally:
                if line is not None:
                    await line.aclose()

        async with trio.open_nursery() as nursery:
            for nurl in self._nurls:
                nursery.start_soon(attempt, nurl)
        if not found:
            # what a server said is more telling than that another address does not answer
            raise max(errors, key=lambda error: not isinstance(error, ConnectionLostError | PeerTimeoutError))
        return found[0]

    async def _stay_connected(self, nurl: Nurl, line: HTTPConnection, backoff: Backoff) -> None:
        """Until the server is lost. Raises PeerError then."""
        pulse = Pulse()
        pool = ConnectionPool(nurl, pulse)
        ended: PeerError | None = None

        async def watch(task: Callable[[], Any]) -> None:
            nonlocal ended
            try:
                await task()
            except PeerError as error:
                ended = ended or error
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                uploads = Uploads(pool, nursery)
                self._connection = connection = _Connection(nurl, pool, pulse, uploads, nursery)
                backoff.connected()
                log.info("connected to storage server %s (%s) over HTTP", self.name, self.application_version)
                self._changed()
                nursery.start_soon(pool.close_idle)
                nursery.start_soon(watch, partial(self._watch_line, connection, line))
                nursery.start_soon(watch, partial(pulse.watch, partial(self._refresh_version, connection)))
                try:
                    await trio.Event().wait()  # for ever, until cancelled
                finally:
                    uploads.refuse()  # while this nursery is still open, for they use it
        finally:
            self._connection = None
            await uploads.end()
            pool.close()
        if ended is not None:
            raise ended  # outside of the nursery, which would wrap it into a group

    async def _watch_line(self, connection: _Connection, line: HTTPConnection) -> None:
        """Keep one connection open. Raises ConnectionLostError when it ends and no new one can be made."""
        try:
            while True:
                with trio.move_on_after(PING_S) as quiet:
                    await line.wait_closed()
                try:
                    if not quiet.cancelled_caught:
                        await line.aclose()
                        line = await dial(connection.nurl)
                    with connection.pulse.call(light=True):
                        await self._ask_version(connection.nurl, line)
                except PeerTimeoutError:
                    continue  # it may hang and wake up again: that is for the pulse to judge
        finally:
            await line.aclose()

    async def _ask_version(self, nurl: Nurl, line: HTTPConnection) -> None:
        with limit(deadlines.GET_VERSION_TIMEOUT_S, "version"):
            answer = await line.request(
                b"GET", gbs.VERSION_PATH, common_headers(nurl), answer_bytes_max=gbs_bodies.SMALL_BYTES_MAX
            )
        if answer.status != 200:
            raise failure(answer, "version")
        self._take_version(answer)

    def _take_version(self, answer: Answer) -> None:
        self._version = cbor_answer(answer, gbs_bodies.read_version)
        with suppress(TypeError, ValueError):  # one that says no time, or not properly
            told = parsedate_to_datetime((answer.header(b"date") or b"").decode("ascii", "replace"))
            self.clock_ahead_s = told.timestamp() - time.time()

    async def _refresh_version(self, connection: _Connection) -> None:
        answer = await connection.pool.request(
            b"GET",
            gbs.VERSION_PATH,
            answer_bytes_max=gbs_bodies.SMALL_BYTES_MAX,
            timeout_s=deadlines.GET_VERSION_TIMEOUT_S,
            light=True,
            what="version",
        )
        if answer.status != 200:
            raise failure(answer, "version")
        self._take_version(answer)

    # --- calls ------------------------------------------------------------------------------------------------------

    async def get_version(self) -> Mapping[bytes, Any]:
        await self._refresh_version(self._connected())
        return self._version

    async def allocate_buckets(
        self, storage_index: bytes, lease: LeaseSecrets, share_numbers: frozenset[int], allocated_size: int
    ) -> tuple[frozenset[int], dict[int, IBucketWriter]]:
        """Shares that an upload of ours left behind are taken over: one that was killed, or could not say so in time.

        A server would keep them for half an hour. It tells them by the upload secret, which is therefore always the
        same for one share of one node directory.
        """
        await self._connected().uploads.wait_until_given_back(storage_index)
        uploads = self._connected().uploads
        secret = tagged_hash(_UPLOAD_SECRET_TAG, lease.renew + lease.cancel)[:UPLOAD_SECRET_BYTES]
        already, allocated = await self._allocate(uploads, storage_index, lease, secret, share_numbers, allocated_size)
        refused = share_numbers - already - allocated
        if refused and await uploads.take_back(storage_index, refused, secret):
            more = await self._allocate(uploads, storage_index, lease, secret, refused, allocated_size)
            already, allocated = already | more[0], allocated | more[1]
        for number in allocated - share_numbers:
            uploads.give_back(storage_index, number, secret)
        return already, {
            number: uploads.writer(storage_index, number, secret, allocated_size)
            for number in allocated & share_numbers
        }

    async def _allocate(
        self,
        uploads: Uploads,
        storage_index: bytes,
        lease: LeaseSecrets,
        secret: bytes,
        share_numbers: frozenset[int],
        allocated_size: int,
    ) -> tuple[frozenset[int], frozenset[int]]:
        """(shares that are there, those that may be written now)."""
        try:
            answer = await uploads.pool.request(
                b"POST",
                gbs.path("immutable", storage_index),
                (
                    *gbs.lease_headers(lease),
                    *gbs.secret_headers({Secret.UPLOAD: secret}),
                    (b"content-type", gbs.CBOR_TYPE),
                ),
                gbs_bodies.allocate_request(share_numbers, allocated_size),
                answer_bytes_max=gbs_bodies.SMALL_BYTES_MAX,
                timeout_s=deadlines.ALLOCATE_TIMEOUT_S,
                what="allocate",
            )
            if answer.status != 200:
                raise failure(answer, "allocate")
            return cbor_answer(answer, gbs_bodies.read_allocate_answer)
        except BaseException as error:
            if not isinstance(error, RemoteFailure):
                # The server may have allocated them, and would keep others from uploading them for half an hour.
                for number in share_numbers:
                    uploads.give_back(storage_index, number, secret)
            raise

    async def get_buckets(self, storage_index: bytes) -> dict[int, IBucketReader]:
        pool = self._connected().pool
        numbers = await list_shares(pool, "immutable", storage_index)
        return {number: GBSBucketReader(pool, storage_index, number) for number in numbers}

    async def add_lease(self, storage_index: bytes, lease: LeaseSecrets) -> None:
        answer = await self._connected().pool.request(
            b"PUT",
            gbs.path("lease", storage_index),
            gbs.lease_headers(lease),
            answer_bytes_max=ERROR_BYTES_MAX,
            timeout_s=deadlines.ADD_LEASE_TIMEOUT_S,
            what="add lease",
        )
        if answer.status not in (204, 404):
            raise failure(answer, "add lease")

    async def slot_readv(
        self, storage_index: bytes, share_numbers: Sequence[int], read_vectors: Sequence[tuple[int, int]]
    ) -> dict[int, list[bytes]]:
        """Over HTTP each range is a read of its own, and a share may be replaced in between.

        So ranges close to each other are read as one. If they are too far apart, the first is read after all others:
        a caller that puts the share's checkstring there sees by it whether the others are of the version it knows.
        """
        pool = self._connected().pool
        numbers = share_numbers or sorted(await list_shares(pool, "mutable", storage_index))
        calls = [
            partial(_read_ranges, pool, gbs.path("mutable", storage_index, number), read_vectors) for number in numbers
        ]
        found = await all_of(calls)
        return {number: pieces for number, pieces in zip(numbers, found, strict=True) if pieces is not None}

    async def slot_testv_and_readv_and_writev(
        self,
        storage_index: bytes,
        secrets: SlotSecrets,
        writes: Mapping[int, SlotWrite],
        read_vectors: Sequence[tuple[int, int]],
    ) -> tuple[bool, dict[int, list[bytes]]]:
        body = gbs_bodies.read_test_write_request(writes, read_vectors)
        answer = await self._connected().pool.request(
            b"POST",
            gbs.path("mutable", storage_index, "read-test-write"),
            (
                *gbs.lease_headers(secrets.lease),
                *gbs.secret_headers({Secret.WRITE_ENABLER: secrets.write_enabler}),
                (b"content-type", gbs.CBOR_TYPE),
            ),
            body,
            answer_bytes_max=SLOT_ANSWER_BYTES + gbs_bodies.SHARES_MAX * sum(length for _, length in read_vectors),
            timeout_s=deadlines.SLOT_WRITE_TIMEOUT_S,
            moved_bytes=sum(len(buffer) for buffer in body),
            what="a slot write",
        )
        if answer.status == 401:
            raise RemoteFailure("http.BadWriteEnablerError", "the server refuses this write enabler")
        if answer.status != 200:
            raise failure(answer, "a slot write")
        return cbor_answer(answer, partial(gbs_bodies.read_read_test_write_answer, read_vectors=read_vectors))

    async def advise_corrupt_share(self, share_type: str, storage_index: bytes, share_number: int, reason: str) -> None:
        if self._connection is not None:
            await advise(self._connection.pool, share_type, storage_index, share_number, reason)
        else:
            await trio.lowlevel.checkpoint()


async def _read_ranges(
    pool: ConnectionPool, path: bytes, read_vectors: Sequence[tuple[int, int]]
) -> list[bytes] | None:
    """None when there is no such share."""
    if not read_vectors:
        return []
    begin = min(offset for offset, _ in read_vectors)
    end = max(offset + length for offset, length in read_vectors)
    if end - begin <= ONE_READ_BYTES_MAX or len(read_vectors) == 1:
        span = await read_share(pool, path, begin, end - begin)
        if span is None:
            return None
        return [span[offset - begin : offset - begin + length] for offset, length in read_vectors]
    first, *others = [partial(read_share, pool, path, offset, length) for offset, length in read_vectors]
    pieces = await all_of(others)
    pieces.insert(0, await first())
    return None if None in pieces else [piece for piece in pieces if piece is not None]
