"""Mutable shares: reading them, and working out what a change does to their files. Synchronous; see shares.py.

A change is worked out as steps first and then given to the journal, which does all of them or none, for all shares of
a call together. Lengths only grow in the file: a share cut short keeps its bytes, which are zeroed where a later write
jumps over them.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

from attrs import evolve

from grid.errors import FormatError
from grid.formats import base32, container
from grid.interfaces import LeaseSecrets, SlotSecrets, SlotWrite
from grid.server.errors import (
    BadRequestError,
    BadWriteEnablerError,
    DataTooLargeError,
    NoSpaceError,
    NoSuchShareError,
    UnknownMutableContainerVersionError,
    UnusableShareError,
)
from grid.server.journal import FileChange, Rename, Step, Unlink, Write, Zero, do_steps
from grid.server.shares import LEASE_PERIOD_S, ShareStore

READ_BYTES_MAX: Final = 64 << 20  # ours, of all vectors of all shares in one call
LEASE_OWNER: Final = 1  # the original's; 0 would mean that there is no lease

ReadVectors = Sequence[tuple[int, int]]


class SlotShare:
    """One mutable share file, open, as it was before the call."""

    def __init__(self, fd: int, number: int) -> None:
        """Raises UnusableShareError."""
        self.fd = fd
        self.number = number
        self.file_bytes = os.fstat(fd).st_size
        try:
            start = os.pread(fd, container.MUTABLE_DATA_OFFSET, 0)
            self.header = container.MutableHeader.parse(start, self.file_bytes)
        except container.UnknownContainerError as error:
            raise UnknownMutableContainerVersionError(f"share {number}: {error}") from None
        except FormatError as error:
            raise UnusableShareError(f"share {number}: {error}") from None

    def cut(self, offset: int, length: int) -> int:
        """How many bytes a read gives."""
        return max(0, min(length, self.header.data_bytes - offset))

    def read(self, offset: int, length: int) -> bytes:
        length = self.cut(offset, length)
        return os.pread(self.fd, length, container.MUTABLE_DATA_OFFSET + offset) if length else b""

    def extra_block(self) -> bytes:
        """Count and records of the leases beyond the first four."""
        count = os.pread(self.fd, 4, self.header.extra_offset)
        try:
            size = container.extra_block_bytes(count, self.header, self.file_bytes)
        except FormatError as error:
            raise UnusableShareError(f"share {self.number}: {error}") from None
        return count if size == len(count) else os.pread(self.fd, size, self.header.extra_offset)

    def leases(self) -> list[container.Lease]:
        """By place: four slots, then the extra ones; empty ones included."""
        return [*self.header.slots, *container.unpack_extra_leases(self.extra_block())]


class SlotEdit:
    """What a call does to one share: collected here, nothing is written."""

    def __init__(self, header: container.MutableHeader, extra_block: bytes, file_bytes: int) -> None:
        self._before = header
        self._version = header.version
        self._leases = [*header.slots, *container.unpack_extra_leases(extra_block)]
        self._extra_block = extra_block
        self._file_bytes = file_bytes
        self._steps: list[Step] = []
        self._touched_slots: set[int] = set()
        self.data_bytes = header.data_bytes
        self.extra_offset = header.extra_offset

    @classmethod
    def of(cls, share: SlotShare) -> SlotEdit:
        return cls(share.header, share.extra_block(), share.file_bytes)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Raises DataTooLargeError."""
        end = offset + len(data)
        if end > container.MUTABLE_DATA_BYTES_MAX:
            raise DataTooLargeError(container.MUTABLE_DATA_BYTES_MAX, offset, len(data))
        if end >= self.data_bytes:
            # The block moved out of the way needs no blanking: data, or the zeros before them, cover its old place.
            self.extra_offset = max(self.extra_offset, container.MUTABLE_DATA_OFFSET + end)
            if offset > self.data_bytes:
                gap = offset - self.data_bytes
                self._steps.append(Zero(container.MUTABLE_DATA_OFFSET + self.data_bytes, gap))
            self.data_bytes = end
        if data:
            self._steps.append(Write(container.MUTABLE_DATA_OFFSET + offset, data))

    def truncate(self, length: int) -> None:
        self.data_bytes = min(self.data_bytes, length)

    def add_or_renew_lease(self, lease: LeaseSecrets, expires: int, node_id: bytes) -> bool:
        """Whether the file needs room for one lease more."""
        place = container.find_renewable(
            (lease if lease.owner else _NOBODYS for lease in self._leases), self._version, lease.renew
        )
        if place is not None:
            if expires > self._leases[place].expires:
                self._put_lease(place, self._leases[place].renewed(expires))
            return False
        new = container.make_lease(self._version, LEASE_OWNER, lease.renew, lease.cancel, expires, node_id)
        place = next((place for place, lease in enumerate(self._leases) if not lease.owner), len(self._leases))
        needs_room = place == len(self._leases)
        if needs_room and place >= container.EXTRA_LEASES_MAX:
            raise NoSpaceError("too many leases on one share")
        self._put_lease(place, new)
        return needs_room

    def _put_lease(self, place: int, lease: container.Lease) -> None:
        if place == len(self._leases):
            self._leases.append(lease)
        else:
            self._leases[place] = lease
        self._touched_slots.add(place)

    def file_bytes_after(self) -> int:
        extra = len(self._leases) - container.MUTABLE_SLOTS
        return max(self._file_bytes, self.extra_offset + 4 + extra * container.MUTABLE_LEASE_BYTES)

    def steps(self) -> list[Step]:
        """For a share that is there."""
        steps = list(self._steps)
        for place in sorted(self._touched_slots):
            if place < container.MUTABLE_SLOTS:
                position = container.mutable_slot_offset(place, 0)
                steps.append(Write(position, container.pack_mutable_lease(self._leases[place])))
        block = container.pack_extra_leases(self._leases[container.MUTABLE_SLOTS :])
        if block != self._extra_block or self.extra_offset != self._before.extra_offset:
            steps.append(Write(self.extra_offset, block))
        lengths = self.data_bytes, self.extra_offset
        if lengths != (self._before.data_bytes, self._before.extra_offset):
            steps.append(Write(container.MUTABLE_LENGTHS_OFFSET, container.pack_mutable_lengths(*lengths)))
        return steps

    def steps_for_new_file(self) -> list[Step]:
        """For a share that is not: all of it."""
        slots = tuple(self._leases[: container.MUTABLE_SLOTS])
        header = evolve(self._before, data_bytes=self.data_bytes, extra_offset=self.extra_offset, slots=slots)
        block = container.pack_extra_leases(self._leases[container.MUTABLE_SLOTS :])
        start = Write(0, container.pack_mutable_header(header))
        return [start, *self._steps, Write(self.extra_offset, block)]


# An empty place matches no secret, whatever is left in it.
_NOBODYS: Final = container.Lease(0, b"", b"", 0)


# --- calls ----------------------------------------------------------------------------------------------------------


def open_slot(store: ShareStore, storage_index: bytes, number: int, stack: ExitStack) -> SlotShare:
    """Open until `stack` is closed. Raises NoSuchShareError, UnusableShareError."""
    try:
        fd = os.open(store.share(storage_index, number), os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NoSuchShareError(f"no share {number}") from None
    stack.callback(os.close, fd)
    return SlotShare(fd, number)


def readv(
    store: ShareStore, storage_index: bytes, wanted: Iterable[int], vectors: ReadVectors
) -> dict[int, list[bytes]]:
    """{share number: what each vector gives}, of those shares of `wanted` there are; nothing wanted means all."""
    held = store.share_numbers(storage_index)
    chosen = set(wanted)
    with ExitStack() as stack:
        shares = [open_slot(store, storage_index, n, stack) for n in held if not chosen or n in chosen]
        return _read_all(shares, vectors)


def _read_all(shares: Iterable[SlotShare], vectors: ReadVectors) -> dict[int, list[bytes]]:
    shares = list(shares)
    if sum(share.cut(*vector) for share in shares for vector in vectors) > READ_BYTES_MAX:
        raise BadRequestError(f"more than {READ_BYTES_MAX} bytes to be read in one call")
    return {share.number: [share.read(*vector) for vector in vectors] for share in shares}


def read_test_write(
    store: ShareStore,
    storage_index: bytes,
    secrets: SlotSecrets,
    writes: Mapping[int, SlotWrite],
    vectors: ReadVectors,
) -> tuple[bool, dict[int, list[bytes]]]:
    """The whole of one call; nobody else may use this storage index meanwhile. What fails has changed nothing."""
    with ExitStack() as stack:
        held = {number: open_slot(store, storage_index, number, stack) for number in store.share_numbers(storage_index)}
        for share in held.values():
            if not hmac.compare_digest(share.header.write_enabler, secrets.write_enabler):
                raise BadWriteEnablerError(base32.b2a(share.header.node_id))
        passed = all(_tests_hold(held.get(number), write) for number, write in writes.items())
        before = _read_all(held.values(), vectors)
        if passed and writes:
            _write_all(store, storage_index, secrets, writes, held)
    return passed, before


def _tests_hold(share: SlotShare | None, write: SlotWrite) -> bool:
    for test in write.tests:
        length = share.cut(test.offset, test.length) if share is not None else 0
        if length != len(test.specimen):
            return False  # before reading: a test may name any length
        if share is not None and length and share.read(test.offset, length) != test.specimen:
            return False
    return True


def _write_all(
    store: ShareStore,
    storage_index: bytes,
    secrets: SlotSecrets,
    writes: Mapping[int, SlotWrite],
    held: Mapping[int, SlotShare],
) -> None:
    changes = []
    made = []
    room_needed = 0  # for extra leases, and for what is jumped over: a hole is promised space
    try:
        for number, write in writes.items():
            share = held.get(number)
            if write.new_length == 0:
                if share is not None:
                    changes.append(FileChange(storage_index, number, [Unlink()]))
                continue
            edit, room = _edit(store, share, secrets, write)
            room_needed += room
            if room_needed and not store.has_room_for(room_needed):
                raise NoSpaceError("no room for this change")
            if share is not None:
                if steps := edit.steps():
                    changes.append(FileChange(storage_index, number, steps, edit.file_bytes_after()))
            else:
                temporary = store.temporary(storage_index, number)
                made.append(temporary)
                _make_file(temporary, edit)
                changes.append(FileChange(storage_index, number, [Rename()]))
        if changes:
            store.journal.commit(changes)
    except BaseException:
        for temporary in made:
            # after commit() has begun to rename, those that are left are finished by the journal
            if not store.journal.unfinished:
                _forget(temporary)
        raise


def _edit(store: ShareStore, share: SlotShare | None, secrets: SlotSecrets, write: SlotWrite) -> tuple[SlotEdit, int]:
    """What becomes of one share, and how many bytes of holes and leases it takes beyond the data sent."""
    if share is not None:
        edit = SlotEdit.of(share)
    else:
        header = container.fresh_mutable_header(store.tub_id, secrets.write_enabler)
        edit = SlotEdit(header, container.pack_extra_leases([]), container.MUTABLE_DATA_OFFSET + 4)
    before = edit.file_bytes_after()
    for offset, data in write.data:
        edit.write(offset, data)
    if write.new_length is not None:
        edit.truncate(write.new_length)
    sent = sum(len(data) for _, data in write.data)
    room = max(0, edit.file_bytes_after() - before - sent)
    if edit.add_or_renew_lease(secrets.lease, int(store.clock()) + LEASE_PERIOD_S, store.tub_id):
        room += container.MUTABLE_LEASE_BYTES
    return edit, room


def _make_file(temporary: str, edit: SlotEdit) -> None:
    """A new share, whole, where nobody looks for it yet. Raises NoSpaceError, OSError."""
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        steps = edit.steps_for_new_file()
        if any(isinstance(step, Zero) for step in steps):
            os.posix_fallocate(fd, 0, edit.file_bytes_after())  # a hole must not fail to be filled later
        do_steps(fd, steps)
    except OSError as error:
        raise NoSpaceError(f"cannot make a share: {error.strerror}") from None
    finally:
        os.close(fd)


def _forget(temporary: str) -> None:
    try:
        os.unlink(temporary)
    except FileNotFoundError:
        return


# --- leases ---------------------------------------------------------------------------------------------------------


def add_or_renew_lease(store: ShareStore, storage_index: bytes, share: SlotShare, lease: LeaseSecrets) -> None:
    """Raises NoSpaceError."""
    edit = SlotEdit.of(share)
    if edit.add_or_renew_lease(lease, int(store.clock()) + LEASE_PERIOD_S, store.tub_id) and not store.has_room_for(
        container.MUTABLE_LEASE_BYTES
    ):
        raise NoSpaceError("no room for a lease")
    if steps := edit.steps():
        store.journal.commit([FileChange(storage_index, share.number, steps, edit.file_bytes_after())])


def drop_leases(share: SlotShare, places: Sequence[int]) -> tuple[list[Step], int]:
    """What blanking these takes, and how many bytes it frees. The last lease takes the share with it."""
    leases = share.leases()
    if all(not lease.owner or place in places for place, lease in enumerate(leases)):
        return [Unlink()], share.file_bytes
    blank = container.blank_mutable_lease(share.header.version)
    extra_offset = share.header.extra_offset
    return [Write(container.mutable_slot_offset(place, extra_offset), blank) for place in sorted(places)], 0


def renew_lease(share: SlotShare, renew: bytes, expires: int) -> list[Step] | None:
    """What renewing takes, nothing if the lease lasts as long already; None when no lease matches."""
    leases = share.leases()
    live = (lease if lease.owner else _NOBODYS for lease in leases)
    place = container.find_renewable(live, share.header.version, renew)
    if place is None:
        return None
    if expires <= leases[place].expires:
        return []
    position = container.mutable_slot_offset(place, share.header.extra_offset)
    return [Write(position, container.pack_mutable_lease(leases[place].renewed(expires)))]
