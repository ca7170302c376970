"""The storage service over HTTP: each endpoint of GBS as one method, from request to response.

Checked in this order: path and method (404, 405), the swissnum (401), the other secrets (400), then what the endpoint
itself wants. All secrets are compared in constant time.

Whatever a client sends is read in pieces (shares) or is bounded before it is read (messages). Messages that write
mutable shares may be large: all of them together take at most LARGE_BODIES_BYTES, further ones wait.
Source: the storage protocol of Tahoe-LAFS 1.20 over HTTP, version 1. Where 1.20 answers 500 to a client's mistake we
answer 400 or 416; its answers are chunked, ours have a length.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from grid import stats
from grid.errors import FormatError
from grid.interfaces import LeaseSecrets, SlotSecrets
from grid.server.errors import (
    BadRequestError,
    BadWriteEnablerError,
    ConflictingWriteError,
    DataTooLargeError,
    NoSuchShareError,
    StorageError,
    UploadFinishedError,
)
from grid.server.storage import VERSION_KEY, StorageService
from grid.server.uploads import Upload
from grid.transports.http_server import BodyTooLargeError, Request, Response
from grid.wire import gbs, gbs_bodies
from grid.wire.cbor import Buffer
from grid.wire.gbs import LEASE_SECRETS, Route, Secret

log = logging.getLogger(__name__)

SERVED_SECONDS: Final = stats.histograms(
    "http_request_seconds", "Seconds until we began to answer a storage client's request over HTTP.", label="endpoint"
)

SLOT_BODY_BYTES_MAX: Final = 512 << 20  # ours, of one message that writes mutable shares
LARGE_BODIES_BYTES: Final = 512 << 20  # all of those above SMALL_BODY_BYTES, at any time
SMALL_BODY_BYTES: Final = 1 << 20
ROOM_TIMEOUT_S: Final = 60.0
PIECE_BYTES: Final = 512 << 10  # of a share, read and sent at a time
WRITE_ENABLER_BYTES: Final = 32

_HTML: Final = ((b"content-type", b"text/html; charset=utf-8"),)
_DATA: Final = ((b"content-type", gbs.DATA_TYPE),)
_SECRETS: Final[Mapping[str, frozenset[Secret]]] = {
    "allocate": LEASE_SECRETS | {Secret.UPLOAD},
    "write": frozenset({Secret.UPLOAD}),
    "abort": frozenset({Secret.UPLOAD}),
    "lease": LEASE_SECRETS,
    "read_test_write": LEASE_SECRETS | {Secret.WRITE_ENABLER},
}


class _Refusal(Exception):
    """Ends a request with a status that says it all."""

    def __init__(self, status: int, headers: Sequence[tuple[bytes, bytes]] = (), body: bytes = b"") -> None:
        super().__init__(status)
        self.response = Response(status, headers, (body,))


Secrets = Mapping[Secret, bytes]
_Endpoint = Callable[[Request, Route, Secrets], Awaitable[Response]]


class GBSStorage:
    """The handler for `serve_http`."""

    def __init__(self, service: StorageService, swissnum: str) -> None:
        self._service = service
        self._swissnum = swissnum
        self._room = _Room(LARGE_BODIES_BYTES)
        self._endpoints: Mapping[str, _Endpoint] = {
            "version": self._version,
            "allocate": self._allocate,
            "write": self._write,
            "abort": self._abort,
            "list": self._list,
            "read": self._read,
            "corrupt": self._corrupt,
            "lease": self._lease,
            "read_test_write": self._read_test_write,
        }

    async def __call__(self, request: Request) -> Response:
        route = gbs.find_route(request.method, request.target)
        if route.name is None:
            if not route.allowed:
                return Response(404, _HTML, (b"<html><title>404</title>No such resource.</html>\n",))
            allow = (b"allow", b", ".join(route.allowed))
            return Response(405, (*_HTML, allow), (b"<html><title>405</title>Method not allowed.</html>\n",))
        if not gbs.is_authorized(request.headers, self._swissnum):
            return Response(401, body=(b"Wrong Authorization header.\n",))
        try:
            secrets = gbs.read_secrets(request.headers, _SECRETS.get(route.name, frozenset()))
            began = trio.current_time()
            response = await self._endpoints[route.name](request, route, secrets)
            SERVED_SECONDS.of(route.name).observe(trio.current_time() - began)
            return response
        except _Refusal as refusal:
            return refusal.response
        except (FormatError, StorageError, BodyTooLargeError, OSError) as error:
            return _refused(error, _DATA if route.name == "read" else ())

    # --- endpoints

    async def _version(self, request: Request, route: Route, secrets: Secrets) -> Response:
        version = self._service.get_version()
        told = version[VERSION_KEY]
        return _cbor(
            request,
            gbs_bodies.version_answer(
                available_space=told[b"available-space"],
                maximum_mutable_share_size=told[b"maximum-mutable-share-size"],
                application=version[b"application-version"],
            ),
        )

    async def _allocate(self, request: Request, route: Route, secrets: Secrets) -> Response:
        body = await _message(request, gbs_bodies.ALLOCATE_BYTES_MAX)
        numbers, size = gbs_bodies.read_allocate_request(body)
        already, uploads = await self._service.allocate_buckets(
            route.storage_index, _lease_of(secrets), numbers, size, upload_secret=secrets[Secret.UPLOAD]
        )
        return _cbor(request, gbs_bodies.allocate_answer(already, uploads))

    async def _write(self, request: Request, route: Route, secrets: Secrets) -> Response:
        try:
            offset, length = gbs.read_content_range(request.header(b"content-range") or b"")
        except FormatError:
            raise _Refusal(416) from None
        upload = self._upload(route, secrets)
        if offset + length > upload.size:
            raise _Refusal(416)
        if request.length is not None and request.length < length:
            raise _Refusal(400, body=b"The body is shorter than its range.\n")
        end = offset + length
        while offset < end:
            pieces = await request.receive_pieces()
            if not pieces:
                raise _Refusal(400, body=b"The body is shorter than its range.\n")
            size = sum(map(len, pieces))
            if size > end - offset:  # a longer body is cut to its range
                pieces = (memoryview(b"".join(pieces))[: end - offset],)
                size = end - offset
            await upload.write(offset, *pieces)
            offset += size
        return _cbor(request, gbs_bodies.write_answer(upload.required), 201 if await _close(upload) else 200)

    def _upload(self, route: Route, secrets: Secrets) -> Upload:
        upload = self._service.find_upload(route.storage_index, route.number)
        if upload is None:
            raise _Refusal(404)
        if not hmac.compare_digest(upload.upload_secret or b"", secrets[Secret.UPLOAD]):
            raise _Refusal(401)
        return upload

    async def _abort(self, request: Request, route: Route, secrets: Secrets) -> Response:
        held = await self._service.share_numbers(route.storage_index)
        if route.number in held:
            raise _Refusal(405)
        await self._upload(route, secrets).abort()
        return Response(200)

    async def _list(self, request: Request, route: Route, secrets: Secrets) -> Response:
        if route.kind == "immutable":
            numbers = await self._service.immutable_share_numbers(route.storage_index)
        else:
            numbers = await self._service.share_numbers(route.storage_index)
        return _cbor(request, gbs_bodies.share_numbers_answer(numbers))

    async def _read(self, request: Request, route: Route, secrets: Secrets) -> Response:
        if route.kind == "immutable":
            share: _Share = _Immutable(self._service, route)
        else:
            share = _Slot(self._service, route)
        wanted = request.header(b"range")
        if wanted is None:
            length = await share.length()
            return Response(200, _DATA, _Pieces(share, 0, length), length)
        try:
            offset, length = gbs.read_range(wanted)
        except FormatError:
            await share.length()  # an unknown share is the greater mistake
            raise _Refusal(416, _DATA) from None
        if length > PIECE_BYTES:
            length = min(length, await share.length() - offset)
        if length <= PIECE_BYTES:
            data = await share.read(offset, max(0, length))
            length, body = len(data), (data,)
        if length <= 0:
            return Response(204, _DATA)
        headers = (*_DATA, (b"content-range", gbs.content_range_header(offset, length)))
        if length <= PIECE_BYTES:
            return Response(206, headers, body)
        return Response(206, headers, _Pieces(share, offset, length), length)

    async def _corrupt(self, request: Request, route: Route, secrets: Secrets) -> Response:
        if route.number not in await self._service.share_numbers(route.storage_index):
            raise _Refusal(404)
        reason = gbs_bodies.read_corrupt_request(await _message(request, gbs_bodies.CORRUPT_BYTES_MAX))
        await self._service.advise_corrupt_share(route.kind, route.storage_index, route.number, reason)
        return Response(200)

    async def _lease(self, request: Request, route: Route, secrets: Secrets) -> Response:
        found = await self._service.add_lease(route.storage_index, _lease_of(secrets))
        return Response(204 if found else 404)

    async def _read_test_write(self, request: Request, route: Route, secrets: Secrets) -> Response:
        enabler = secrets[Secret.WRITE_ENABLER].ljust(WRITE_ENABLER_BYTES, b"\0")[:WRITE_ENABLER_BYTES]
        async with self._room.for_body_of(request):
            body = await _message(request, SLOT_BODY_BYTES_MAX if request.length is not None else SMALL_BODY_BYTES)
            writes, reads = gbs_bodies.read_read_test_write_request(body)
            success, data = await self._service.slot_testv_and_readv_and_writev(
                route.storage_index, SlotSecrets(enabler, _lease_of(secrets)), writes, reads
            )
        return _cbor(request, gbs_bodies.read_test_write_answer(success, data))


# --- shares to be read --------------------------------------------------------------------------------------


class _Share:
    """One share of either kind. Both methods raise NoSuchShareError."""

    def __init__(self, service: StorageService, route: Route) -> None:
        self._service = service
        self._storage_index = route.storage_index
        self._number = route.number

    async def length(self) -> int:
        raise NotImplementedError

    async def read(self, offset: int, length: int) -> bytes:
        raise NotImplementedError


class _Immutable(_Share):
    async def length(self) -> int:
        return await self._service.share_length(self._storage_index, self._number)

    async def read(self, offset: int, length: int) -> bytes:
        return await self._service.read(self._storage_index, self._number, offset, length)


class _Slot(_Share):
    async def length(self) -> int:
        return await self._service.slot_length(self._storage_index, self._number)

    async def read(self, offset: int, length: int) -> bytes:
        found = await self._service.slot_readv(self._storage_index, [self._number], [(offset, length)])
        if self._number not in found:
            raise NoSuchShareError("no such share")
        return found[self._number][0]


class _Pieces(AsyncIterator[Buffer]):
    """A range of a share, read as it is sent. Ends early if the share is cut meanwhile."""

    def __init__(self, share: _Share, offset: int, length: int) -> None:
        self._share = share
        self._offset = offset
        self._end = offset + length

    async def __anext__(self) -> Buffer:
        if self._offset >= self._end:
            raise StopAsyncIteration
        try:
            data = await self._share.read(self._offset, min(PIECE_BYTES, self._end - self._offset))
        except (StorageError, OSError) as error:
            log.info("a share could not be read to its end: %s", error)
            data = b""
        if not data:
            raise StopAsyncIteration
        self._offset += len(data)
        return data


# --- parts of requests --------------------------------------------------------------------------------------


def _refused(error: Exception, headers: Sequence[tuple[bytes, bytes]]) -> Response:
    """What clients and storage do wrong, as statuses. What the disk says stays here: the text might hold a path."""
    match error:
        case FormatError() | BadRequestError():
            return Response(400, body=(f"{error}\n".encode(),))
        case BodyTooLargeError():
            return Response(413, headers)
        case NoSuchShareError() | UploadFinishedError():
            return Response(404, headers)
        case ConflictingWriteError():
            return Response(409, headers)
        case BadWriteEnablerError():
            return Response(401, headers)
        case DataTooLargeError():
            return Response(500, headers)
    log.warning("storage failed: %s", error)  # no space, broken or other shares than expected, the disk itself
    return Response(500, headers)


async def _message(request: Request, bytes_max: int) -> bytes:
    """A CBOR body. Raises _Refusal, BodyTooLargeError."""
    content_type = request.header(b"content-type")
    if content_type is not None and not gbs.is_cbor(content_type):
        raise _Refusal(415)
    return await request.read_body(bytes_max)


def _cbor(request: Request, body: Sequence[Buffer], status: int = 200) -> Response:
    if not gbs.accepts_cbor(request.header(b"accept")):
        raise _Refusal(406)
    return Response(status, ((b"content-type", gbs.CBOR_TYPE),), body)


def _lease_of(secrets: Secrets) -> LeaseSecrets:
    return LeaseSecrets(secrets[Secret.LEASE_RENEW], secrets[Secret.LEASE_CANCEL])


async def _close(upload: Upload) -> bool:
    """Publish the share if it is whole; whether it is."""
    if not upload.complete:
        return False
    try:
        await upload.close()
    except UploadFinishedError:
        if upload.state != "closed":  # else another request brought its last byte at the same time
            raise
    return True


class _Room:
    """Memory for large bodies, given out in the order it was asked for."""

    def __init__(self, bytes_max: int) -> None:
        self._left = bytes_max
        self._turn = trio.Lock()
        self._freed = trio.Event()

    @asynccontextmanager
    async def for_body_of(self, request: Request) -> AsyncIterator[None]:
        """Raises _Refusal."""
        wanted = request.length or 0
        if wanted > SLOT_BODY_BYTES_MAX:
            raise _Refusal(413)
        if wanted <= SMALL_BODY_BYTES:
            wanted = 0  # those are bounded by the number of connections
        elif not await self._take(wanted):
            raise _Refusal(503)
        try:
            yield
        finally:
            self._left += wanted
            self._freed.set()

    async def _take(self, wanted: int) -> bool:
        with trio.move_on_after(ROOM_TIMEOUT_S):
            async with self._turn:
                while self._left < wanted:
                    self._freed = trio.Event()
                    await self._freed.wait()
                self._left -= wanted
                return True
        return False
