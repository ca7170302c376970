"""What SDMF and MDMF shares have in common: the header, where the parts stand, and what a version is.

    SDMF  version 0 u8 | seqnum u64 | root hash 32 | salt 16 | k u8 | N u8 | segment size u64 | data size u64
          offsets: signature, share hash chain, block hash tree, share data u32; private key, EOF u64
    MDMF  version 1 u8 | seqnum u64 | root hash 32 | k u8 | N u8 | segment size u64 | data size u64
          offsets: private key, share hash chain, signature, public key, its end, share data, block hash tree, EOF u64

The signature covers the first line of each ("signed prefix") and nothing after it: offsets may lie, so they
count as part of a version's identity, and everything they point at is checked against root hash, fingerprint
or writekey. EOF, not the container's length, ends a share: a server keeps what an older, longer version left.

Source: mutable shares as Tahoe-LAFS 1.20 writes them. The limits marked "ours" are in no specification.
"""

from __future__ import annotations

import struct
from typing import Final, Literal, Self

from attrs import field, frozen

from grid.errors import FormatError
from grid.errors import UnknownVersionError as UnknownVersionError
from grid.formats.chk_share import (
    OFFSET_MAX,
    SHARE_HASH_BYTES,
    SHARE_HASHES_BYTES_MAX,
    unpack_hashes,
    unpack_share_hashes,
)
from grid.formats.hashtree import tree_size
from grid.formats.hashutil import HASH_BYTES
from grid.formats.segments import Segmentation
from grid.formats.ueb import SEGMENT_BYTES_MAX, SEGMENTS_MAX

HEADER_BYTES: Final = 123  # enough for either format
SALT_BYTES: Final = 16
SIGNATURE_BYTES: Final = 256  # RSA, 2048 bits
MUTABLE_SHARES_MAX: Final = 255  # N is one byte
SDMF_DATA_BYTES_MAX: Final = 512 << 20  # ours: its one segment is held whole in memory
PUBLIC_KEY_BYTES_MAX: Final = 2048  # ours: 294 in practice
PRIVATE_KEY_BYTES_MAX: Final = 8192  # ours: 1219 in practice

SDMF_PREFIX: Final = struct.Struct(">BQ32s16sBBQQ")
SDMF_OFFSETS: Final = struct.Struct(">LLLLQQ")
SDMF_HEADER_BYTES: Final = SDMF_PREFIX.size + SDMF_OFFSETS.size
SDMF_CHECKSTRING_BYTES: Final = 57
MDMF_PREFIX: Final = struct.Struct(">BQ32sBBQQ")
MDMF_OFFSETS: Final = struct.Struct(">8Q")
MDMF_HEADER_BYTES: Final = MDMF_PREFIX.size + MDMF_OFFSETS.size
MDMF_CHECKSTRING_BYTES: Final = 41

SDMF_VERSION: Final = 0
MDMF_VERSION: Final = 1

Format = Literal["sdmf", "mdmf"]
Range = tuple[int, int]  # offset and length, in bytes


@frozen(order=True)
class MutableOffsets:
    """(offset, length) of every part of one share, whichever order its format keeps them in."""

    public_key: Range
    signature: Range
    share_hash_chain: Range
    block_hash_tree: Range
    share_data: Range
    encrypted_private_key: Range
    eof: int

    @classmethod
    def of_sdmf(cls, signature: int, chain: int, tree: int, data: int, private_key: int, eof: int) -> Self:
        return cls(
            public_key=(SDMF_HEADER_BYTES, signature - SDMF_HEADER_BYTES),
            signature=(signature, chain - signature),
            share_hash_chain=(chain, tree - chain),
            block_hash_tree=(tree, data - tree),
            share_data=(data, private_key - data),
            encrypted_private_key=(private_key, eof - private_key),
            eof=eof,
        )

    @classmethod
    def of_mdmf(
        cls, private_key: int, chain: int, signature: int, public_key: int, key_end: int, data: int, tree: int, eof: int
    ) -> Self:
        return cls(
            public_key=(public_key, key_end - public_key),
            signature=(signature, public_key - signature),
            share_hash_chain=(chain, signature - chain),
            block_hash_tree=(tree, eof - tree),
            share_data=(data, tree - data),
            encrypted_private_key=(private_key, chain - private_key),
            eof=eof,
        )

    def check(self, header_bytes: int) -> None:
        """Raise FormatError unless every part lies between header and EOF and has a length it could have."""
        if self.eof > OFFSET_MAX:
            raise FormatError("mutable share has an offset no share can have")
        parts = (
            self.public_key,
            self.signature,
            self.share_hash_chain,
            self.block_hash_tree,
            self.share_data,
            self.encrypted_private_key,
        )
        if any(offset < header_bytes or length < 0 or offset + length > self.eof for offset, length in parts):
            raise FormatError("mutable share has offsets out of order")
        if not 0 < self.public_key[1] <= PUBLIC_KEY_BYTES_MAX or self.signature[1] != SIGNATURE_BYTES:
            raise FormatError("mutable share has a public key or signature of an impossible length")
        if self.encrypted_private_key[1] > PRIVATE_KEY_BYTES_MAX:
            raise FormatError("mutable share has a private key of an impossible length")
        chain = self.share_hash_chain[1]
        if chain > SHARE_HASHES_BYTES_MAX or chain % SHARE_HASH_BYTES:
            raise FormatError("mutable share has a share hash chain of an impossible length")


_NO_OFFSETS: Final = MutableOffsets((0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (0, 0), 0)


@frozen
class MutableHeader:
    """The header of one mutable share. `salt` is the file's (SDMF), or empty (MDMF has one per segment).

    Sizes are in bytes. Nothing in it is to be believed before the signature over `signed_prefix` is checked,
    and `offsets` not even then.
    """

    format: Format
    seqnum: int
    root_hash: bytes = field(repr=lambda digest: digest[:4].hex())
    salt: bytes = field(repr=False)
    k: int
    n: int
    segment_size: int
    data_size: int  # plaintext
    offsets: MutableOffsets
    segmentation: Segmentation = field(init=False, repr=False, eq=False)

    @segmentation.default
    def _segmentation(self) -> Segmentation:
        return Segmentation(size=self.data_size, k=self.k, segment_size=self.segment_size)

    @property
    def signed_prefix(self) -> bytes:
        """What the signature covers: 75 bytes (SDMF) or 59 (MDMF), as they stand in the share."""
        sizes = (self.k, self.n, self.segment_size, self.data_size)
        if self.format == "sdmf":
            return SDMF_PREFIX.pack(SDMF_VERSION, self.seqnum, self.root_hash, self.salt, *sizes)
        return MDMF_PREFIX.pack(MDMF_VERSION, self.seqnum, self.root_hash, *sizes)

    @property
    def checkstring(self) -> bytes:
        """The first bytes of the share, which a writer uses to tell versions apart: 57 (SDMF) or 41 (MDMF)."""
        return self.signed_prefix[: SDMF_CHECKSTRING_BYTES if self.format == "sdmf" else MDMF_CHECKSTRING_BYTES]

    @property
    def version_key(self) -> tuple[int, bytes, bytes, MutableOffsets]:
        """Equal for shares of one version. Sorts by sequence number, then root hash: the best version last."""
        return self.seqnum, self.root_hash, self.signed_prefix, self.offsets

    @property
    def num_segments(self) -> int:
        return self.segmentation.num_segments

    @property
    def block_hash_tree_range(self) -> Range:
        """(offset, length) of the nodes the tree has by its leaf count; an empty file's has one padding leaf."""
        return self.offsets.block_hash_tree[0], HASH_BYTES * tree_size(self.num_segments)

    @property
    def salt_bytes(self) -> int:
        """Bytes of salt before each block."""
        return 0 if self.format == "sdmf" else SALT_BYTES

    def salt_and_block_range(self, segment: int) -> Range:
        """(offset, length) of a segment's block, in MDMF with its salt before it. ValueError: no such segment."""
        start = self.offsets.share_data[0] + segment * (self.salt_bytes + self.segmentation.block_size)
        return start, self.salt_bytes + self.segmentation.block_bytes(segment)

    def split_salt_and_block(self, segment: int, data: bytes | memoryview) -> tuple[bytes, memoryview]:
        """(salt, block) of what stands at `salt_and_block_range(segment)`. FormatError when it is short."""
        _, length = self.salt_and_block_range(segment)
        if len(data) != length:
            raise FormatError("mutable share ends within a block")
        view = memoryview(data)
        if self.format == "sdmf":
            return self.salt, view
        return bytes(view[:SALT_BYTES]), view[SALT_BYTES:]

    def _check(self) -> None:
        if self.k > self.n:
            raise FormatError("mutable share has impossible k and N")
        self.offsets.check(SDMF_HEADER_BYTES if self.format == "sdmf" else MDMF_HEADER_BYTES)
        if self.format == "sdmf" and (self.segment_size < self.data_size or self.data_size > SDMF_DATA_BYTES_MAX):
            raise FormatError("SDMF share has more than one segment, or too large a one")
        if self.format == "mdmf" and self.segment_size > SEGMENT_BYTES_MAX:
            raise FormatError(f"MDMF share has segments over {SEGMENT_BYTES_MAX} bytes")
        if self.num_segments > SEGMENTS_MAX:
            raise FormatError(f"mutable share has more than {SEGMENTS_MAX} segments")
        if self.block_hash_tree_range[1] > self.offsets.block_hash_tree[1]:
            raise FormatError("mutable share has no room for its block hash tree")
        if self.num_segments:
            offset, length = self.salt_and_block_range(self.num_segments - 1)
            if offset + length > sum(self.offsets.share_data):
                raise FormatError("mutable share has no room for its blocks")


@frozen
class MutableShare:
    """One whole share, taken apart. Nothing is verified but the lengths."""

    header: MutableHeader
    public_key: bytes
    signature: bytes
    share_hash_chain: dict[int, bytes]  # node index -> hash; this share's own leaf is not in it
    block_hash_tree: list[bytes] = field(repr=False)
    share_data: memoryview = field(repr=False)
    encrypted_private_key: bytes = field(repr=False)


def header_of_prefix(prefix: bytes | memoryview) -> MutableHeader:
    """What a header's `signed_prefix` tells. The offsets, which it does not, are all zero. Raises FormatError."""
    try:
        if prefix[:1] == bytes([SDMF_VERSION]):
            _, seqnum, root_hash, salt, k, n, segment_size, data_size = SDMF_PREFIX.unpack(prefix)
            return MutableHeader("sdmf", seqnum, root_hash, salt, k, n, segment_size, data_size, _NO_OFFSETS)
        version, seqnum, root_hash, k, n, segment_size, data_size = MDMF_PREFIX.unpack(prefix)
    except struct.error:
        raise FormatError("not the signed part of a mutable share's header") from None
    if version != MDMF_VERSION:
        raise FormatError("not the signed part of a mutable share's header")
    return MutableHeader("mdmf", seqnum, root_hash, b"", k, n, segment_size, data_size, _NO_OFFSETS)


def parse_header(data: bytes | memoryview) -> MutableHeader:
    """Read the header from a share's first bytes (HEADER_BYTES of them are always enough).

    Raises UnknownVersionError, which is no corruption, or FormatError. The offsets are in order and leave
    room for what the sizes ask for; no more is known of them.
    """
    if not len(data):
        raise FormatError("mutable share is empty")
    version = data[0]
    if version not in (SDMF_VERSION, MDMF_VERSION):
        raise UnknownVersionError(version)
    if len(data) < (SDMF_HEADER_BYTES if version == SDMF_VERSION else MDMF_HEADER_BYTES):
        raise FormatError("mutable share ends within its header")
    if version == SDMF_VERSION:
        _, seqnum, root_hash, salt, k, n, segment_size, data_size = SDMF_PREFIX.unpack_from(data)
        offsets = MutableOffsets.of_sdmf(*SDMF_OFFSETS.unpack_from(data, SDMF_PREFIX.size))
        header = MutableHeader("sdmf", seqnum, root_hash, salt, k, n, segment_size, data_size, offsets)
    else:
        _, seqnum, root_hash, k, n, segment_size, data_size = MDMF_PREFIX.unpack_from(data)
        offsets = MutableOffsets.of_mdmf(*MDMF_OFFSETS.unpack_from(data, MDMF_PREFIX.size))
        header = MutableHeader("mdmf", seqnum, root_hash, b"", k, n, segment_size, data_size, offsets)
    header._check()
    return header


def take(data: bytes | memoryview, part: Range) -> memoryview:
    """The bytes of one part of a share whose first bytes `data` is. Raises FormatError when it ends before."""
    offset, length = part
    if offset + length > len(data):
        raise FormatError("mutable share ends too early")
    return memoryview(data)[offset : offset + length]


def parse_share(data: bytes | memoryview) -> MutableShare:
    """Take a whole share apart; bytes after its EOF are ignored. Raises FormatError."""
    header = parse_header(data)
    offsets = header.offsets
    return MutableShare(
        header=header,
        public_key=bytes(take(data, offsets.public_key)),
        signature=bytes(take(data, offsets.signature)),
        share_hash_chain=unpack_share_hashes(take(data, offsets.share_hash_chain)),
        block_hash_tree=unpack_hashes(take(data, header.block_hash_tree_range)),
        share_data=take(data, offsets.share_data),
        encrypted_private_key=bytes(take(data, offsets.encrypted_private_key)),
    )
