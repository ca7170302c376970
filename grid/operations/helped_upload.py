"""Uploads by way of a helper: it is sent the ciphertext once, and sends the n/k times larger shares.

    upload_chk(SI) ─ on the grid already ────────────────────────────┐
                   └ upload(reader) ─ it reads ─ it stores ─ results ┴→ check → cap

The helper gets ciphertext and never a key. Nor is it believed: while it reads, the same segments are encoded here, so
the hash that will be in the cap is known without it, and the servers it names are asked whether they have the shares.
When the connection is lost in the middle it is waited for a while, since a helper goes on where it stopped: then it
reads only what it has not got. What it has is passed over here, but encoded all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar, Final

import trio

from grid.errors import ConnectionLostError, GridError, PeerError, PeerTimeoutError, RemoteFailure
from grid.formats.hashutil import chk_storage_index
from grid.interfaces import EncodingParameters, IStorageBroker, IStorageServer, IUploadable, IUploadProgress
from grid.operations.happiness import happiness
from grid.operations.segment_encoder import EncodedTail, SegmentEncoder
from grid.operations.uploadables import EncryptAnUploadable, IRewindable
from grid.operations.worker import run_cpu_work
from grid.peers.deadlines import with_data
from grid.peers.helper import HelperClient, start_upload
from grid.transports.tub import Referenceable, RemoteReference
from grid.wire.helper_results import HelperResults
from grid.wire.remote_interfaces import RIEncryptedUploadable
from grid.wire.schemas import RemoteInterface

log = logging.getLogger(__name__)

FIRST_CONNECTION_TIMEOUT_S: Final = 5.0  # a program that has just started waits so long for its helper
RETURN_TIMEOUT_S: Final = 60.0  # a helper that was lost in the middle is waited for so long
IDLE_TRIES_MAX: Final = 3  # lost so often without having read anything: it is not waited for again
SILENCE_TIMEOUT_S: Final = 300.0  # it reads nothing and answers nothing: it may have others to serve first
PUSH_TIMEOUT_S: Final = 600.0  # after it has read everything, and more for large files
CONFIRM_TIMEOUT_S: Final = 5.0  # for the servers it names to say whether they have the shares
READ_BYTES_MAX: Final = 4 << 20  # one read_encrypted
DISTRUST_S: Final = 3600.0  # a helper that was caught lying is left alone for so long


class HelperLiedError(GridError):
    """The upload helper stored something else than what it was given. Nothing was linked."""


class CiphertextReader(Referenceable):
    """RIEncryptedUploadable: what a helper reads from, front to back, and what encodes the same bytes here."""

    remote_interface: ClassVar[RemoteInterface | None] = RIEncryptedUploadable

    def __init__(
        self, source: EncryptAnUploadable, segments: SegmentEncoder, progress: IUploadProgress | None = None
    ) -> None:
        self.failure: Exception | None = None  # the source's
        self.position = 0  # bytes handed out, or known not to be wanted
        self._source = source
        self._segments = segments
        self._progress = progress
        self._lock = trio.Lock()  # held by the one read that moves on in the source
        self._next_segment = 0
        self._held = memoryview(b"")  # the segment before that one
        self._held_start = 0

    @property
    def size(self) -> int:
        return self._segments.segmentation.size

    @property
    def params(self) -> EncodingParameters:
        return self._segments.params

    async def remote_get_size(self) -> int:
        return self.size

    async def remote_get_all_encoding_parameters(self) -> tuple[int, int, int, int]:
        self._move_to(self.size)  # asked by a helper that has all the ciphertext
        return self.params.k, self.params.happy, self.params.n, self.params.segment_size

    async def remote_read_encrypted(self, offset: int, length: int) -> list[bytes | memoryview]:
        if not (0 <= length <= READ_BYTES_MAX and self._held_start <= offset <= offset + length <= self.size):
            raise RemoteFailure("builtins.AssertionError", "ciphertext is read front to back, within the file")
        pieces: list[bytes | memoryview] = []
        async with self._lock:
            stop = offset + length
            while offset < stop:
                while offset >= self._held_start + len(self._held):
                    await self._move_on()
                first = offset - self._held_start
                piece = self._held[first : first + stop - offset]
                pieces.append(piece)
                offset += len(piece)
            self._move_to(stop)
        return pieces

    def _move_to(self, position: int) -> None:
        if self._progress is not None and position > self.position:
            self._progress.pushed(position - self.position)
        self.position = max(self.position, position)

    async def remote_get_plaintext_hashtree_leaves(self, first: int, last: int, num_segments: int) -> Sequence[bytes]:
        return await self._source.get_plaintext_hashtree_leaves(first, last, num_segments)

    async def remote_get_plaintext_hash(self) -> bytes:
        return await self._source.get_plaintext_hash()

    async def remote_close(self) -> None:
        """Some helpers say it twice. The source is closed by its owner."""

    async def finish(self) -> EncodedTail:
        """Go over what nobody read, and return the hashes. Raises what the source raises."""
        async with self._lock:
            while self._next_segment < self._segments.segmentation.num_segments:
                await self._move_on()
        return await run_cpu_work(self._segments.finish, 1000 * self._segments.segmentation.num_segments)

    async def _move_on(self) -> None:
        """Read, encrypt and encode the next segment."""
        length = self._segments.segmentation.segment_bytes(self._next_segment)

        def encode(pieces: Sequence[bytes | memoryview]) -> bytes | memoryview:
            segment = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self._segments.encode([segment])
            return segment

        try:
            if self._source.reads_in_thread:
                segment = await run_cpu_work(lambda: encode(self._source.read_encrypted_sync(length)), length)
            else:
                pieces = await self._source.read_encrypted(length, hash_only=False)
                segment = await run_cpu_work(lambda: encode(pieces), length)
        except (GridError, OSError) as error:
            self.failure = error
            raise
        self._held_start += len(self._held)
        self._held = memoryview(segment)
        self._next_segment += 1


class HelpedUploads:
    """Uploads of one grid through one helper. Any number may run at once."""

    def __init__(self, helper: HelperClient, broker: IStorageBroker) -> None:
        self._helper = helper
        self._broker = broker
        self._distrusted_until = 0.0

    async def upload(
        self, uploadable: IUploadable, progress: IUploadProgress | None = None
    ) -> tuple[EncodedTail, HelperResults] | None:
        """Store it; what was found out about it, or None when it has to be done without the helper.

        Raises HelperLiedError, after which shares of this storage index on the grid cannot be relied on, and what the
        uploadable raises. The uploadable is rewound before each try, and not closed.
        """
        if trio.current_time() < self._distrusted_until or not isinstance(uploadable, IRewindable):
            return None
        if not await self._helper.wait_connected(FIRST_CONNECTION_TIMEOUT_S, first_try_only=True):
            return None
        storage_index = chk_storage_index(await uploadable.get_encryption_key())
        tries, position = 0, 0
        while tries < IDLE_TRIES_MAX:
            uploadable.rewind()
            reader = await _reader_of(uploadable, progress)
            try:
                results = await self._by_helper(storage_index, reader)
                tail = await self._check(reader, results)
                if not await self._is_spread(storage_index, reader, results):
                    break  # what is there already is found again, and the rest added
                if progress is not None:
                    for _ in results.sharemap:
                        progress.placed()
                return tail, results
            except (ConnectionLostError, PeerTimeoutError, RemoteFailure) as error:
                if isinstance(error, RemoteFailure) and error.short_type != "DeadReferenceError":
                    if reader.failure is not None:
                        raise reader.failure from None
                    log.warning("the upload helper refused a file: %s", error)
                    break
                log.info("the upload helper was lost at %d of %d bytes: %s", reader.position, reader.size, error)
                tries = 0 if reader.position > position else tries + 1
                position = max(position, reader.position)
                if not await self._helper.wait_connected(RETURN_TIMEOUT_S):
                    break
            except PeerError as error:
                log.warning("the upload helper cannot be used: %s", error)
                break
        log.info("a file is uploaded without the helper")
        return None

    async def _by_helper(self, storage_index: bytes, reader: CiphertextReader) -> HelperResults:
        answer = await self._helper.upload_chk(storage_index)
        return await self._send(answer, reader) if isinstance(answer, RemoteReference) else answer

    async def _send(self, upload: RemoteReference, reader: CiphertextReader) -> HelperResults:
        pending = start_upload(upload, reader)
        storing_s = with_data(PUSH_TIMEOUT_S, reader.size * reader.params.n // reader.params.k)
        while True:
            position = reader.position
            patience_s = SILENCE_TIMEOUT_S if position < reader.size else storing_s
            try:
                return HelperResults.parse(await pending.result(patience_s))
            except PeerTimeoutError:
                if reader.position == position:
                    raise

    # --- not believing it

    async def _check(self, reader: CiphertextReader, results: HelperResults) -> EncodedTail:
        """Raises HelperLiedError."""
        tail = await reader.finish()
        params = reader.params
        told = results.ueb_hash, results.k, results.n, results.segment_size, results.size
        if told != (tail.ueb_hash, params.k, params.n, params.segment_size, reader.size):
            self._distrust()
            raise HelperLiedError("the upload helper stored something else than what it was given")
        return tail

    async def _is_spread(self, storage_index: bytes, reader: CiphertextReader, results: HelperResults) -> bool:
        """Whether the shares are on enough servers: as the helper says, and the servers confirm."""
        sharemap = {number: set(servers) for number, servers in results.sharemap.items() if 0 <= number < results.n}
        if happiness(sharemap) < reader.params.happy:
            log.info("a file was found on too few servers by the upload helper")
            return False
        await self._leave_out_what_is_denied(storage_index, sharemap)
        if happiness(sharemap) < reader.params.happy:
            log.error("the upload helper names servers that do not have the shares")
            self._distrust()
            return False
        return True

    def _distrust(self) -> None:
        self._distrusted_until = trio.current_time() + DISTRUST_S

    async def _leave_out_what_is_denied(self, storage_index: bytes, sharemap: dict[int, set[str]]) -> None:
        """Servers that we cannot ask are given credit."""
        named = set().union(*sharemap.values())

        async def ask(server: IStorageServer) -> None:
            try:
                held = (await server.get_buckets(storage_index)).keys()
            except PeerError:
                return
            for number, servers in sharemap.items():
                if number not in held:
                    servers.discard(server.server_id)

        with trio.move_on_after(CONFIRM_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for server in self._broker.get_permuted_servers(storage_index):
                    if server.server_id in named and getattr(server, "responsive", True):
                        nursery.start_soon(ask, server)


async def _reader_of(uploadable: IUploadable, progress: IUploadProgress | None) -> CiphertextReader:
    source = EncryptAnUploadable(uploadable)
    await source.get_storage_index()
    params = await source.get_all_encoding_parameters()
    size = await source.get_size()
    if progress is not None:
        progress.begin(0, params.n, size)
    return CiphertextReader(source, SegmentEncoder(size, params), progress)
