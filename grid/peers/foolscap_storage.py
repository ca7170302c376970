"""A storage server reached over Foolscap: connected for as long as the grid is joined, and dialled again when lost.

Every call has its deadline (`grid/peers/deadlines.py`) and raises PeerError. Writing of immutable shares is
pipelined (`grid/peers/buckets.py`). A server that stops answering is noticed (`grid/peers/pulse.py`).

Source: the remote interface RIStorageServer, as Tahoe-LAFS 1.20 serves it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import trio
from attrs import field, frozen

from grid.errors import PeerError, RemoteFailure, RemoteProtocolError
from grid.formats.announcement import Announcement
from grid.interfaces import IBucketReader, IBucketWriter, LeaseSecrets, SlotSecrets, SlotWrite
from grid.peers import deadlines
from grid.peers.announced import AnnouncedServer, bounded_version
from grid.peers.buckets import READ_BYTES_MAX, FoolscapBucketReader, FoolscapBucketWriter, WriteWindow, advice
from grid.peers.giving_back import GivingBack
from grid.peers.pulse import Pulse
from grid.peers.reconnect import Reconnector, keep_connected
from grid.transports.tub import PendingCall, RemoteReference, Tub
from grid.wire.references import Referenceable
from grid.wire.remote_interfaces import RIStorageServer

log = logging.getLogger(__name__)

LIGHT_BYTES_MAX: Final = 16 << 10  # calls that move more say more about the line than about latency


@frozen(eq=False)
class _Connection:
    """What lives as long as one connection."""

    reference: RemoteReference
    nursery: trio.Nursery
    pulse: Pulse
    window: WriteWindow
    # the server drops unfinished uploads when the connection this came over is lost
    canary: Referenceable = field(factory=Referenceable)
    giving_back: GivingBack = field(factory=GivingBack)


class FoolscapStorageServer(AnnouncedServer[_Connection]):
    """IStorageServer over RIStorageServer. `run()` keeps it connected."""

    def __init__(self, announcement: Announcement, *, keepalive_s: float, changed: Callable[[], None] = lambda: None):
        """Raises FormatError when the announcement has no usable FURL. `changed` is called at connect and loss."""
        super().__init__(announcement, changed=changed)
        self._keepalive_s = keepalive_s

    # --- being connected --------------------------------------------------------------------------------------------

    async def run(self, reconnector: Reconnector, dials: trio.CapacityLimiter) -> None:
        """Stay connected, until cancelled."""
        backoff = reconnector.join()

        async def serve(tub: Tub, reference: RemoteReference) -> None:
            pulse = Pulse()
            async with trio.open_nursery() as nursery:
                connection = _Connection(reference, nursery, pulse, WriteWindow(pulse))
                try:
                    await self._refresh_version(connection)
                    backoff.connected()
                    nursery.start_soon(connection.window.run)
                    self._connection = connection
                    log.info("connected to storage server %s (%s)", self.name, self.application_version)
                    self._changed()
                    await pulse.watch(lambda: self._refresh_version(connection))
                except PeerError as error:
                    ended = error
                finally:
                    self._connection = None
                    nursery.cancel_scope.cancel()
            raise ended  # outside of the nursery, which would wrap it into a group

        self._dialling_since = trio.current_time()
        try:
            await keep_connected(
                self._furl,
                RIStorageServer,
                serve=serve,
                failed=self._failed,
                backoff=backoff,
                dials=dials,
                keepalive_s=self._keepalive_s,
            )
        finally:
            reconnector.leave(backoff)
            self._connection = None

    async def _refresh_version(self, connection: _Connection) -> None:
        try:
            with connection.pulse.call(light=True):
                version = await connection.reference.call("get_version", timeout_s=deadlines.GET_VERSION_TIMEOUT_S)
            self._version = bounded_version(version)
        except RemoteFailure as error:
            if error.short_type not in ("Violation", "AttributeError"):
                raise
            self._version = {b"application-version": b"before 1.3"}  # the method is younger than that server

    async def _call(
        self, method: str, *args: object, timeout_s: float, moved_bytes: int = 0, light: bool = False
    ) -> Any:
        connection = self._connected()
        with connection.pulse.call(moved_bytes, light=light):
            return await connection.reference.call(method, *args, timeout_s=deadlines.with_data(timeout_s, moved_bytes))

    # --- calls ------------------------------------------------------------------------------------------------------

    async def get_version(self) -> Mapping[bytes, Any]:
        await self._refresh_version(self._connected())
        return self._version

    async def allocate_buckets(
        self, storage_index: bytes, lease: LeaseSecrets, share_numbers: frozenset[int], allocated_size: int
    ) -> tuple[frozenset[int], dict[int, IBucketWriter]]:
        await self._connected().giving_back.wait(storage_index)
        connection = self._connected()
        pending = connection.reference.send(
            "allocate_buckets",
            storage_index,
            lease.renew,
            lease.cancel,
            set(share_numbers),
            allocated_size,
            connection.canary,
        )
        try:
            with connection.pulse.call():
                already, allocated = await pending.result(timeout_s=deadlines.ALLOCATE_TIMEOUT_S)
        except BaseException as error:
            if self._connection is connection and not isinstance(error, RemoteFailure):
                # Nobody waits any more, but the server may yet hand out writers, and would keep others from
                # uploading these shares for half an hour if nobody gave them back.
                given_back = trio.Event()
                connection.giving_back.note(storage_index, given_back)
                connection.nursery.start_soon(self._give_back, connection, pending, given_back)
            raise
        writers: dict[int, IBucketWriter] = {}
        for number, reference in allocated.items():
            writer = FoolscapBucketWriter(reference, connection.window, connection.pulse)
            if number in share_numbers:
                writers[number] = writer
            else:
                await writer.abort()
        return frozenset(already), writers

    async def _give_back(self, connection: _Connection, pending: PendingCall, given_back: trio.Event) -> None:
        try:
            with suppress(PeerError):
                _, allocated = await pending.result(timeout_s=deadlines.ABANDONED_TIMEOUT_S)
                for reference in allocated.values():
                    await FoolscapBucketWriter(reference, connection.window, connection.pulse).abort()
        finally:
            given_back.set()  # or the connection is lost, and the server forgets what came over it

    async def get_buckets(self, storage_index: bytes) -> dict[int, IBucketReader]:
        connection = self._connected()
        buckets = await self._call("get_buckets", storage_index, timeout_s=deadlines.GET_BUCKETS_TIMEOUT_S, light=True)
        return {number: FoolscapBucketReader(reference, connection.pulse) for number, reference in buckets.items()}

    async def add_lease(self, storage_index: bytes, lease: LeaseSecrets) -> None:
        await self._call("add_lease", storage_index, lease.renew, lease.cancel, timeout_s=deadlines.ADD_LEASE_TIMEOUT_S)

    async def slot_readv(
        self, storage_index: bytes, share_numbers: Sequence[int], read_vectors: Sequence[tuple[int, int]]
    ) -> dict[int, list[bytes]]:
        most_bytes = sum(length for _, length in read_vectors)
        shares: dict[int, list[bytes]] = await self._call(
            "slot_readv",
            storage_index,
            list(share_numbers),
            [tuple(vector) for vector in read_vectors],
            timeout_s=deadlines.SLOT_READ_TIMEOUT_S,
            # a reader may ask for more than there is, and a deadline has to stay one
            moved_bytes=min(most_bytes, READ_BYTES_MAX),
            light=most_bytes <= LIGHT_BYTES_MAX,
        )
        return _checked_reads(shares, read_vectors)

    async def slot_testv_and_readv_and_writev(
        self,
        storage_index: bytes,
        secrets: SlotSecrets,
        writes: Mapping[int, SlotWrite],
        read_vectors: Sequence[tuple[int, int]],
    ) -> tuple[bool, dict[int, list[bytes]]]:
        vectors = {
            number: (
                [(test.offset, test.length, b"eq", test.specimen) for test in write.tests],
                [(offset, data) for offset, data in write.data],
                write.new_length,
            )
            for number, write in writes.items()
        }
        passed, shares = await self._call(
            "slot_testv_and_readv_and_writev",
            storage_index,
            (secrets.write_enabler, secrets.lease.renew, secrets.lease.cancel),
            vectors,
            [tuple(vector) for vector in read_vectors],
            timeout_s=deadlines.SLOT_WRITE_TIMEOUT_S,
            moved_bytes=sum(len(data) for write in writes.values() for _, data in write.data),
        )
        return passed, _checked_reads(shares, read_vectors)

    async def advise_corrupt_share(self, share_type: str, storage_index: bytes, share_number: int, reason: str) -> None:
        with suppress(PeerError):
            await self._call(
                "advise_corrupt_share",
                share_type.encode(),
                storage_index,
                share_number,
                advice(reason),
                timeout_s=deadlines.ADVISE_TIMEOUT_S,
            )


def _checked_reads(shares: dict[int, list[bytes]], read_vectors: Sequence[tuple[int, int]]) -> dict[int, list[bytes]]:
    for pieces in shares.values():
        if len(pieces) != len(read_vectors) or any(
            len(piece) > length for piece, (_, length) in zip(pieces, read_vectors, strict=True)
        ):
            raise RemoteProtocolError("a server's answer does not fit the read vectors")
    return shares
