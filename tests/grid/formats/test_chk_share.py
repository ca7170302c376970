"""CHK shares: whole files encoded again and compared with the shares the real client made."""

from __future__ import annotations

from hashlib import sha256
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.crypto import aes_ctr
from grid.erasure import Encoder, split_segment
from grid.errors import FormatError
from grid.formats.base32 import b2a
from grid.formats.caps import CHKReadCap, LiteralCap, parse_known_cap
from grid.formats.chk_share import (
    HEADER_BYTES_MAX,
    OFFSET_MAX,
    SHARE_HASHES_BYTES_MAX,
    ShareLayout,
    UnknownVersionError,
    pack_hashes,
    pack_share_hashes,
    unpack_hashes,
    unpack_share_hashes,
)
from grid.formats.hashtree import IncompleteHashTree, build_tree, needed_hashes
from grid.formats.hashutil import (
    block_hash,
    chk_storage_index,
    convergence_hasher,
    crypttext_hasher,
    crypttext_segment_hash,
)
from grid.formats.segments import LITERAL_BYTES_MAX, Segmentation, choose_segment_size
from grid.formats.ueb import UEB_BYTES_MAX, URIExtension, expected_ueb_size
from tests.vectors import expand, name_of, section

CHK = section("formats.json", "chk")


class EncodedFile:
    """One file encoded with our parts, start to end: what an upload does, without the servers."""

    def __init__(self, plaintext: bytes, *, secret: bytes, k: int, n: int, max_segment_size: int) -> None:
        self.n = n
        segment_size = choose_segment_size(len(plaintext), k, max_segment_size)
        self.segmentation = Segmentation(size=len(plaintext), k=k, segment_size=segment_size)
        hasher = convergence_hasher(secret, k, n, segment_size)
        hasher.update(plaintext)
        self.key = hasher.digest()[:16]
        self.ciphertext = aes_ctr(self.key, plaintext)
        encoder = Encoder(k, n)
        self.blocks: list[list[bytes]] = [[] for _ in range(n)]  # by share, by segment
        segment_hashes = []
        for start in range(0, len(plaintext), segment_size):
            segment = self.ciphertext[start : start + segment_size]
            segment_hashes.append(crypttext_segment_hash(segment))
            for blocks, block in zip(self.blocks, encoder.encode(split_segment(segment, k)), strict=True):
                blocks.append(bytes(block))
        self.crypttext_tree = build_tree(segment_hashes)
        self.block_trees = [build_tree([block_hash(block) for block in blocks]) for blocks in self.blocks]
        self.share_tree = build_tree([tree[0] for tree in self.block_trees])
        whole = crypttext_hasher()
        whole.update(self.ciphertext)
        self.extension = URIExtension(
            size=len(plaintext),
            segment_size=segment_size,
            k=k,
            n=n,
            num_segments=self.segmentation.num_segments,
            crypttext_hash=whole.digest(),
            crypttext_root_hash=self.crypttext_tree[0],
            share_root_hash=self.share_tree[0],
        )

    @property
    def cap(self) -> CHKReadCap:
        extension = self.extension
        return CHKReadCap(self.key, extension.hash(), extension.k, extension.n, extension.size)

    def chain(self, share: int) -> dict[int, bytes]:
        return {node: self.share_tree[node] for node in needed_hashes(self.n, share, include_leaf=True)}

    def share(self, number: int, order: tuple[int, ...], version: int | None = None) -> bytes:
        """The bytes of one share, with its hash chain in that order."""
        ueb = self.extension.pack()
        layout = ShareLayout.for_upload(
            self.segmentation, self.n, expected_ueb_size(self.segmentation, self.n), version=version
        )
        data = bytearray(layout.total_size(len(ueb)))
        chain = self.chain(number)
        for offset, part in (
            (0, layout.pack_header()),
            (layout.data, b"".join(self.blocks[number])),
            (layout.crypttext_hashes, pack_hashes(self.crypttext_tree)),
            (layout.block_hashes, pack_hashes(self.block_trees[number])),
            (layout.share_hashes, pack_share_hashes([(node, chain[node]) for node in order])),
            (layout.ueb, layout.pack_ueb_size(len(ueb)) + ueb),
        ):
            data[offset : offset + len(part)] = part
        assert len(data) == layout.total_size(len(ueb))  # no part reached beyond its end
        return bytes(data)


def encode(vector: dict[str, Any]) -> EncodedFile:
    return EncodedFile(
        expand(vector["plaintext"]),
        secret=bytes.fromhex(vector["convergence_secret"]),
        k=vector["k"],
        n=vector["n"],
        max_segment_size=vector["max_segment_size"],
    )


@pytest.mark.parametrize("vector", CHK, ids=name_of)
def test_whole_file_matches_tahoe(vector: dict[str, Any]) -> None:
    """Every hash, the cap, and every byte of every share."""
    file = encode(vector)
    assert file.segmentation.segment_size == vector["segment_size"]
    assert file.segmentation.num_segments == vector["num_segments"]
    assert file.segmentation.block_size == vector["block_size"]
    assert file.segmentation.share_data_size == vector["share_data_size"]
    assert file.key.hex() == vector["key"]
    assert b2a(chk_storage_index(file.key)) == vector["storage_index"]
    assert sha256(file.ciphertext).hexdigest() == vector["ciphertext_sha256"]
    assert file.extension.pack().hex() == vector["ueb"]
    assert file.cap.to_string() == vector["readcap"]
    assert file.cap.verifier.to_string() == vector["verifycap"]

    version = 2 if vector["layout_version"] == 2 else None  # that one was forced: the file is small
    assert len(vector["share_sha256"]) == vector["n"]
    for number, expected in enumerate(vector["share_sha256"]):
        chain = sorted(file.chain(number))
        # The real client writes the chain in the order of a hash set: not ascending for N of 5 to 8.
        orders = permutations(chain) if vector["n"] == 5 else [tuple(chain)]
        shares = [file.share(number, order, version) for order in orders]
        assert {len(share) for share in shares} == {vector["share_length"]}
        assert expected in {sha256(share).hexdigest() for share in shares}


STORED = [(vector, int(number)) for vector in CHK for number in vector.get("shares", {})]


@pytest.mark.parametrize(("vector", "number"), STORED, ids=[f"{vector['name']}-{i}" for vector, i in STORED])
def test_real_share_reads_back(vector: dict[str, Any], number: int) -> None:
    """As a download reads: header, UEB, share hash chain, trees, then every block."""
    share = memoryview(expand(vector["shares"][str(number)]))
    cap = parse_known_cap(vector["readcap"])
    assert isinstance(cap, CHKReadCap)
    layout = ShareLayout.parse(share[:HEADER_BYTES_MAX])
    assert layout.version == vector["layout_version"]
    assert layout.pack_header() == share[: len(layout.pack_header())]
    ueb_at = layout.ueb + layout.ueb_length_bytes
    ueb_size = layout.parse_ueb_size(share[layout.ueb : ueb_at])
    assert layout.total_size(ueb_size) == len(share) == vector["share_length"]
    extension = URIExtension.unpack(
        share[ueb_at : ueb_at + ueb_size], ueb_hash=cap.ueb_hash, k=cap.k, n=cap.n, size=cap.size, strict=True
    )
    segmentation = extension.segmentation
    assert layout == ShareLayout.for_upload(segmentation, cap.n, ueb_size, version=vector["layout_version"])

    share_tree = IncompleteHashTree(cap.n, extension.share_root_hash)
    chain_at, chain_size = layout.share_hashes_range
    share_tree.set_hashes(unpack_share_hashes(share[chain_at : chain_at + chain_size]))
    block_tree = IncompleteHashTree(segmentation.num_segments, share_tree.get_leaf(number))
    hashes = unpack_hashes(share[layout.block_hashes : layout.share_hashes])
    block_tree.set_hashes(dict(enumerate(hashes)))
    crypttext_tree = unpack_hashes(share[layout.crypttext_hashes : layout.block_hashes])
    assert build_tree(crypttext_tree[len(crypttext_tree) // 2 :])[0] == extension.crypttext_root_hash
    for segment in range(segmentation.num_segments):
        offset, length = layout.block_range(segmentation, segment)
        assert block_tree.get_leaf(segment) == block_hash(share[offset : offset + length])
    assert offset + length == layout.plaintext_hashes  # the blocks fill the data section


@pytest.mark.parametrize("vector", section("formats.json", "lit"), ids=lambda vector: str(vector["length"]))
def test_literal_caps_match_tahoe(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["plaintext"])
    assert len(data) == vector["length"] <= LITERAL_BYTES_MAX
    assert LiteralCap(data).to_string() == vector["cap"]
    assert parse_known_cap(vector["cap"]) == LiteralCap(data)


@pytest.mark.parametrize(
    ("size", "version"),
    [
        # 1 of 1 in one 4 GiB segment: block and data reach the limit together with the UEB offset.
        ((1 << 32) - 1000, 1),
        ((1 << 32) - 36 - 3 * 32 - 34 - 1, 1),
        ((1 << 32) - 36 - 3 * 32 - 34, 2),
        (1 << 32, 2),
        (1 << 40, 2),
    ],
)
def test_version_2_is_for_what_does_not_fit(size: int, version: int) -> None:
    layout = ShareLayout.for_upload(Segmentation(size=size, k=1, segment_size=size), 1, 300)
    assert layout.version == version
    assert ShareLayout.parse(layout.pack_header()) == layout


@given(
    size=st.integers(1, 1 << 42),
    k=st.integers(1, 256),
    more=st.integers(0, 255),
    maximum=st.sampled_from([1 << 17, 1 << 20]),
    version=st.sampled_from([None, 2]),
)
def test_layout_reads_back_and_is_contiguous(size: int, k: int, more: int, maximum: int, version: int | None) -> None:
    n = min(256, k + more)
    segmentation = Segmentation(size=size, k=k, segment_size=choose_segment_size(size, k, maximum))
    layout = ShareLayout.for_upload(segmentation, n, 330, version=version)
    header = layout.pack_header()
    assert ShareLayout.parse(header + b"more") == layout
    assert layout.data == len(header)
    tree = layout.crypttext_hashes - layout.plaintext_hashes
    assert tree == layout.block_hashes - layout.crypttext_hashes == layout.share_hashes - layout.block_hashes
    assert tree >= 32 * segmentation.num_segments
    last, length = layout.block_range(segmentation, segmentation.num_segments - 1)
    assert last + length == layout.plaintext_hashes
    assert layout.total_size(330) == layout.ueb + layout.ueb_length_bytes + 330


def header(**changes: int) -> bytes:
    """A version 2 header of a 100-byte file, with some fields changed."""
    segmentation = Segmentation(size=100, k=3, segment_size=102)
    layout = ShareLayout.for_upload(segmentation, 10, 300, version=2)
    values = {name: getattr(layout, name) for name in ShareLayout.__annotations__} | changes
    return ShareLayout(**values).pack_header()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        header()[: HEADER_BYTES_MAX - 1],
        b"\0\0\0\1" + bytes(0x23 - 4),
        bytes(3) + b"\1" + bytes(0x20),  # every offset within the header
        header(ueb=5),
        header(data=OFFSET_MAX + 1),
        header(data_size=(1 << 64) - 1),
        header(ueb=(1 << 64) - 1),
        header(share_hashes=(1 << 63) - 34, ueb=OFFSET_MAX),
        header(share_hashes=1000, ueb=999),
        header(share_hashes=1000, ueb=1033),
        header(share_hashes=1000, ueb=1000 + SHARE_HASHES_BYTES_MAX + 34),
        header(block_hashes=1000, share_hashes=968, ueb=968 + 34),
        header(block_hashes=1000, share_hashes=1031, ueb=1031 + 34),
    ],
)
def test_impossible_headers(data: bytes) -> None:
    with pytest.raises(FormatError):
        ShareLayout.parse(data)


@pytest.mark.parametrize("version", [0, 3, 0xFFFFFFFF])
def test_unknown_version_is_told_apart(version: int) -> None:
    with pytest.raises(UnknownVersionError) as caught:
        ShareLayout.parse(version.to_bytes(4, "big"))
    assert caught.value.version == version


def test_sections_may_stand_in_another_order() -> None:
    """Readers go by the offsets: only what two neighbours say about a length is checked."""
    layout = ShareLayout.parse(header(data=5000, plaintext_hashes=100, crypttext_hashes=9000))
    assert (layout.data, layout.crypttext_hashes) == (5000, 9000)


@pytest.mark.parametrize("size", [0, UEB_BYTES_MAX, 1 << 40])
def test_impossible_ueb_size(size: int) -> None:
    layout = ShareLayout.parse(header())
    assert layout.parse_ueb_size(layout.pack_ueb_size(UEB_BYTES_MAX - 1)) == UEB_BYTES_MAX - 1
    with pytest.raises(FormatError):
        layout.parse_ueb_size(layout.pack_ueb_size(size))
    with pytest.raises(FormatError):
        layout.parse_ueb_size(layout.pack_ueb_size(300)[:-1])


@given(st.dictionaries(st.integers(0, 0xFFFF), st.binary(min_size=32, max_size=32), max_size=20), st.randoms())
def test_share_hashes_in_any_order(chain: dict[int, bytes], random: Any) -> None:
    pairs = list(chain.items())
    random.shuffle(pairs)
    assert unpack_share_hashes(memoryview(pack_share_hashes(pairs))) == chain


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 33,
        bytes(SHARE_HASHES_BYTES_MAX + 34),
        pack_share_hashes([(1, b"a" * 32), (1, b"b" * 32)]),
    ],
)
def test_impossible_share_hashes(data: bytes) -> None:
    with pytest.raises(FormatError):
        unpack_share_hashes(data)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=9))
def test_hash_arrays(hashes: list[bytes]) -> None:
    assert unpack_hashes(memoryview(pack_hashes(hashes))) == hashes
    with pytest.raises(FormatError):
        unpack_hashes(pack_hashes(hashes) + b"x")


@given(st.binary(max_size=80), st.sampled_from([b"", b"\0\0\0\1", b"\0\0\0\2"]))
def test_noise_raises_nothing_else(noise: bytes, start: bytes) -> None:
    try:
        layout = ShareLayout.parse(start + noise)
    except FormatError:
        return
    assert 0 <= layout.share_hashes_range[1] <= SHARE_HASHES_BYTES_MAX


@given(st.binary(max_size=80))
def test_noise_is_no_hash_chain(noise: bytes) -> None:
    try:
        chain = unpack_share_hashes(noise)
    except FormatError:
        return
    assert len(chain) <= len(noise) // 34
