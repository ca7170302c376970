"""Uploader: stores one immutable file and returns its cap.

    key (hashing pass) → servers (placement.py) → encode and push (encode.py) → cap
                       └ or a helper does that (helped_upload.py), as long as there is one

Files of up to 55 bytes become literal caps and need no server. Convergent uploads of the same contents give
the same cap; two at once in this process are done one after the other, since a server refuses a share that
is on its way already.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import trio
from attrs import define, field, frozen

from grid import stats
from grid.errors import GridError, PeerError
from grid.formats.caps import CHKReadCap, LiteralCap
from grid.formats.segments import LITERAL_BYTES_MAX
from grid.interfaces import IStorageBroker, IUploadable, IUploadProgress
from grid.operations.encode import Encoder
from grid.operations.helped_upload import HelpedUploads, HelperLiedError
from grid.operations.leases import Secrets
from grid.operations.placement import QUERY_TIMEOUT_S, Selection, ServerSelector, Suspects, UploadSpec
from grid.operations.push import IShareholder
from grid.operations.share_writer import ShareWriter
from grid.operations.uploadables import (
    DataUploadable,
    EncryptAnUploadable,
    FileUploadable,
    FreshKey,
    ICiphertextSource,
    IRewindable,
)

__all__ = ["DataUploadable", "FileUploadable", "UploadResults", "Uploader", "chk_cap_of"]

log = logging.getLogger(__name__)

FILES: Final = stats.counter("upload_files", "Immutable files stored, literal ones left out.")
FILE_BYTES: Final = stats.counter("upload_bytes", "Bytes of the files stored.")
SHARES: Final = stats.counter("upload_shares", "Shares of immutable files sent to storage servers, by us or a helper.")
HELPED: Final = stats.counter("upload_helped", "Immutable files stored by an upload helper.")
FAILED: Final = stats.counter("upload_failures", "Uploads of immutable files that failed.")
FILE_SECONDS: Final = stats.histogram("upload_seconds", "Seconds an upload of an immutable file took.")

SMALL_SHARE_BYTES_MAX: Final = 1 << 20  # below this a second copy costs less than asking who has one


@frozen
class UploadResults:
    """IUploadResults: what an upload did."""

    cap: CHKReadCap | LiteralCap
    pushed_shares: int = 0
    preexisting_shares: int = 0
    sharemap: Mapping[int, frozenset[str]] = field(factory=dict)  # {share number: server ids}

    @property
    def uri(self) -> str:
        """The read cap, as text. A secret."""
        return str(self.cap)


@frozen
class StoredShares:
    """What became of one file's ciphertext."""

    ueb_hash: bytes = field(repr=False)
    ueb: bytes = field(repr=False)
    k: int
    n: int
    size: int  # bytes
    pushed: int
    preexisting: int
    sharemap: Mapping[int, frozenset[str]]  # {share number: server ids}


@define
class _Turn:
    lock: trio.Lock = field(factory=trio.Lock)
    users: int = 0


class Uploader:
    """IUploader: one per grid. Any number of uploads may run at once; bounding them is the caller's job."""

    def __init__(
        self,
        broker: IStorageBroker,
        secrets: Secrets,
        default_parameters: Mapping[str, int] | None = None,
        *,
        helped: HelpedUploads | None = None,
    ) -> None:
        self._broker = broker
        self._helped = helped
        self._secrets = secrets
        self._default_parameters = default_parameters
        self._suspects = Suspects()
        self._turns: dict[bytes, _Turn] = {}  # by storage index, of uploads under way

    async def upload(self, uploadable: IUploadable, progress: IUploadProgress | None = None) -> UploadResults:
        """Store it, or raise NotEnoughServersError. Closes `uploadable` in any case."""
        try:
            if self._default_parameters is not None:
                uploadable.set_default_encoding_parameters(self._default_parameters)
            literal = await _literal(uploadable)
            if literal is not None:
                return UploadResults(literal)
            began = trio.current_time()
            source = EncryptAnUploadable(uploadable)
            async with self._turn(await source.get_storage_index()):
                results = await self._upload(uploadable, source, progress)
            FILES.add()
            FILE_BYTES.add(await uploadable.get_size())
            SHARES.add(results.pushed_shares)
            FILE_SECONDS.observe(trio.current_time() - began)
            return results
        except GridError:
            FAILED.add()
            raise
        finally:
            with trio.CancelScope(shield=True):  # closing a file does not wait for anything
                await uploadable.close()

    async def _upload(
        self, uploadable: IUploadable, source: EncryptAnUploadable, progress: IUploadProgress | None
    ) -> UploadResults:
        if self._helped is not None:
            try:
                if (results := await self._by_helper(self._helped, uploadable, progress)) is not None:
                    HELPED.add()
                    return results
            except HelperLiedError as error:
                # Under this storage index there may be anything by now.
                log.error("%s; the file is stored without it, under another key", error)
                source = EncryptAnUploadable(uploadable := FreshKey(uploadable))
            if isinstance(uploadable, IRewindable):
                uploadable.rewind()
        stored = await self._store(source, progress)
        cap = CHKReadCap(await uploadable.get_encryption_key(), stored.ueb_hash, stored.k, stored.n, stored.size)
        return UploadResults(cap, stored.pushed, stored.preexisting, stored.sharemap)

    async def store_ciphertext(self, source: ICiphertextSource) -> StoredShares:
        """For who has no key: store what is encrypted already. Raises NotEnoughServersError. Does not close it."""
        async with self._turn(await source.get_storage_index()):
            return await self._store(source)

    @staticmethod
    async def _by_helper(
        helped: HelpedUploads, uploadable: IUploadable, progress: IUploadProgress | None
    ) -> UploadResults | None:
        found = await helped.upload(uploadable, progress)
        if found is None:
            return None
        tail, told = found
        cap = CHKReadCap(await uploadable.get_encryption_key(), tail.ueb_hash, told.k, told.n, told.size)
        return UploadResults(cap, told.pushed_shares, told.preexisting_shares, told.sharemap)

    @asynccontextmanager
    async def _turn(self, storage_index: bytes) -> AsyncIterator[None]:
        turn = self._turns.setdefault(storage_index, _Turn())
        turn.users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.users -= 1
            if not turn.users:
                del self._turns[storage_index]

    async def _store(self, source: ICiphertextSource, progress: IUploadProgress | None = None) -> StoredShares:
        encoder = await Encoder().set_encrypted_uploadable(source)
        storage_index = encoder.get_param("storage_index")
        _, happy, n = encoder.get_param("share_counts")
        share_size = encoder.get_param("share_size")
        selector = ServerSelector(
            self._broker, self._secrets, self._suspects, UploadSpec(storage_index, share_size, n, happy)
        )
        ask_first = share_size > SMALL_SHARE_BYTES_MAX
        selection = await selector.select(ask_first=ask_first)
        shareholders: dict[int, IShareholder] = {
            number: ShareWriter(encoder.segments.layout, number, server, writer)
            for number, (server, writer) in selection.writers.items()
        }
        encoder.set_shareholders(shareholders, selection.existing, progress)
        try:
            ueb_hash, k, n, size = await encoder.start()
        finally:
            for server_id in encoder.stalled_servers:
                self._suspects.add(server_id)
        if ask_first:
            await self._renew_leases(storage_index, selection)
        preexisting = len(selection.existing.keys())
        log.debug("stored: %d shares sent, %d there before", len(encoder.pushed), preexisting)
        return StoredShares(ueb_hash, encoder.ueb, k, n, size, len(encoder.pushed), preexisting, encoder.sharemap)

    async def _renew_leases(self, storage_index: bytes, selection: Selection) -> None:
        """On servers that hold shares but were not asked to take one, which renews too. Best effort."""

        async def renew(server_id: str) -> None:
            server = selection.servers[server_id]
            try:
                await server.add_lease(storage_index, self._secrets.lease(storage_index, server.tub_id))
            except PeerError as error:
                log.info("lease not renewed on server %s: %s", server.name, error)

        allocated = {server.server_id for server, _ in selection.writers.values()}
        with trio.move_on_after(QUERY_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for server_id, numbers in selection.holdings.items():
                    if numbers and server_id not in allocated:
                        nursery.start_soon(renew, server_id)


async def _literal(uploadable: IUploadable) -> LiteralCap | None:
    size = await uploadable.get_size()
    if size > LITERAL_BYTES_MAX:
        return None
    return LiteralCap(b"".join(await uploadable.read(size)) if size else b"")


async def chk_cap_of(uploadable: IUploadable) -> CHKReadCap | LiteralCap:
    """The cap an upload would give, computed without sending a byte. Closes `uploadable`."""
    try:
        literal = await _literal(uploadable)
        if literal is not None:
            return literal
        encoder = await Encoder().set_encrypted_uploadable(EncryptAnUploadable(uploadable))
        return CHKReadCap(await uploadable.get_encryption_key(), *await encoder.start())
    finally:
        with trio.CancelScope(shield=True):
            await uploadable.close()
