"""One byte flipped in each field of share files on disk, on as many servers as may fail: content is still right.

With one share more it is EIO, never wrong bytes. What was found is in the log, with server and share number.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from grid.formats.base32 import b2a
from grid.formats.caps import parse_known_cap
from tests.real.mounting import Mounter
from tests.real.sample_tree import content
from tests.real.tahoe_grid import SERVERS, TahoeGrid

pytestmark = [pytest.mark.interop, pytest.mark.mount]

UNCACHED = "cache_size=3M"  # too little for a cache on disk: what was read once is fetched again
IMMUTABLE_HEADER_BYTES = 12  # of the server's container, before the share
MUTABLE_DATA_OFFSET = 468
HASH_BYTES = 32
SPARE = 7  # n - k
CHK_FIELDS = ("version", "data_offset", "data", "crypttext_hashes", "block_hashes", "share_hashes", "ueb")
SDMF_FIELDS = ("seqnum", "root_hash", "salt", "signature", "share_hashes", "block_hashes", "data", "offsets")


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as share:
        share.seek(position)
        byte = share.read(1)
        share.seek(position)
        share.write(bytes([byte[0] ^ 0x20]))


def chk_position(file: Path, field: str) -> int:
    """Where in the container file a byte of `field` stands; layout version 1."""
    header = file.read_bytes()[IMMUTABLE_HEADER_BYTES : IMMUTABLE_HEADER_BYTES + 0x24]
    version, _, _, data, _, crypttext, blocks, shares, ueb = struct.unpack(">9L", header)
    assert version == 1
    inside = {
        "version": 3,
        "data_offset": 0x0F,
        "data": data + 5,
        "crypttext_hashes": crypttext + HASH_BYTES + 5,  # node 1: not the root, which the UEB gives
        "block_hashes": blocks + HASH_BYTES + 5,
        "share_hashes": shares + 5,
        "ueb": ueb + 40,
    }
    return IMMUTABLE_HEADER_BYTES + inside[field]


def sdmf_position(file: Path, field: str) -> int:
    share = file.read_bytes()[MUTABLE_DATA_OFFSET:]
    signature, chain, blocks, data, _, _ = struct.unpack(">LLLLQQ", share[75:107])
    inside = {
        "seqnum": 8,
        "root_hash": 20,
        "salt": 45,
        "signature": signature + 9,
        "share_hashes": chain + 9,
        "block_hashes": blocks + 9,
        "data": data + 9,
        "offsets": 82,
    }
    return MUTABLE_DATA_OFFSET + inside[field]


def shares_of(grid: TahoeGrid, cap: str) -> Iterator[tuple[int, Path]]:
    """(share number, container file), ascending."""
    storage_index = parse_known_cap(cap).storage_index
    assert storage_index is not None
    for number, copies in sorted(grid.share_files(b2a(storage_index)).items()):
        for _, file in copies:
            yield number, file


@pytest.mark.parametrize("field", CHK_FIELDS)
def test_chk(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, node_dir: Path, field: str) -> None:
    """n-k damaged: right. One more: EIO, and the log names a damaged share, since three good ones do not exist.

    The ciphertext tree is the same in every share, so for that one good copy is enough, and all must be damaged.
    """
    fatal = SERVERS if field == "crypttext_hashes" else SPARE + 1
    data = content(3_500_000, CHK_FIELDS.index(field))
    shares = list(shares_of(real_grid, real_grid.put_at(root_cap, "file", data)))
    for _, file in shares[:SPARE]:
        flip(file, chk_position(file, field))
    with mounted(root_cap, UNCACHED) as mount:
        assert (mount.path / "file").read_bytes() == data
    for _, file in shares[SPARE:fatal]:
        flip(file, chk_position(file, field))
    with mounted(root_cap, UNCACHED) as mount:
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / "file").read_bytes()
        log = mount.log(node_dir)
    assert any(re.search(rf"share {number} on server \w{{8}}", log) for number, _ in shares[:fatal]), log


@pytest.mark.parametrize("field", SDMF_FIELDS)
def test_sdmf_and_directory(real_grid: TahoeGrid, mounted: Mounter, node_dir: Path, field: str) -> None:
    """The same for a mutable file and for the directory that is the mount's root."""
    root = real_grid.mkdir()
    data = content(60_000, SDMF_FIELDS.index(field))
    cap = real_grid.put_at(root, "file", data, "SDMF")
    for damaged_cap in (cap, root):
        for _, file in list(shares_of(real_grid, damaged_cap))[:SPARE]:
            flip(file, sdmf_position(file, field))
    with mounted(root, "ro", UNCACHED) as mount:
        assert (mount.path / "file").read_bytes() == data


def test_sdmf_with_too_many_damaged_shares(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    cap = real_grid.put_at(root_cap, "file", content(60_000, 52), "SDMF")
    for _, file in list(shares_of(real_grid, cap))[: SPARE + 1]:
        flip(file, sdmf_position(file, "data"))
    with mounted(root_cap, "ro", UNCACHED) as mount, pytest.raises(OSError, match="Input/output error"):
        (mount.path / "file").read_bytes()
