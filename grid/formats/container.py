"""Share files on a storage server's disk: the container around a share, and its leases. Bytes only.

Immutable, versions 1 and 2:

    version 4 (1 or 2) | min(data length, 2^32-1) 4 | lease count 4 | data | leases, 72 each
    lease:  owner 4 | renew 32 | cancel 32 | expires 4

The length field is never read: the data ends where the leases begin, and those end the file.

Mutable, versions 1 and 2:

    magic 32 | node id 20 | write enabler 32 | data length 8 | offset E of extra leases 8 | 4 lease slots, 92 each |
    data, room for E-468 | extra lease count 4 | extra leases, 92 each
    lease:  owner 4 | expires 4 | renew 32 | cancel 32 | node id 20        owner 0: the slot is empty

Version 2 holds BLAKE2b-256 of the lease secrets, version 1 the secrets themselves; a file keeps its version.
All integers are big-endian; times are POSIX seconds, 32 bits.
Source: the share files of Tahoe-LAFS 1.20.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Final

from attrs import evolve, field, frozen

from grid.errors import FormatError

IMMUTABLE_HEADER_BYTES: Final = 12
IMMUTABLE_LEASE_BYTES: Final = 72
IMMUTABLE_LEASE_COUNT_OFFSET: Final = 8
MUTABLE_LEASE_BYTES: Final = 92
MUTABLE_SLOTS: Final = 4
MUTABLE_LENGTHS_OFFSET: Final = 84  # data length and extra lease offset
MUTABLE_SLOTS_OFFSET: Final = 100
MUTABLE_DATA_OFFSET: Final = 468
MUTABLE_DATA_BYTES_MAX: Final = 69105 * 10**12
NODE_ID_BYTES: Final = 20
WRITE_ENABLER_BYTES: Final = 32
SECRET_BYTES: Final = 32
EXTRA_LEASES_MAX: Final = 10_000  # ours; also bounds what a broken count makes us read
TIME_MAX: Final = (1 << 32) - 1

CURRENT_VERSION: Final = 2
MAGICS: Final = {
    1: b"Tahoe mutable container v1\n" + bytes.fromhex("750944038e"),
    2: b"Tahoe mutable container v2\n" + bytes.fromhex("c355219925"),
}
_VERSIONS: Final = {magic: version for version, magic in MAGICS.items()}
MAGIC_BYTES: Final = 32

_IMMUTABLE_HEADER = struct.Struct(">LLL")
_IMMUTABLE_LEASE = struct.Struct(">L32s32sL")
_MUTABLE_HEADER = struct.Struct(">32s20s32sQQ")
_MUTABLE_LEASE = struct.Struct(">LL32s32s20s")
_LENGTHS = struct.Struct(">QQ")
_COUNT = struct.Struct(">L")
_NO_NODE: Final = bytes(NODE_ID_BYTES)


class UnknownContainerError(FormatError):
    """The file does not begin as a container of this kind does, in a version we know."""


# --- leases ---------------------------------------------------------------------------------------------------------


@frozen
class Lease:
    """As it stands in a file: in version 2 the two secrets are hashes already."""

    owner: int
    renew: bytes = field(repr=False)
    cancel: bytes = field(repr=False)
    expires: int  # POSIX seconds
    node_id: bytes = field(default=_NO_NODE, repr=False)  # mutable containers only

    def renewed(self, expires: int) -> Lease:
        return evolve(self, expires=min(expires, TIME_MAX))


def stored_secret(version: int, secret: bytes) -> bytes:
    """What a container of that version holds of a lease secret."""
    return blake2b(secret, digest_size=SECRET_BYTES).digest() if version >= CURRENT_VERSION else secret


def make_lease(version: int, owner: int, renew: bytes, cancel: bytes, expires: int, node_id: bytes = _NO_NODE) -> Lease:
    """A lease to store, of secrets as a client sends them."""
    return Lease(owner, stored_secret(version, renew), stored_secret(version, cancel), min(expires, TIME_MAX), node_id)


def blank_mutable_lease(version: int) -> bytes:
    """What a cancelled slot is overwritten with: in version 2 even the zeros are hashed."""
    return pack_mutable_lease(make_lease(version, 0, bytes(SECRET_BYTES), bytes(SECRET_BYTES), 0))


def find_renewable(leases: Iterable[Lease], version: int, renew: bytes) -> int | None:
    """Where among `leases` the first one of this renew secret stands."""
    stored = stored_secret(version, renew)
    return next((place for place, lease in enumerate(leases) if hmac.compare_digest(lease.renew, stored)), None)


def find_cancellable(leases: Iterable[Lease], version: int, cancel: bytes) -> list[int]:
    """Where among `leases` those of this cancel secret stand."""
    stored = stored_secret(version, cancel)
    return [place for place, lease in enumerate(leases) if hmac.compare_digest(lease.cancel, stored)]


# --- immutable ------------------------------------------------------------------------------------------------------


@frozen
class ImmutableHeader:
    version: int
    lease_count: int

    @classmethod
    def parse(cls, data: bytes | memoryview, file_bytes: int) -> ImmutableHeader:
        """Raises UnknownContainerError; FormatError when the leases do not fit into a file of `file_bytes`."""
        if len(data) < IMMUTABLE_HEADER_BYTES:
            raise UnknownContainerError("share file too short for a container")
        version, _, lease_count = _IMMUTABLE_HEADER.unpack_from(data)
        if version not in MAGICS:
            raise UnknownContainerError(f"immutable share file of unexpected version {version:#010x}")
        if IMMUTABLE_HEADER_BYTES + IMMUTABLE_LEASE_BYTES * lease_count > file_bytes:
            raise FormatError("immutable share file with more leases than it has room for")
        return cls(version, lease_count)

    def data_bytes(self, file_bytes: int) -> int:
        return file_bytes - IMMUTABLE_HEADER_BYTES - IMMUTABLE_LEASE_BYTES * self.lease_count


def pack_immutable_header(data_bytes: int, lease_count: int, version: int = CURRENT_VERSION) -> bytes:
    return _IMMUTABLE_HEADER.pack(version, min(data_bytes, 0xFFFFFFFF), lease_count)


def pack_lease_count(count: int) -> bytes:
    return _COUNT.pack(count)


def pack_immutable_lease(lease: Lease) -> bytes:
    return _IMMUTABLE_LEASE.pack(lease.owner, lease.renew, lease.cancel, lease.expires)


def unpack_immutable_leases(data: bytes | memoryview) -> list[Lease]:
    """All the records in `data`; a part of one at its end is overlooked."""
    whole = len(data) - len(data) % IMMUTABLE_LEASE_BYTES
    return [Lease(*fields) for fields in _IMMUTABLE_LEASE.iter_unpack(data[:whole])]


def immutable_lease_offset(data_bytes: int, place: int) -> int:
    return IMMUTABLE_HEADER_BYTES + data_bytes + IMMUTABLE_LEASE_BYTES * place


# --- mutable --------------------------------------------------------------------------------------------------------


@frozen
class MutableHeader:
    version: int
    node_id: bytes
    write_enabler: bytes = field(repr=False)
    data_bytes: int
    extra_offset: int  # where the extra lease block stands; data may grow up to there
    slots: tuple[Lease, ...] = field(repr=False)  # four, empty ones included

    @classmethod
    def parse(cls, data: bytes | memoryview, file_bytes: int) -> MutableHeader:
        """Of the first 468 bytes. Raises UnknownContainerError; FormatError when offsets do not fit the file."""
        if len(data) < MUTABLE_DATA_OFFSET or bytes(data[:MAGIC_BYTES]) not in _VERSIONS:
            raise UnknownContainerError("not a mutable share file of a known version")
        magic, node_id, write_enabler, data_bytes, extra_offset = _MUTABLE_HEADER.unpack_from(data)
        if not MUTABLE_DATA_OFFSET + data_bytes <= extra_offset <= file_bytes - _COUNT.size:
            raise FormatError("mutable share file whose lengths do not fit together")
        slots = data[MUTABLE_SLOTS_OFFSET:MUTABLE_DATA_OFFSET]
        return cls(_VERSIONS[magic], node_id, write_enabler, data_bytes, extra_offset, tuple(_mutable_leases(slots)))


def fresh_mutable_header(node_id: bytes, write_enabler: bytes) -> MutableHeader:
    """Of a share just made: no data, no leases."""
    none = Lease(0, bytes(SECRET_BYTES), bytes(SECRET_BYTES), 0)
    slots = (none,) * MUTABLE_SLOTS
    return MutableHeader(CURRENT_VERSION, node_id, write_enabler, 0, MUTABLE_DATA_OFFSET, slots)


def pack_mutable_header(header: MutableHeader) -> bytes:
    """The first 468 bytes."""
    fixed = _MUTABLE_HEADER.pack(
        MAGICS[header.version], header.node_id, header.write_enabler, header.data_bytes, header.extra_offset
    )
    return fixed + b"".join(map(pack_mutable_lease, header.slots))


def pack_mutable_lengths(data_bytes: int, extra_offset: int) -> bytes:
    return _LENGTHS.pack(data_bytes, extra_offset)


def pack_mutable_lease(lease: Lease) -> bytes:
    return _MUTABLE_LEASE.pack(lease.owner, lease.expires, lease.renew, lease.cancel, lease.node_id)


def _mutable_leases(data: bytes | memoryview) -> Iterator[Lease]:
    for owner, expires, renew, cancel, node_id in _MUTABLE_LEASE.iter_unpack(data):
        yield Lease(owner, renew, cancel, expires, node_id)


def extra_block_bytes(count_field: bytes | memoryview, header: MutableHeader, file_bytes: int) -> int:
    """Size of the extra lease block that begins with these 4 bytes. Raises FormatError when it cannot be."""
    if len(count_field) < _COUNT.size:
        raise FormatError("mutable share file without an extra lease block")
    (count,) = _COUNT.unpack_from(count_field)
    size = _COUNT.size + count * MUTABLE_LEASE_BYTES
    if count > EXTRA_LEASES_MAX or header.extra_offset + size > file_bytes:
        raise FormatError("mutable share file with more extra leases than it can have")
    return int(size)


def unpack_extra_leases(block: bytes | memoryview) -> list[Lease]:
    """Of a whole extra lease block; empty ones included."""
    return list(_mutable_leases(block[_COUNT.size :]))


def pack_extra_leases(leases: Sequence[Lease]) -> bytes:
    return _COUNT.pack(len(leases)) + b"".join(map(pack_mutable_lease, leases))


def mutable_slot_offset(place: int, extra_offset: int) -> int:
    """Where in the file lease number `place` stands: the four slots first, then the extra ones."""
    if place < MUTABLE_SLOTS:
        return MUTABLE_SLOTS_OFFSET + place * MUTABLE_LEASE_BYTES
    return extra_offset + _COUNT.size + (place - MUTABLE_SLOTS) * MUTABLE_LEASE_BYTES


# --- either ---------------------------------------------------------------------------------------------------------


def kind_of(start: bytes | memoryview) -> str | None:
    """`mutable`, `immutable`, or None, from a file's first 32 bytes: names and places do not tell."""
    if bytes(start[:MAGIC_BYTES]) in _VERSIONS:
        return "mutable"
    if len(start) >= IMMUTABLE_HEADER_BYTES and int.from_bytes(start[:4], "big") in MAGICS:
        return "immutable"
    return None
