"""SDMF and MDMF shares: real files encoded again byte for byte, real shares read, and hostile headers."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.crypto import BadSignatureError, RSAPrivateKey, RSAPublicKey, aes_ctr
from grid.erasure import Decoder, Encoder, split_segment
from grid.errors import FormatError
from grid.formats.hashtree import BadHashError, IncompleteHashTree, build_tree, needed_hashes
from grid.formats.hashutil import (
    block_hash,
    datakey,
    fingerprint_of_public_key,
    readkey_of_writekey,
    salted_block_hash,
    ssk_storage_index,
    writekey_of_private_key,
)
from grid.formats.mdmf_share import mdmf_segment_size, mdmf_signed_prefix, pack_mdmf_share
from grid.formats.mutable_share import (
    HEADER_BYTES,
    MutableHeader,
    MutableOffsets,
    MutableShare,
    UnknownVersionError,
    parse_header,
    parse_share,
    take,
)
from grid.formats.sdmf_share import pack_sdmf_share, sdmf_segment_size, sdmf_signed_prefix
from tests.vectors import expand, name_of, section

FILES = section("formats.json", "mutable.files")
KEYS = section("formats.json", "mutable.keys")
READKEY = bytes.fromhex(KEYS["readkey"])
PUBLIC_KEY = bytes.fromhex(KEYS["pubkey_der"])
ENCRYPTED_PRIVATE_KEY = bytes.fromhex(KEYS["encrypted_privkey"])


class EncodedVersion:
    """One version of a mutable file, encoded with our parts: what a publish does, without the servers."""

    def __init__(self, contents: bytes, *, format: str, k: int, n: int, segment_size: int, salts: list[bytes]) -> None:
        self.format, self.k, self.n, self.segment_size, self.salts = format, k, n, segment_size, salts
        self.size = len(contents)
        encoder = Encoder(k, n)
        self.blocks: list[list[bytes]] = [[] for _ in range(n)]  # by share, by segment
        for segment in range(-(-len(contents) // segment_size) if contents else 0):
            plaintext = contents[segment * segment_size : (segment + 1) * segment_size]
            ciphertext = aes_ctr(datakey(salts[segment], READKEY), plaintext)
            for blocks, block in zip(self.blocks, encoder.encode(split_segment(ciphertext, k)), strict=True):
                blocks.append(bytes(block))
        self.block_trees = [build_tree(self._leaves(blocks)) for blocks in self.blocks]
        self.share_tree = build_tree([tree[0] for tree in self.block_trees])
        self.root_hash = self.share_tree[0]

    def _leaves(self, blocks: list[bytes]) -> list[bytes]:
        if self.format == "SDMF":
            return [block_hash(block) for block in blocks]
        return [salted_block_hash(salt, block) for salt, block in zip(self.salts, blocks, strict=True)]

    def signed_prefix(self, seqnum: int) -> bytes:
        common: dict[str, Any] = {
            "seqnum": seqnum,
            "root_hash": self.root_hash,
            "k": self.k,
            "n": self.n,
            "segment_size": self.segment_size,
            "data_size": self.size,
        }
        return (
            sdmf_signed_prefix(salt=self.salts[0], **common) if self.format == "SDMF" else mdmf_signed_prefix(**common)
        )

    def share(self, number: int, *, seqnum: int, signature: bytes) -> bytes:
        common: dict[str, Any] = {
            "seqnum": seqnum,
            "root_hash": self.root_hash,
            "k": self.k,
            "n": self.n,
            "segment_size": self.segment_size,
            "data_size": self.size,
            "public_key": PUBLIC_KEY,
            "signature": signature,
            "share_hash_chain": {node: self.share_tree[node] for node in needed_hashes(self.n, number)},
            "block_hash_tree": self.block_trees[number],
            "encrypted_private_key": ENCRYPTED_PRIVATE_KEY,
        }
        blocks = self.blocks[number]
        if self.format == "SDMF":
            return pack_sdmf_share(salt=self.salts[0], share_data=b"".join(blocks), **common)
        return pack_mdmf_share(salts_and_blocks=zip(self.salts, blocks, strict=True), **common)


def encode(vector: dict[str, Any]) -> EncodedVersion:
    return EncodedVersion(
        contents_of(vector),
        format=vector["format"],
        k=vector["k"],
        n=vector["n"],
        segment_size=vector["segment_size"],
        salts=[bytes.fromhex(salt) for salt in vector["salts"]],
    )


def contents_of(vector: dict[str, Any]) -> bytes:
    contents = expand(vector["contents"])
    assert sha256(contents).hexdigest() == vector["contents_sha256"]
    return contents


@pytest.mark.parametrize("vector", FILES, ids=name_of)
def test_every_share_matches_tahoe(vector: dict[str, Any]) -> None:
    """Given its salts and its signature, a version is determined to the last byte."""
    version = encode(vector)
    assert version.root_hash.hex() == vector["root_hash"]
    assert version.signed_prefix(vector["seqnum"]).hex() == vector["signed_prefix"]
    signature = bytes.fromhex(vector["signature"])
    assert len(vector["share_sha256"]) == vector["n"]
    for number, expected in enumerate(vector["share_sha256"]):
        share = version.share(number, seqnum=vector["seqnum"], signature=signature)
        assert sha256(share).hexdigest() == expected, f"share {number}"
        assert len(share) == vector["offsets"]["EOF"]


@pytest.mark.parametrize("vector", FILES, ids=name_of)
def test_segment_size_matches_tahoe(vector: dict[str, Any]) -> None:
    if vector["format"] == "SDMF":
        assert sdmf_segment_size(vector["length"], vector["k"]) == vector["segment_size"]
    elif vector["max_segment_size"] == 131072:
        assert mdmf_segment_size(vector["k"]) == vector["segment_size"]


STORED = [(vector, int(number)) for vector in FILES for number in vector["shares"]]


@pytest.mark.parametrize(("vector", "number"), STORED, ids=[f"{vector['name']}-{i}" for vector, i in STORED])
def test_real_share_reads_back(vector: dict[str, Any], number: int) -> None:
    """As a reader does: header, public key, signature, hash chain, block tree; then all the blocks."""
    data = expand(vector["shares"][str(number)])
    header = parse_header(data[:HEADER_BYTES])
    share = parse_share(data + b"what an older, longer version left")
    assert share.header == header
    check_header(header, vector)

    assert share.public_key == PUBLIC_KEY
    assert fingerprint_of_public_key(share.public_key).hex() == KEYS["fingerprint"]
    public_key = RSAPublicKey.from_der(share.public_key)
    public_key.verify_pss(share.signature, header.signed_prefix)
    with pytest.raises(BadSignatureError):
        public_key.verify_pss(share.signature, evolve(header, seqnum=header.seqnum + 1).signed_prefix)
    assert share.encrypted_private_key == ENCRYPTED_PRIVATE_KEY

    check_hashes(share, number)


def check_header(header: MutableHeader, vector: dict[str, Any]) -> None:
    assert header.format == vector["format"].lower()
    assert (header.seqnum, header.root_hash.hex()) == (vector["seqnum"], vector["root_hash"])
    assert (header.k, header.n) == (vector["k"], vector["n"])
    assert (header.segment_size, header.data_size) == (vector["segment_size"], vector["length"])
    assert header.salt.hex() == (vector["salts"][0] if header.format == "sdmf" else "")
    assert header.signed_prefix.hex() == vector["signed_prefix"]
    assert header.checkstring.hex() == vector["signed_prefix"][: 2 * (57 if header.format == "sdmf" else 41)]
    assert header.num_segments == (len(vector["salts"]) if vector["length"] else 0)
    offsets, expected = header.offsets, vector["offsets"]
    starts = {
        "signature": offsets.signature[0],
        "share_hash_chain": offsets.share_hash_chain[0],
        "block_hash_tree": offsets.block_hash_tree[0],
        "share_data": offsets.share_data[0],
        "enc_privkey": offsets.encrypted_private_key[0],
        "EOF": offsets.eof,
    }
    if header.format == "mdmf":
        starts["verification_key"] = offsets.public_key[0]
        starts["verification_key_end"] = sum(offsets.public_key)
    assert starts == expected


def check_hashes(share: MutableShare, number: int) -> None:
    """Verify the share's every block against the root hash."""
    header = share.header
    block_tree = IncompleteHashTree(header.num_segments, share.block_hash_tree[0])
    block_tree.set_hashes(dict(enumerate(share.block_hash_tree)))
    share_tree = IncompleteHashTree(header.n, header.root_hash)
    share_tree.set_hashes(share.share_hash_chain, leaves={number: share.block_hash_tree[0]})
    base = header.offsets.share_data[0]
    for segment in range(header.num_segments):
        offset, length = header.salt_and_block_range(segment)
        salt, block = header.split_salt_and_block(segment, take(share.share_data, (offset - base, length)))
        leaf = block_hash(block) if header.format == "sdmf" else salted_block_hash(salt, block)
        assert block_tree.get_leaf(segment) == leaf
    assert header.num_segments == 0 or offset + length == base + len(share.share_data)


@pytest.mark.parametrize("vector", [v for v in FILES if len(v["shares"]) >= v["k"]], ids=name_of)
def test_contents_come_back_from_real_shares(vector: dict[str, Any]) -> None:
    shares = {int(number): parse_share(expand(pointer)) for number, pointer in vector["shares"].items()}
    numbers = sorted(shares)[-vector["k"] :]
    header = shares[numbers[0]].header
    base = header.offsets.share_data[0]
    contents = b""
    for segment in range(header.num_segments):
        offset, length = header.salt_and_block_range(segment)
        parts = [
            header.split_salt_and_block(segment, take(shares[number].share_data, (offset - base, length)))
            for number in numbers
        ]
        (salt,) = {salt for salt, _ in parts}
        pieces = Decoder(header.k, header.n).decode([block for _, block in parts], numbers)
        ciphertext = b"".join(bytes(piece) for piece in pieces)[: header.segmentation.segment_bytes(segment)]
        contents += aes_ctr(datakey(salt, READKEY), ciphertext)
    assert contents == contents_of(vector)


@pytest.mark.parametrize("vector", [v for v in FILES if "update" in v], ids=name_of)
def test_update_salts_the_touched_segments_alone(vector: dict[str, Any]) -> None:
    """What a partial write changes: the vectors' own account, and what it comes to in contents."""
    update = vector["update"]
    (base,) = section("formats.json", "mutable.files", name=update["base"])
    old, data = contents_of(base), bytes.fromhex(update["data"])
    end = update["offset"] + len(data)
    assert contents_of(vector) == old[: update["offset"]] + data + old[end:]
    size = vector["segment_size"]
    touched = range(update["offset"] // size, (end - 1) // size + 1)
    assert list(touched) == update["resalted_segments"]
    kept = [i for i in range(len(base["salts"])) if i not in touched]
    assert [vector["salts"][i] for i in kept] == [base["salts"][i] for i in kept]


def test_keys_derive_as_in_tahoe() -> None:
    writekey = bytes.fromhex(KEYS["writekey"])
    private_key = aes_ctr(writekey, ENCRYPTED_PRIVATE_KEY)
    assert private_key.hex() == KEYS["privkey_der"]
    assert writekey_of_private_key(private_key) == writekey
    assert readkey_of_writekey(writekey) == READKEY
    assert ssk_storage_index(READKEY).hex() == KEYS["storage_index"]
    assert RSAPrivateKey.from_der(private_key).public_der == PUBLIC_KEY


def test_corrupt_chain_is_caught() -> None:
    vector = next(v for v in FILES if v["name"] == "sdmf-1000-3of10-seq1")
    share = parse_share(expand(vector["shares"]["0"]))
    node = next(iter(share.share_hash_chain))
    share.share_hash_chain[node] = bytes(32)
    with pytest.raises(BadHashError):
        check_hashes(share, 0)


# --- versions and hostile headers ------------------------------------------------------------------------------

SDMF = expand(next(v for v in FILES if v["name"] == "sdmf-1000-3of10-seq1")["shares"]["0"])
MDMF = expand(next(v for v in FILES if v["name"] == "mdmf-three-segs-tail-3of10-seq1")["shares"]["0"])


def put(share: bytes, offset: int, value: int, size: int = 8) -> bytes:
    """The share with an integer overwritten."""
    return share[:offset] + value.to_bytes(size, "big") + share[offset + size :]


def test_version_key_orders_versions() -> None:
    header = parse_header(SDMF)
    newer = evolve(header, seqnum=header.seqnum + 1, root_hash=bytes(32))
    twin = evolve(header, root_hash=b"\xff" * 32)
    assert max([header, newer, twin], key=lambda h: h.version_key) == newer
    assert max([header, twin], key=lambda h: h.version_key) == twin
    assert parse_header(MDMF).version_key != header.version_key


def test_odd_offsets_make_another_version() -> None:
    """Offsets are not signed: a share whose offsets were shifted, and still work, must not count with the others."""
    header = parse_header(SDMF)
    shifted = parse_header(put(SDMF, 99, header.offsets.eof + 1))
    assert shifted.signed_prefix == header.signed_prefix
    assert shifted.version_key != header.version_key


@pytest.mark.parametrize("version", [2, 255])
def test_unknown_version_is_told_apart(version: int) -> None:
    with pytest.raises(UnknownVersionError) as caught:
        parse_header(bytes([version]))
    assert caught.value.version == version


BIG = (1 << 64) - 1
HOSTILE = {
    "empty": b"",
    "sdmf cut": SDMF[:106],
    "mdmf cut": MDMF[:122],
    "sdmf k 0": put(SDMF, 57, 0, 1),
    "sdmf k over n": put(SDMF, 57, 11, 1),
    "mdmf k 0": put(MDMF, 41, 0, 1),
    "mdmf n 0": put(MDMF, 42, 0, 1),
    "sdmf segment no multiple of k": put(SDMF, 59, 1003),
    "sdmf two segments": put(SDMF, 59, 999),
    "sdmf no segment": put(SDMF, 59, 0),
    "sdmf huge": put(put(SDMF, 59, 3 << 40), 67, 3 << 40),
    "sdmf more data than room": put(put(SDMF, 59, 1005), 67, 1005),
    "mdmf segment no multiple of k": put(MDMF, 43, 67),
    "mdmf no segment": put(MDMF, 43, 0),
    "mdmf huge segment": put(MDMF, 43, 3 << 40),
    "mdmf many segments": put(MDMF, 51, 66 << 40),
    "mdmf most segments": put(MDMF, 51, BIG),
    "mdmf more data than room": put(MDMF, 51, 3 * 66 + 66),
    "sdmf signature in header": put(SDMF, 75, 100, 4),
    "sdmf short signature": put(SDMF, 79, 401 + 255, 4),
    "sdmf chain of 1.5": put(SDMF, 83, 657 + 51, 4),
    "sdmf chain after tree": put(SDMF, 79, 900, 4),
    "sdmf no tree": put(SDMF, 87, 793 + 31, 4),
    "sdmf data after key": put(SDMF, 91, 824),
    "sdmf key beyond eof": put(SDMF, 91, BIG),
    "sdmf eof": put(SDMF, 99, BIG),
    "sdmf long private key": put(SDMF, 99, 1 << 40),
    "mdmf private key in header": put(MDMF, 59, 122),
    "mdmf chain before key": put(MDMF, 67, 122),
    "mdmf long private key": put(put(put(put(MDMF, 67, 1 << 20), 75, 1 << 20), 83, 1 << 20), 91, 1 << 20),
    "mdmf no public key": put(MDMF, 91, 1732),
    "mdmf key beyond eof": put(MDMF, 91, 1 << 40),
    "mdmf data beyond tree": put(MDMF, 99, 1 << 40),
    "mdmf small tree": put(MDMF, 115, 2525 - 1),
    "mdmf eof": put(MDMF, 115, BIG),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_impossible_headers(data: bytes) -> None:
    with pytest.raises(FormatError):
        parse_header(data)


def test_short_data() -> None:
    """A server may send less than was asked for."""
    header = parse_header(SDMF)
    with pytest.raises(FormatError):
        parse_share(SDMF[:-1])
    with pytest.raises(FormatError):
        take(SDMF[:500], header.offsets.signature)
    with pytest.raises(FormatError):
        header.split_salt_and_block(0, b"x" * 333)
    with pytest.raises(ValueError, match="no segment"):
        header.salt_and_block_range(1)


def test_mdmf_room_is_enough_for_every_n() -> None:
    """The data's offset is fixed: the longest chain and private key must fit before it."""
    version = EncodedVersion(b"", format="MDMF", k=1, n=255, segment_size=131072, salts=[])
    share = parse_share(version.share(254, seqnum=1, signature=bytes(256)))
    assert len(share.share_hash_chain) == 8
    with pytest.raises(ValueError, match="fit"):
        pack_mdmf_share(
            seqnum=1,
            root_hash=bytes(32),
            k=1,
            n=1,
            segment_size=131072,
            data_size=0,
            public_key=bytes(294),
            signature=bytes(256),
            share_hash_chain={},
            block_hash_tree=[bytes(32)],
            salts_and_blocks=[],
            encrypted_private_key=bytes(1500),
        )


def test_repr_shows_no_key_material() -> None:
    share = parse_share(SDMF)
    for secret in (share.encrypted_private_key, share.header.salt):
        assert repr(secret)[2:12] not in repr(share)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_file_encodes_and_reads_back(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["SDMF", "MDMF"]))
    k = data.draw(st.integers(1, 6))
    n = data.draw(st.integers(k, 12))
    contents = data.draw(st.binary(max_size=200))
    segment_size = sdmf_segment_size(len(contents), k) if kind == "SDMF" else k * data.draw(st.integers(1, 20))
    segments = max(1, -(-len(contents) // segment_size)) if segment_size and contents else int(kind == "SDMF")
    salts = data.draw(st.lists(st.binary(min_size=16, max_size=16), min_size=segments, max_size=segments))
    version = EncodedVersion(contents, format=kind, k=k, n=n, segment_size=segment_size, salts=salts)
    for number in range(n):
        packed = version.share(number, seqnum=7, signature=bytes(256))
        share = parse_share(memoryview(packed))
        assert share.header.signed_prefix == version.signed_prefix(7) == packed[: len(share.header.signed_prefix)]
        assert share.header.offsets.eof == len(packed)
        check_hashes(share, number)


@given(st.sampled_from([SDMF, MDMF]), st.data())
def test_changed_headers_raise_nothing_else(share: bytes, data: st.DataObject) -> None:
    """Whatever a header says, what parses stays inside the share it claims, and taking it apart is safe."""
    changed = bytearray(share)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, HEADER_BYTES - 1))] = data.draw(st.integers(0, 255))
    try:
        header = parse_header(bytes(changed))
    except FormatError:
        return
    assert sum(header.block_hash_tree_range) <= header.offsets.eof
    for segment in {0, header.num_segments - 1} & set(range(header.num_segments)):
        assert sum(header.salt_and_block_range(segment)) <= sum(header.offsets.share_data) <= header.offsets.eof
    try:
        parse_share(bytes(changed))
    except FormatError:
        return


@given(st.integers(0, 3), st.binary(max_size=300))
def test_noise_raises_nothing_else(version: int, noise: bytes) -> None:
    with pytest.raises(FormatError):
        parse_share(bytes([version]) + noise)


def test_offsets_compare_by_value() -> None:
    assert MutableOffsets.of_sdmf(1, 2, 3, 4, 5, 6) == MutableOffsets.of_sdmf(1, 2, 3, 4, 5, 6)
