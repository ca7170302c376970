"""Finished immutable shares: reading them, and their leases. Synchronous; see grid/server/shares.py.

A share's file stays open for a while after it was read: downloads come in many small reads. Its length and lease
count are looked at for each use all the same, as both may change, and so is whether it was deleted meanwhile.
"""

from __future__ import annotations

import os
from typing import Final

from attrs import define, field

from grid.errors import FormatError
from grid.formats import container
from grid.interfaces import LeaseSecrets
from grid.server.errors import (
    NoSpaceError,
    NoSuchShareError,
    UnknownImmutableContainerVersionError,
    UnusableShareError,
)
from grid.server.journal import Places, Resize, Step, Unlink, Write
from grid.server.open_files import OpenFile, OpenFiles

OPEN_SHARES_MAX: Final = 128  # kept open while nobody reads them
LEASES_MAX: Final = 10_000  # ours, per share


@define(eq=False)
class ImmutableShare(OpenFile):
    """An open share file."""

    number: int = field(kw_only=True)
    size: int = field(kw_only=True)  # of the file, when it was last acquired
    _known: tuple[int, int] = (-1, 0)  # a size of the file, and what of it was data

    def header(self) -> container.ImmutableHeader:
        """As it is now. Raises UnusableShareError."""
        return parse_header(os.pread(self.fd, container.IMMUTABLE_HEADER_BYTES, 0), self.size, self.number)

    def data_bytes(self) -> int:
        """What of the file is data, which leases follow. Raises UnusableShareError."""
        if self._known[0] != self.size:  # a lease more or less changes it
            self._known = self.size, self.header().data_bytes(self.size)
        return self._known[1]

    def read(self, offset: int, length: int) -> bytes:
        """The caller has seen to it that this is within the data."""
        return os.pread(self.fd, length, container.IMMUTABLE_HEADER_BYTES + offset)

    def leases(self) -> tuple[container.ImmutableHeader, int, list[container.Lease]]:
        """The header, the data's length, the leases."""
        header = self.header()
        data_bytes = header.data_bytes(self.size)
        wanted = header.lease_count * container.IMMUTABLE_LEASE_BYTES
        records = os.pread(self.fd, wanted, container.immutable_lease_offset(data_bytes, 0))
        return header, data_bytes, container.unpack_immutable_leases(records)


def parse_header(start: bytes, file_bytes: int, number: int) -> container.ImmutableHeader:
    """Raises UnusableShareError."""
    try:
        return container.ImmutableHeader.parse(start, file_bytes)
    except container.UnknownContainerError as error:
        raise UnknownImmutableContainerVersionError(f"share {number}: {error}") from None
    except FormatError as error:
        raise UnusableShareError(f"share {number}: {error}") from None


class OpenShares(OpenFiles[tuple[bytes, int], ImmutableShare]):
    """By storage index and share number. Using one raises NoSuchShareError."""

    def __init__(self, places: Places) -> None:
        super().__init__(OPEN_SHARES_MAX)
        self._places = places

    def _open(self, key: tuple[bytes, int]) -> ImmutableShare:
        try:
            fd = os.open(self._places.share(*key), os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise NoSuchShareError(f"no share {key[1]}") from None
        return ImmutableShare(fd, number=key[1], size=os.fstat(fd).st_size)

    def _is_good(self, key: tuple[bytes, int], share: ImmutableShare) -> bool:
        status = os.fstat(share.fd)
        if not status.st_nlink:
            return False  # deleted: by us, or by an administrator
        share.size = status.st_size
        return True


# --- leases ---------------------------------------------------------------------------------------------------------


def renew_lease(share: ImmutableShare, renew: bytes, expires: int) -> list[Step] | None:
    """What renewing takes, nothing if the lease lasts as long already; None when no lease matches."""
    header, data_bytes, leases = share.leases()
    place = container.find_renewable(leases, header.version, renew)
    if place is None:
        return None
    if expires <= leases[place].expires:
        return []
    record = container.pack_immutable_lease(leases[place].renewed(expires))
    # only the last four bytes differ: less to write, and seldom two pages
    return [Write(container.immutable_lease_offset(data_bytes, place) + len(record) - 4, record[-4:])]


def add_lease(share: ImmutableShare, lease: LeaseSecrets, owner: int, expires: int) -> list[Step]:
    """What adding one more takes. Raises NoSpaceError when there are too many."""
    header = share.header()
    if header.lease_count >= LEASES_MAX:
        raise NoSpaceError("too many leases on one share")
    record = container.pack_immutable_lease(
        container.make_lease(header.version, owner, lease.renew, lease.cancel, expires)
    )
    count = container.pack_lease_count(header.lease_count + 1)
    return [Write(share.size, record), Write(container.IMMUTABLE_LEASE_COUNT_OFFSET, count)]


def drop_leases(share: ImmutableShare, places: list[int]) -> tuple[list[Step], int]:
    """What dropping these takes, and how many bytes it frees. The last lease takes the share with it."""
    _, data_bytes, leases = share.leases()
    kept = [lease for place, lease in enumerate(leases) if place not in places]
    freed = container.IMMUTABLE_LEASE_BYTES * (len(leases) - len(kept))
    if not kept:
        return [Unlink()], container.immutable_lease_offset(data_bytes, len(leases))
    records = b"".join(map(container.pack_immutable_lease, kept))
    count = container.pack_lease_count(len(kept))
    return [
        Write(container.immutable_lease_offset(data_bytes, 0), records),
        Write(container.IMMUTABLE_LEASE_COUNT_OFFSET, count),
        Resize(container.immutable_lease_offset(data_bytes, len(kept))),
    ], freed
