"""The storage service: what clients may do with shares, whichever protocol they speak.

Arguments are checked here. File work up to INLINE_BYTES_MAX is done at once, between two awaits: a hop to a thread
costs more than writing 100 kB, and what that thread does then is no faster for it. Larger work goes to a thread.
What changes or needs all of a storage index (slots, leases, allocation, expiry) holds that storage index's lock: who
finds it free goes on without giving way.

    owner of                       is
    the locks of storage indexes   StorageService
    uploads and their timers       StorageService.run(), which ends them all when it is cancelled
    open files                     ShareStore, UploadFiles

Source: the storage server of Tahoe-LAFS 1.20. Two differences, both for the better: a lease that does not fit makes a
slot's write fail before, not after, it was done; and a write far past a share's end must fit on the disk.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, TypeVar

import trio

from grid import stats
from grid.formats import container
from grid.interfaces import LeaseSecrets, SlotSecrets, SlotWrite
from grid.server import immutables, slots
from grid.server.checks import (
    SHARES_PER_CALL_MAX,
    check_lease,
    check_secret,
    check_share_numbers,
    check_span,
    check_storage_index,
    check_vectors,
    check_writes,
)
from grid.server.errors import BadRequestError, NoSpaceError, NoSuchShareError
from grid.server.journal import FileChange, Unlink
from grid.server.locks import Lock, Locks
from grid.server.shares import LEASE_PERIOD_S, ShareStore
from grid.server.uploads import Upload, UploadFiles

log = logging.getLogger(__name__)

READ_BYTES: Final = stats.counter("storage_read_bytes", "Bytes of immutable shares read by clients.")
ADVISORIES: Final = stats.counter("storage_corruption_reports", "Shares of ours that clients reported as damaged.")

T = TypeVar("T")

UPLOAD_TIMEOUT_S: Final = 30 * 60  # without a write
UPLOADS_MAX: Final = 10_000  # ours: in progress at a time; more are refused as if there were no space
INLINE_BYTES_MAX: Final = 2 << 20  # read or written without a thread
WORKERS: Final = 8  # threads that do large file work

APPLICATION_VERSION: Final = b"tahoe-lafs/1.20.0"  # what clients know; they look at the features, not at this
VERSION_KEY: Final = b"http://allmydata.org/tahoe/protocols/storage/v1"
UNKNOWN_SPACE: Final = 1 << 64


class StorageService:
    """Used by all front ends of one storage directory."""

    def __init__(self, store: ShareStore) -> None:
        self.store = store
        self.upload_files = UploadFiles(store)
        self._uploads: OrderedDict[tuple[bytes, int], Upload] = OrderedDict()  # written to longest ago first
        self._promised = 0  # bytes, to uploads
        self._locks = Locks()
        self._workers = trio.CapacityLimiter(WORKERS)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """End uploads nobody writes to, and all of them when cancelled."""
        task_status.started()
        try:
            while True:
                now_s = trio.current_time()
                oldest = next(iter(self._uploads.values()), None)
                if oldest is not None and now_s >= oldest.last_written_s + UPLOAD_TIMEOUT_S:
                    log.info("an upload was given up: nothing was written for %d s", UPLOAD_TIMEOUT_S)
                    oldest.abort_now()
                    continue
                # no upload begun from now on can be due before this
                await trio.sleep_until((oldest.last_written_s if oldest else now_s) + UPLOAD_TIMEOUT_S)
        finally:
            for upload in list(self._uploads.values()):
                upload.abort_now()

    # --- what it says about itself

    def get_version(self) -> dict[bytes, Any]:
        """As Foolscap sends it; HTTP leaves the four flags out."""
        space = self.store.available_space()
        space = UNKNOWN_SPACE if space is None else space
        return {
            VERSION_KEY: {
                b"maximum-immutable-share-size": space,
                b"maximum-mutable-share-size": container.MUTABLE_DATA_BYTES_MAX,
                b"available-space": space,
                b"tolerates-immutable-read-overrun": True,
                b"delete-mutable-shares-with-zero-length-writev": True,
                b"fills-holes-with-zero-bytes": True,
                b"prevents-read-past-end-of-share-data": True,
            },
            b"application-version": APPLICATION_VERSION,
        }

    # --- immutable shares

    async def allocate_buckets(
        self,
        storage_index: bytes,
        lease: LeaseSecrets,
        share_numbers: Collection[int],
        allocated_size: int,
        *,
        upload_secret: bytes | None = None,
    ) -> tuple[frozenset[int], dict[int, Upload]]:
        """(all finished shares of this storage index, which get the lease; an upload for each asked for that is neither
        finished nor being uploaded, and fits). Raises UnusableShareError when mutable shares are there, NoSpaceError
        when there is no room for a lease, BadRequestError.
        """
        check_storage_index(storage_index)
        check_lease(lease)
        numbers = check_share_numbers(share_numbers)
        check_span(0, allocated_size)
        async with self._locks.hold(storage_index):
            space = self.store.available_space()
            free = math.inf if space is None else space - self._promised
            have = await self.work(0, partial(self._lease_finished, storage_index, lease))
            uploads = {}
            for number in sorted(numbers - have):
                key = storage_index, number
                if key in self._uploads or free < allocated_size or len(self._uploads) >= UPLOADS_MAX:
                    continue
                free -= allocated_size
                uploads[number] = self._start_upload(key, lease, allocated_size, upload_secret)
        return have, uploads

    def _lease_finished(self, storage_index: bytes, lease: LeaseSecrets) -> frozenset[int]:
        held = frozenset(self.store.share_numbers(storage_index))
        for number in held:
            self._add_or_renew_immutable(storage_index, number, lease, owner=0)
        return held

    def _start_upload(
        self, key: tuple[bytes, int], lease: LeaseSecrets, size: int, upload_secret: bytes | None
    ) -> Upload:
        record = container.make_lease(
            container.CURRENT_VERSION, 0, lease.renew, lease.cancel, int(self.store.clock()) + LEASE_PERIOD_S
        )
        upload = self._uploads[key] = Upload(*key, size, record, upload_secret, self)
        self._promised += size
        return upload

    @property
    def uploads_in_progress(self) -> int:
        return len(self._uploads)

    def find_upload(self, storage_index: bytes, number: int) -> Upload | None:
        """The one in progress, if there is one."""
        return self._uploads.get((storage_index, number))

    def touch(self, upload: Upload) -> None:
        """An upload was written to: its 30 minutes begin anew."""
        upload.last_written_s = trio.current_time()
        self._uploads.move_to_end((upload.storage_index, upload.number))

    def forget(self, upload: Upload) -> None:
        """An upload has ended."""
        if self._uploads.get(key := (upload.storage_index, upload.number)) is upload:
            del self._uploads[key]
            self._promised -= upload.size

    async def share_numbers(self, storage_index: bytes) -> frozenset[int]:
        """Of all share files there, whatever their kind and state."""
        check_storage_index(storage_index)
        return frozenset(self.store.share_numbers(storage_index))

    async def immutable_share_numbers(self, storage_index: bytes) -> frozenset[int]:
        """Of finished immutable shares. Raises UnusableShareError if any of the files there is something else."""
        held = await self.share_numbers(storage_index)
        for number in held:
            with self.store.open_shares.use((storage_index, number)) as share:
                share.header()
        return held

    async def share_length(self, storage_index: bytes, number: int) -> int:
        """Bytes of data of an immutable share. Raises NoSuchShareError, UnusableShareError."""
        check_storage_index(storage_index)
        with self.store.open_shares.use((storage_index, number)) as share:
            return share.data_bytes()

    async def read(self, storage_index: bytes, number: int, offset: int, length: int) -> bytes:
        """Of an immutable share, cut at its end. Raises NoSuchShareError, UnusableShareError, BadRequestError."""
        check_storage_index(storage_index)
        check_span(offset, length)
        with self.store.open_shares.use((storage_index, number)) as share:
            wanted = max(0, min(length, share.data_bytes() - offset))
            if wanted > slots.READ_BYTES_MAX:
                raise BadRequestError(f"more than {slots.READ_BYTES_MAX} bytes to be read in one call")
            READ_BYTES.add(wanted)
            return await self.work(wanted, partial(share.read, offset, wanted))

    # --- leases

    async def add_lease(self, storage_index: bytes, lease: LeaseSecrets) -> bool:
        """Add or renew it on every share there, for 31 days from now; whether there was any. Raises NoSpaceError."""
        check_storage_index(storage_index)
        check_lease(lease)

        def add(number: int) -> None:
            if self.store.kind_of(storage_index, number) == "immutable":
                self._add_or_renew_immutable(storage_index, number, lease, owner=slots.LEASE_OWNER)
                return
            with ExitStack() as stack:
                share = slots.open_slot(self.store, storage_index, number, stack)
                slots.add_or_renew_lease(self.store, storage_index, share, lease)

        return await self._for_each_share(storage_index, add)

    async def renew_lease(self, storage_index: bytes, renew_secret: bytes) -> None:
        """On every share there. Raises NoSuchShareError when there is none, or one without such a lease."""
        check_storage_index(storage_index)
        check_secret(renew_secret)

        def renew(number: int) -> None:
            with ExitStack() as stack:
                steps = self._renewal(storage_index, number, renew_secret, stack)
                if steps:
                    self.store.journal.commit([FileChange(storage_index, number, steps)])

        if not await self._for_each_share(storage_index, renew):
            raise NoSuchShareError("no share here")

    async def cancel_lease(self, storage_index: bytes, cancel_secret: bytes) -> int:
        """On every share there; a share goes with its last lease. Returns the bytes freed. No front end offers this:
        see Tahoe-LAFS 1.8.3. Raises NoSuchShareError when no share has such a lease.
        """
        check_storage_index(storage_index)
        check_secret(cancel_secret)
        freed: list[int] = []
        found: list[int] = []

        def cancel(number: int) -> None:
            def matching(version: int, leases: Sequence[container.Lease]) -> list[int]:
                places = container.find_cancellable(leases, version, cancel_secret)
                found.extend(places)
                return places

            amount, _ = self.drop_leases(storage_index, number, matching)
            freed.append(amount)

        await self._for_each_share(storage_index, cancel)
        if not found:
            raise NoSuchShareError("no such lease")
        return sum(freed)

    def drop_leases(
        self,
        storage_index: bytes,
        number: int,
        choose: Callable[[int, Sequence[container.Lease]], list[int]],
        *,
        dry_run: bool = False,
    ) -> tuple[int, bool]:
        """(bytes freed, the share went too) for one share; `choose(container version, leases)` names their places.

        Of mutable shares some places are empty (owner 0) and stay so. For who holds the storage index's lock;
        synchronous. Raises FileNotFoundError, StorageError. A dry run only says what would be.
        """
        with ExitStack() as stack:
            share: immutables.ImmutableShare | slots.SlotShare
            if self.store.kind_of(storage_index, number) == "immutable":
                share = stack.enter_context(self.store.open_shares.use((storage_index, number)))
                header, _, leases = share.leases()
                places = choose(header.version, leases)
                steps, freed = immutables.drop_leases(share, places) if places else ([], 0)
            else:
                share = slots.open_slot(self.store, storage_index, number, stack)
                leases = share.leases()
                places = [place for place in choose(share.header.version, leases) if leases[place].owner]
                steps, freed = slots.drop_leases(share, places) if places else ([], 0)
            if steps and not dry_run:
                self.store.journal.commit([FileChange(storage_index, number, steps)])
            return freed, any(isinstance(step, Unlink) for step in steps)

    def _add_or_renew_immutable(self, storage_index: bytes, number: int, lease: LeaseSecrets, owner: int) -> None:
        expires = int(self.store.clock()) + LEASE_PERIOD_S
        with self.store.open_shares.use((storage_index, number)) as share:
            steps = immutables.renew_lease(share, lease.renew, expires)
            if steps is None:
                if not self.store.has_room_for(container.IMMUTABLE_LEASE_BYTES):
                    raise NoSpaceError("no room for a lease")
                steps = immutables.add_lease(share, lease, owner, expires)
            if steps:
                self.store.journal.commit([FileChange(storage_index, number, steps)])

    def _renewal(self, storage_index: bytes, number: int, renew: bytes, stack: ExitStack) -> Sequence[Any]:
        expires = int(self.store.clock()) + LEASE_PERIOD_S
        if self.store.kind_of(storage_index, number) == "immutable":
            immutable = stack.enter_context(self.store.open_shares.use((storage_index, number)))
            steps = immutables.renew_lease(immutable, renew, expires)
        else:
            steps = slots.renew_lease(slots.open_slot(self.store, storage_index, number, stack), renew, expires)
        if steps is None:
            raise NoSuchShareError("no such lease")
        return steps

    async def _for_each_share(self, storage_index: bytes, do: Callable[[int], None]) -> bool:
        """Whether there was any share to do it to."""

        def all_of_them() -> bool:
            numbers = self.store.share_numbers(storage_index)
            for number in numbers:
                do(number)
            return bool(numbers)

        async with self._locks.hold(storage_index):
            return await self.work(0, all_of_them)

    # --- mutable slots

    async def slot_readv(
        self, storage_index: bytes, share_numbers: Collection[int], read_vectors: Sequence[tuple[int, int]]
    ) -> dict[int, list[bytes]]:
        """{share number: [bytes of each vector, cut at the data's end]}; no share numbers means all there are.

        Raises UnusableShareError when immutable shares are there, BadRequestError.
        """
        check_storage_index(storage_index)
        if len(share_numbers) > SHARES_PER_CALL_MAX:
            raise BadRequestError("too many shares")
        check_vectors(read_vectors)
        weight = sum(length for _, length in read_vectors)
        async with self._locks.hold(storage_index):
            return await self.work(weight, partial(slots.readv, self.store, storage_index, share_numbers, read_vectors))

    async def slot_length(self, storage_index: bytes, number: int) -> int:
        """Bytes of data of a mutable share. Raises NoSuchShareError, UnusableShareError."""
        check_storage_index(storage_index)
        async with self._locks.hold(storage_index):
            with ExitStack() as stack:
                return slots.open_slot(self.store, storage_index, number, stack).header.data_bytes

    async def slot_testv_and_readv_and_writev(
        self,
        storage_index: bytes,
        secrets: SlotSecrets,
        writes: Mapping[int, SlotWrite],
        read_vectors: Sequence[tuple[int, int]],
    ) -> tuple[bool, dict[int, list[bytes]]]:
        """(all tests held and everything was written, what all shares held before). What raises wrote nothing.

        Raises BadWriteEnablerError, DataTooLargeError, NoSpaceError, UnusableShareError, BadRequestError.
        """
        check_storage_index(storage_index)
        check_secret(secrets.write_enabler)
        check_lease(secrets.lease)
        check_vectors(read_vectors)
        weight = check_writes(writes) + sum(length for _, length in read_vectors)
        call = partial(slots.read_test_write, self.store, storage_index, secrets, writes, read_vectors)
        async with self._locks.hold(storage_index):
            return await self.work(weight, call)

    # --- complaints

    async def advise_corrupt_share(self, kind: str, storage_index: bytes, number: int, reason: str) -> bool:
        """Note it for people to read, if there is such a share; whether there is. `kind`: immutable or mutable."""
        check_storage_index(storage_index)
        if kind not in ("immutable", "mutable"):
            raise BadRequestError("a share is immutable or mutable")
        if number not in self.store.share_numbers(storage_index):
            return False
        ADVISORIES.add()
        self.store.write_advisory(kind, storage_index, number, reason)
        return True

    # --- who does the work

    async def work(self, nbytes: int, function: Callable[[], T]) -> T:
        """Run file work over about `nbytes` bytes. Not a checkpoint when it is small. Never abandoned half-way."""
        if nbytes <= INLINE_BYTES_MAX and not self.store.journal.busy:
            return function()
        return await trio.to_thread.run_sync(function, limiter=self._workers)

    def hold(self, storage_index: bytes) -> Lock:
        """`async with` this, and nobody else changes that storage index meanwhile."""
        return self._locks.hold(storage_index)
