"""The layout of one CHK share, version 1 (4-byte fields) and 2 (8-byte fields). Big-endian throughout.

    version u32 | block size | share data size | six offsets:
      data | plaintext hashes | crypttext hashes | block hashes | share hashes | UEB
    blocks, in segment order
    plaintext hash tree     zeros: nothing reads it, but its room is part of every offset and of the size
    crypttext hash tree     whole array, 32 bytes a node
    block hash tree         whole array; its root is this share's leaf in the share hash tree
    share hash chain        (u16 node index, 32-byte hash) each, own leaf included
    UEB size | UEB

Offsets count from the share's first byte. A reader goes by the offsets, not by the order of sections, nor by
the two sizes in the header: what those should be follows from the cap and the UEB.

Source: the CHK share layout, as Tahoe-LAFS 1.20 writes it. OFFSET_MAX is ours.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, Self

from attrs import frozen

from grid.errors import FormatError
from grid.errors import UnknownVersionError as UnknownVersionError
from grid.formats.hashtree import needed_hashes, tree_size
from grid.formats.hashutil import HASH_BYTES
from grid.formats.segments import Segmentation
from grid.formats.ueb import SHARES_MAX, UEB_BYTES_MAX

HEADER_BYTES_MAX: Final = 0x44
OFFSET_MAX: Final = (1 << 63) - 1  # what Foolscap and a file system can address
SHARE_HASH_BYTES: Final = 2 + HASH_BYTES
SHARE_HASHES_BYTES_MAX: Final = SHARE_HASH_BYTES * (2 * SHARES_MAX - 1)  # the whole tree of the largest N

_HEADERS: Final = {1: struct.Struct(">L8L"), 2: struct.Struct(">L8Q")}
_UEB_SIZES: Final = {1: struct.Struct(">L"), 2: struct.Struct(">Q")}
_SHARE_HASH: Final = struct.Struct(f">H{HASH_BYTES}s")
_V1_LIMIT: Final = 1 << 32


@frozen
class ShareLayout:
    """Where the parts of one share stand: offsets in bytes from its start, sizes in bytes."""

    version: int
    block_size: int  # of a full segment
    data_size: int  # all blocks
    data: int
    plaintext_hashes: int
    crypttext_hashes: int
    block_hashes: int
    share_hashes: int
    ueb: int  # of the size field that precedes the UEB

    @classmethod
    def for_upload(cls, segmentation: Segmentation, n: int, ueb_size: int, *, version: int | None = None) -> Self:
        """The layout of every share of such a file. `version` None takes 1 where its fields suffice."""
        tree = HASH_BYTES * tree_size(segmentation.num_segments)
        chain = SHARE_HASH_BYTES * len(needed_hashes(n, 0, include_leaf=True))
        if version is None:
            v1 = cls.for_upload(segmentation, n, ueb_size, version=1)
            return (
                v1
                if max(v1.block_size, v1.data_size, v1.ueb) < _V1_LIMIT
                else cls.for_upload(segmentation, n, ueb_size, version=2)
            )
        data = _HEADERS[version].size
        plaintext_hashes = data + segmentation.share_data_size
        crypttext_hashes = plaintext_hashes + tree
        block_hashes = crypttext_hashes + tree
        share_hashes = block_hashes + tree
        return cls(
            version=version,
            block_size=segmentation.block_size,
            data_size=segmentation.share_data_size,
            data=data,
            plaintext_hashes=plaintext_hashes,
            crypttext_hashes=crypttext_hashes,
            block_hashes=block_hashes,
            share_hashes=share_hashes,
            ueb=share_hashes + chain,
        )

    @property
    def ueb_length_bytes(self) -> int:
        """Size of the field that says how long the UEB is; the UEB follows it."""
        return _UEB_SIZES[self.version].size

    @property
    def share_hashes_range(self) -> tuple[int, int]:
        """(offset, length) of the share hash chain."""
        return self.share_hashes, self.ueb - self.share_hashes

    def total_size(self, ueb_size: int) -> int:
        """The whole share: what a server is asked to allocate."""
        return self.ueb + self.ueb_length_bytes + ueb_size

    def block_range(self, segmentation: Segmentation, segment: int) -> tuple[int, int]:
        """(offset, length) of one block."""
        return self.data + segment * segmentation.block_size, segmentation.block_bytes(segment)

    def pack_header(self) -> bytes:
        offsets = (self.data, self.plaintext_hashes, self.crypttext_hashes, self.block_hashes, self.share_hashes)
        return _HEADERS[self.version].pack(self.version, self.block_size, self.data_size, *offsets, self.ueb)

    def pack_ueb_size(self, ueb_size: int) -> bytes:
        """The field before the UEB."""
        return _UEB_SIZES[self.version].pack(ueb_size)

    def parse_ueb_size(self, data: bytes | memoryview) -> int:
        """Read the field before the UEB; raises FormatError when no UEB can be that long."""
        if len(data) < self.ueb_length_bytes:
            raise FormatError("share ends before its UEB")
        (size,) = _UEB_SIZES[self.version].unpack_from(data)
        if not 0 < size < UEB_BYTES_MAX:
            raise FormatError("share has an impossible UEB size")
        return int(size)

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Self:
        """Read the header from a share's first bytes (HEADER_BYTES_MAX of them are always enough).

        Raises UnknownVersionError, which is no corruption, or FormatError.
        """
        if len(data) < 4:
            raise FormatError("share ends within its header")
        version = int.from_bytes(data[:4], "big")
        if version not in _HEADERS:
            raise UnknownVersionError(version)
        if len(data) < _HEADERS[version].size:
            raise FormatError("share ends within its header")
        layout = cls(*_HEADERS[version].unpack_from(data))
        layout._check()
        return layout

    def _check(self) -> None:
        sections = (self.data, self.plaintext_hashes, self.crypttext_hashes, self.block_hashes, self.share_hashes)
        if max(*sections, self.ueb, self.data_size) > OFFSET_MAX:
            raise FormatError("share has an offset no share can have")
        if min(*sections, self.ueb) < _HEADERS[self.version].size:
            raise FormatError("share has an offset within its header")
        chain = self.ueb - self.share_hashes
        if not 0 <= chain <= SHARE_HASHES_BYTES_MAX or chain % SHARE_HASH_BYTES:
            raise FormatError("share has a share hash section of an impossible length")
        tree = self.share_hashes - self.block_hashes
        if tree < 0 or tree % HASH_BYTES:
            raise FormatError("share has a block hash section of an impossible length")


def pack_share_hashes(chain: Iterable[tuple[int, bytes]]) -> bytes:
    """The bytes of (node index, hash) pairs, in the order given: write them ascending."""
    return b"".join(_SHARE_HASH.pack(index, digest) for index, digest in chain)


def unpack_share_hashes(data: bytes | memoryview) -> dict[int, bytes]:
    """{node index: hash} of a share hash chain, in any order. Raises FormatError."""
    if len(data) % SHARE_HASH_BYTES or len(data) > SHARE_HASHES_BYTES_MAX:
        raise FormatError("share hash chain of an impossible length")
    chain: dict[int, bytes] = {}
    for index, digest in _SHARE_HASH.iter_unpack(data):
        if chain.setdefault(index, digest) != digest:
            raise FormatError("share hash chain has two hashes for one node")
    return chain


def pack_hashes(hashes: Sequence[bytes]) -> bytes:
    """The bytes of a whole hash array."""
    return b"".join(hashes)


def unpack_hashes(data: bytes | memoryview) -> list[bytes]:
    """The hashes of a whole array. Raises FormatError when the last one is cut."""
    if len(data) % HASH_BYTES:
        raise FormatError("hash array of an impossible length")
    return [bytes(data[i : i + HASH_BYTES]) for i in range(0, len(data), HASH_BYTES)]
