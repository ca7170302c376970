"""Share files on the disk of a real (or our) storage server, damaged on purpose: in either kind of container.

immutable   12 bytes | share | leases of 72 bytes          mutable   468 bytes | share …, its length at byte 84
"""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import evolve

from grid.formats.base32 import b2a
from grid.formats.caps import Cap, CHKReadCap, parse_known_cap
from grid.formats.chk_share import ShareLayout
from grid.formats.mutable_share import parse_header
from tests.real.tahoe_grid import TahoeGrid

IMMUTABLE_HEADER_BYTES: Final = 12
IMMUTABLE_LEASE_BYTES: Final = 72
MUTABLE_LENGTH_AT: Final = 84
MUTABLE_DATA_OFFSET: Final = 468
MUTABLE_LEASES_AT: Final = 100
MUTABLE_LEASE_BYTES: Final = 92
HASH_BYTES: Final = 32

CHK_FIELDS: Final = (
    *("version", "block_size", "data_offset", "plaintext_offset", "crypttext_offset", "block_hashes_offset"),
    *("share_hashes_offset", "ueb_offset", "data", "data_end", "plaintext_hashes", "crypttext_hashes"),
    *("crypttext_padding", "block_hashes", "block_hashes_root", "share_hashes", "share_hashes_index"),
    *("ueb_length", "ueb"),
)
_MUTABLE_FIELDS: Final = (
    *("version", "seqnum", "root_hash", "k", "n", "segment_size", "data_size", "public_key", "signature"),
    *("share_hashes", "block_hashes", "data", "private_key", "offset_signature", "offset_chain"),
    *("offset_block_hashes", "offset_data", "offset_private_key", "offset_eof"),
)
SDMF_FIELDS: Final = (*_MUTABLE_FIELDS, "salt")
MDMF_FIELDS: Final = (
    *_MUTABLE_FIELDS,
    *("segment_salt", "block_hashes_leaf", "offset_public_key", "offset_public_key_end"),
)

Copies = dict[int, list[tuple[int, Path]]]  # {share number: [(server number, container file)]}


def copies_of(grid: TahoeGrid, cap: str) -> Copies:
    """Where the shares of a file or directory are."""
    storage_index = parse_known_cap(cap).storage_index
    assert storage_index is not None
    return grid.share_files(b2a(storage_index))


def another(grid: TahoeGrid, cap: str, name: str, shares: Mapping[int, Path] | None = None) -> str:
    """The read cap of another file, with the same shares (or these) on the same servers.

    A share says nothing of its storage index. So this costs next to nothing, where making a file takes its time; but
    nobody can read the file, since its key is made up.
    """
    known, bits = parse_known_cap(cap).readonly, random.Random(f"{cap} {name}").randbytes(16)
    other: Cap = evolve(known, key=bits) if isinstance(known, CHKReadCap) else evolve(known, readkey=bits)
    index = b2a(other.storage_index or b"")
    for number, copies in copies_of(grid, cap).items():
        for server, file in copies:
            bucket = grid.servers[server].path / "storage" / "shares" / index[:2] / index
            bucket.mkdir(parents=True, exist_ok=True)
            shutil.copy(shares[number] if shares else file, bucket / file.name)
    return str(other)


def is_mutable(file: Path) -> bool:
    return file.read_bytes()[:4] == b"Taho"


def read_share(file: Path) -> bytes:
    data = file.read_bytes()
    if is_mutable(file):
        (length,) = struct.unpack_from(">Q", data, MUTABLE_LENGTH_AT)
        return data[MUTABLE_DATA_OFFSET : MUTABLE_DATA_OFFSET + length]
    (leases,) = struct.unpack_from(">L", data, 8)
    return data[IMMUTABLE_HEADER_BYTES : len(data) - IMMUTABLE_LEASE_BYTES * leases]


def write_share(file: Path, share: bytes) -> None:
    """Put `share` where the present one is; it may be shorter."""
    data = bytearray(file.read_bytes())
    old = len(read_share(file))
    if is_mutable(file):
        struct.pack_into(">Q", data, MUTABLE_LENGTH_AT, len(share))
        data[MUTABLE_DATA_OFFSET : MUTABLE_DATA_OFFSET + len(share)] = share
    else:
        data[IMMUTABLE_HEADER_BYTES : IMMUTABLE_HEADER_BYTES + old] = share
    file.write_bytes(data)


def flip(file: Path, position: int, mask: int = 0x20) -> None:
    """One bit of the share's byte `position`."""
    share = bytearray(read_share(file))
    share[position] ^= mask
    write_share(file, bytes(share))


def truncate(file: Path, missing: int) -> None:
    """The share ends `missing` bytes too early."""
    write_share(file, read_share(file)[:-missing])


def duplicate(grid: TahoeGrid, file: Path, server: int) -> None:
    """A copy of the share on another server, which may have none of the file yet."""
    bucket = grid.servers[server].path / "storage" / "shares" / file.parent.parent.name / file.parent.name
    bucket.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, bucket / file.name)


def chk_fields(file: Path) -> dict[str, int]:
    """{part of the share: a byte in it}."""
    layout = ShareLayout.parse(read_share(file)[:0x44])
    return {
        "version": 3,
        "block_size": 7,
        "data_offset": 0x0F,
        "plaintext_offset": 0x13,
        "crypttext_offset": 0x17,
        "block_hashes_offset": 0x1A,
        "share_hashes_offset": 0x1F,
        "ueb_offset": 0x23,
        "data": layout.data + 5,
        "data_end": layout.plaintext_hashes - 1,
        "plaintext_hashes": layout.plaintext_hashes + 5,
        "crypttext_hashes": layout.crypttext_hashes + HASH_BYTES + 5,
        "crypttext_padding": layout.block_hashes - 3,  # a leaf beyond the last
        "block_hashes": layout.block_hashes + HASH_BYTES + 5,
        "block_hashes_root": layout.block_hashes + 5,
        "share_hashes": layout.share_hashes + 5,
        "share_hashes_index": layout.share_hashes + 1,
        "ueb_length": layout.ueb + 3,
        "ueb": layout.ueb + 40,
    }


def mutable_fields(file: Path) -> dict[str, int]:
    header = parse_header(read_share(file)[:123])
    offsets, sdmf = header.offsets, header.format == "sdmf"
    fields = {
        "version": 0,
        "seqnum": 8,
        "root_hash": 20,
        "k": 57 if sdmf else 41,
        "n": 58 if sdmf else 42,
        "segment_size": 66 if sdmf else 50,
        "data_size": 74 if sdmf else 58,
        "public_key": offsets.public_key[0] + 40,
        "signature": offsets.signature[0] + 9,
        "share_hashes": offsets.share_hash_chain[0] + 9,
        "block_hashes": offsets.block_hash_tree[0] + 9,
        "data": offsets.share_data[0] + 40,
        "private_key": offsets.encrypted_private_key[0] + 9,
        "offset_signature": 78 if sdmf else 82,
        "offset_chain": 82 if sdmf else 74,
        "offset_block_hashes": 86 if sdmf else 114,
        "offset_data": 90 if sdmf else 106,
        "offset_private_key": 98 if sdmf else 66,
        "offset_eof": 106 if sdmf else 122,
    }
    if sdmf:
        fields["salt"] = 45
    else:
        fields["segment_salt"] = offsets.share_data[0] + 3
        fields["block_hashes_leaf"] = offsets.block_hash_tree[0] + HASH_BYTES + 9
        fields["offset_public_key"] = 90
        fields["offset_public_key_end"] = 98
    return fields


Damage = Callable[[TahoeGrid, Copies], None]


def first(copies: Copies, number: int) -> Path:
    return copies[number][0][1]


def deleted(*numbers: int) -> Damage:
    def do(grid: TahoeGrid, copies: Copies) -> None:
        for number in numbers:
            for _, file in copies[number]:
                file.unlink()

    return do


def field_flipped(field: str, *numbers: int) -> Damage:
    def do(grid: TahoeGrid, copies: Copies) -> None:
        for number in numbers:
            file = first(copies, number)
            flip(file, (mutable_fields if is_mutable(file) else chk_fields)(file)[field], 0x04)

    return do


def truncated(missing: int, *numbers: int) -> Damage:
    def do(grid: TahoeGrid, copies: Copies) -> None:
        for number in numbers:
            truncate(first(copies, number), missing)

    return do


def moved_together(numbers: Sequence[int], onto: int, *, keep: bool) -> Damage:
    """Shares `numbers` on the server of share `onto`, too (`keep`), or only there."""

    def do(grid: TahoeGrid, copies: Copies) -> None:
        server = copies[onto][0][0]
        for number in numbers:
            duplicate(grid, first(copies, number), server)
            if not keep:
                first(copies, number).unlink()

    return do


def age_leases(file: Path, seconds: int) -> None:
    """Every lease of the share was granted so much earlier."""
    data = bytearray(file.read_bytes())
    if is_mutable(file):
        places = [MUTABLE_LEASES_AT + MUTABLE_LEASE_BYTES * slot + 4 for slot in range(4)]
        places = [at for at in places if data[at - 4 : at] != bytes(4)]  # owner 0: no lease
    else:
        (leases,) = struct.unpack_from(">L", data, 8)
        places = [len(data) - 4 - IMMUTABLE_LEASE_BYTES * number for number in range(leases)]
    for at in places:
        (expires,) = struct.unpack_from(">L", data, at)
        struct.pack_into(">L", data, at, expires - seconds)
    file.write_bytes(data)
