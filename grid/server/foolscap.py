"""The storage service over Foolscap: RIStorageServer, and a writer or reader object for each share in use.

Uploads belong to the connection their canary came over: when it is lost, those not closed are aborted at once.
One task watches each connection that has uploads, however many those are.
Source: RIStorageServer as Tahoe-LAFS 1.20 serves it; errors go out under the names its clients know.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Final

import trio

from grid.errors import RemoteFailure
from grid.interfaces import LeaseSecrets, SlotSecrets, SlotWrite, TestVector
from grid.server.errors import BadRequestError, StorageError
from grid.server.storage import StorageService
from grid.server.uploads import Upload
from grid.transports.tub import Referenceable, RemoteReference
from grid.wire.banana import Pieces
from grid.wire.remote_interfaces import RIBucketReader, RIBucketWriter, RIStorageServer
from grid.wire.schemas import RemoteInterface

log = logging.getLogger(__name__)

_ONLY_OPERATOR: Final = b"eq"


class _ToldToThePeer:
    """Refusals go out under the names peers know. What the disk says stays here: the text might hold a path."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, StorageError):
            raise RemoteFailure(error.wire_name, str(error)) from error
        if isinstance(error, OSError):
            log.error("storage failed: %s", error)
            raise RemoteFailure("builtins.OSError", error.strerror or "storage failed") from error


_TOLD_TO_THE_PEER: Final = _ToldToThePeer()


class FoolscapStorage(Referenceable):
    """RIStorageServer, to be registered under the storage swissnum. `run()` watches the connections."""

    remote_interface: ClassVar[RemoteInterface | None] = RIStorageServer
    in_turn = True

    def __init__(self, service: StorageService) -> None:
        self._service = service
        self._nursery: trio.Nursery | None = None
        self._uploads: dict[object, set[Upload]] = {}  # by connection

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; uploads of connections not watched any more then end with the service."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    # --- calls

    async def remote_get_version(self) -> dict[bytes, Any]:
        return self._service.get_version()

    async def remote_allocate_buckets(
        self,
        storage_index: bytes,
        renew_secret: bytes,
        cancel_secret: bytes,
        sharenums: set[int],
        allocated_size: int,
        canary: RemoteReference,
    ) -> tuple[set[int], dict[int, BucketWriter]]:
        lease = LeaseSecrets(renew_secret, cancel_secret)
        with _TOLD_TO_THE_PEER:
            have, uploads = await self._service.allocate_buckets(storage_index, lease, sharenums, allocated_size)
        if uploads:
            self._tie(uploads.values(), canary)
        return set(have), {number: BucketWriter(upload) for number, upload in uploads.items()}

    async def remote_add_lease(self, storage_index: bytes, renew_secret: bytes, cancel_secret: bytes) -> None:
        with _TOLD_TO_THE_PEER:
            await self._service.add_lease(storage_index, LeaseSecrets(renew_secret, cancel_secret))

    async def remote_get_buckets(self, storage_index: bytes) -> dict[int, BucketReader]:
        with _TOLD_TO_THE_PEER:
            numbers = await self._service.immutable_share_numbers(storage_index)
        return {number: BucketReader(self._service, storage_index, number) for number in sorted(numbers)}

    async def remote_slot_readv(
        self, storage_index: bytes, shares: list[int], readv: list[tuple[int, int]]
    ) -> dict[int, list[bytes]]:
        with _TOLD_TO_THE_PEER:
            return await self._service.slot_readv(storage_index, shares, readv)

    async def remote_slot_testv_and_readv_and_writev(
        self,
        storage_index: bytes,
        secrets: tuple[bytes, bytes, bytes],
        tw_vectors: dict[int, tuple[Any, Any, int | None]],
        r_vector: list[tuple[int, int]],
    ) -> tuple[bool, dict[int, list[bytes]]]:
        write_enabler, renew, cancel = secrets
        slot_secrets = SlotSecrets(write_enabler, LeaseSecrets(renew, cancel))
        with _TOLD_TO_THE_PEER:
            writes = {number: _slot_write(*vectors) for number, vectors in tw_vectors.items()}
            return await self._service.slot_testv_and_readv_and_writev(storage_index, slot_secrets, writes, r_vector)

    async def remote_advise_corrupt_share(
        self, share_type: bytes, storage_index: bytes, shnum: int, reason: bytes
    ) -> None:
        with _TOLD_TO_THE_PEER:
            await self._service.advise_corrupt_share(
                share_type.decode("utf-8", "replace"), storage_index, shnum, reason.decode("utf-8", "replace")
            )

    # --- uploads and connections

    def _tie(self, uploads: Any, canary: RemoteReference) -> None:
        connection = canary.connection
        tied = self._uploads.get(connection)
        if tied is None:
            if self._nursery is None or canary.is_lost:
                for upload in uploads:
                    upload.abort_now()
                return
            tied = self._uploads[connection] = set()
            self._nursery.start_soon(self._watch, connection, canary)
        tied.update(uploads)
        if len(tied) > 2 * self._service.uploads_in_progress + 100:
            tied.difference_update([upload for upload in tied if upload.finished])

    async def _watch(self, connection: object, canary: RemoteReference) -> None:
        try:
            await canary.wait_lost()
        finally:
            unfinished = [upload for upload in self._uploads.pop(connection) if not upload.finished]
            for upload in unfinished:
                upload.abort_now()
            if unfinished:
                log.info("a connection was lost with %d uploads unfinished", len(unfinished))


def _slot_write(tests: Any, data: Any, new_length: int | None) -> SlotWrite:
    """Raises BadRequestError, as the original does, for any operator but equality."""
    if any(operator != _ONLY_OPERATOR for _, _, operator, _ in tests):
        raise BadRequestError("")
    return SlotWrite([TestVector(offset, length, specimen) for offset, length, _, specimen in tests], data, new_length)


class BucketWriter(Referenceable):
    """RIBucketWriter: one upload."""

    remote_interface: ClassVar[RemoteInterface | None] = RIBucketWriter
    in_turn = True

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    async def remote_write(self, offset: int, data: bytes | Pieces) -> None:
        with _TOLD_TO_THE_PEER:
            await self._upload.write(offset, *(data.parts if isinstance(data, Pieces) else (data,)))

    async def remote_close(self) -> None:
        with _TOLD_TO_THE_PEER:
            await self._upload.close()

    async def remote_abort(self) -> None:
        await self._upload.abort()


class BucketReader(Referenceable):
    """RIBucketReader: one finished share."""

    remote_interface: ClassVar[RemoteInterface | None] = RIBucketReader
    in_turn = True

    def __init__(self, service: StorageService, storage_index: bytes, number: int) -> None:
        self._service = service
        self._storage_index = storage_index
        self._number = number

    async def remote_read(self, offset: int, length: int) -> bytes:
        with _TOLD_TO_THE_PEER:
            return await self._service.read(self._storage_index, self._number, offset, length)

    async def remote_advise_corrupt_share(self, reason: bytes) -> None:
        with _TOLD_TO_THE_PEER:
            await self._service.advise_corrupt_share(
                "immutable", self._storage_index, self._number, reason.decode("utf-8", "replace")
            )
