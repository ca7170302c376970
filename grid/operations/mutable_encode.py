"""Making the shares of one version of a mutable file: encrypt, code, hash, sign.

    SDMF   one segment ─────────── block tree of one leaf ┐
    MDMF   segments, a salt each ─ block tree             ┴─ share tree ── root hash ── signature

`EncodedVersion` holds whole shares, `mdmf_update` makes a version that changes shares where they are; `publish` takes
both. All CPU work of a length that matters runs in worker threads, a segment at a time.

Source: mutable shares as Tahoe-LAFS 1.20 writes them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol

from attrs import field, frozen

from grid.crypto import aes_ctr
from grid.erasure import Encoder, split_segment
from grid.formats import hashutil
from grid.formats.hashtree import build_tree, needed_hashes
from grid.formats.mdmf_share import mdmf_segment_size, mdmf_signed_prefix, pack_mdmf_share
from grid.formats.mutable_share import HEADER_BYTES, SALT_BYTES, SDMF_DATA_BYTES_MAX, MutableHeader, parse_header
from grid.formats.sdmf_share import pack_sdmf_share, sdmf_segment_size, sdmf_signed_prefix
from grid.formats.segments import Segmentation
from grid.operations.keys import MutableKeys
from grid.operations.lanes import in_lanes
from grid.operations.worker import run_cpu_work

ENCODING_AT_ONCE: Final = 3  # segments of one version: of one the bytes are read while another is coded

Read = Callable[[int, int], Awaitable[bytes]]  # (offset, length): the file's bytes there
RandomBytes = Callable[[int], bytes]
Writes = Sequence[tuple[int, bytes]]  # (offset in the share, what is to stand there)


class NewVersion(Protocol):
    """What `publish` puts on the servers."""

    @property
    def header(self) -> MutableHeader: ...

    @property
    def base(self) -> MutableHeader | None:
        """The version whose shares are changed in place; None if whole shares are written."""

    @property
    def numbers(self) -> Collection[int]:
        """Of the shares there will be."""

    def writes(self, number: int) -> Writes:
        """For one share, the first ones from offset 0: the header and more."""


@frozen
class EncodedVersion:
    """All shares of one version, ready to go."""

    header: MutableHeader
    shares: Mapping[int, bytes] = field(repr=False)
    base: None = None

    @property
    def numbers(self) -> Collection[int]:
        return self.shares.keys()

    def writes(self, number: int) -> Writes:
        return [(0, self.shares[number])]


def encode_sdmf(
    data: bytes, keys: MutableKeys, *, seqnum: int, salt: bytes, k: int, n: int, signature: bytes | None = None
) -> EncodedVersion:
    """CPU-bound: see `prepare_sdmf`. `salt` must be 16 fresh random bytes.

    `signature` takes the place of the one that would be made, to get known bytes.
    Raises ValueError when the file is over SDMF_DATA_BYTES_MAX.
    """
    if len(data) > SDMF_DATA_BYTES_MAX:
        raise ValueError(f"an SDMF file holds at most {SDMF_DATA_BYTES_MAX} bytes")
    ciphertext = aes_ctr(hashutil.datakey(salt, keys.readkey), data)
    blocks = Encoder(k, n).encode(split_segment(ciphertext, k)) if data else [b""] * n
    block_trees = [build_tree([hashutil.block_hash(block)] if data else []) for block in blocks]
    share_tree = build_tree([tree[0] for tree in block_trees])
    common: dict[str, Any] = {
        "seqnum": seqnum,
        "root_hash": share_tree[0],
        "salt": salt,
        "k": k,
        "n": n,
        "segment_size": sdmf_segment_size(len(data), k),
        "data_size": len(data),
    }
    if signature is None:
        signature = keys.private.sign_pss(sdmf_signed_prefix(**common))
    shares = {
        number: pack_sdmf_share(
            **common,
            public_key=keys.public_der,
            signature=signature,
            share_hash_chain={node: share_tree[node] for node in needed_hashes(n, number)},
            block_hash_tree=block_trees[number],
            share_data=blocks[number],
            encrypted_private_key=keys.encrypted_private_key,
        )
        for number in range(n)
    }
    return EncodedVersion(parse_header(shares[0][:HEADER_BYTES]), shares)


async def prepare_sdmf(data: bytes, keys: MutableKeys, *, seqnum: int, salt: bytes, k: int, n: int) -> EncodedVersion:
    """encode_sdmf, off the event loop if it is long."""
    return await run_cpu_work(lambda: encode_sdmf(data, keys, seqnum=seqnum, salt=salt, k=k, n=n), len(data) * n // k)


# --- MDMF


@frozen
class CodedSegment:
    """One MDMF segment, for every share number: its block, and the hash that stands for it in the block tree."""

    salt: bytes = field(repr=False)
    blocks: Sequence[bytes | memoryview] = field(repr=False)
    leaves: Sequence[bytes] = field(repr=False)


def code_segment(plaintext: bytes, readkey: bytes, salt: bytes, encoder: Encoder, k: int) -> CodedSegment:
    """CPU-bound. `salt` must be 16 fresh random bytes."""
    ciphertext = aes_ctr(hashutil.datakey(salt, readkey), plaintext)
    blocks = encoder.encode(split_segment(ciphertext, k))
    return CodedSegment(salt, blocks, [hashutil.salted_block_hash(salt, block) for block in blocks])


async def code_segments(
    segments: Sequence[int],
    plaintext_of: Callable[[int], Awaitable[bytes]],
    readkey: bytes,
    *,
    k: int,
    n: int,
    random_bytes: RandomBytes,
) -> dict[int, CodedSegment]:
    """{segment: coded}, ENCODING_AT_ONCE at a time. Raises what `plaintext_of` raises."""
    encoder = Encoder(k, n)
    salts = {segment: random_bytes(SALT_BYTES) for segment in segments}

    async def code(segment: int) -> CodedSegment:
        plaintext = await plaintext_of(segment)
        salt = salts[segment]
        return await run_cpu_work(lambda: code_segment(plaintext, readkey, salt, encoder, k), len(plaintext) * n // k)

    return await in_lanes(ENCODING_AT_ONCE, segments, code)


def _pack_mdmf(
    coded: Sequence[CodedSegment],
    keys: MutableKeys,
    *,
    seqnum: int,
    file: Segmentation,
    n: int,
    signature: bytes | None,
) -> EncodedVersion:
    block_trees = [build_tree([segment.leaves[number] for segment in coded]) for number in range(n)]
    share_tree = build_tree([tree[0] for tree in block_trees])
    common: dict[str, Any] = {
        "seqnum": seqnum,
        "root_hash": share_tree[0],
        "k": file.k,
        "n": n,
        "segment_size": file.segment_size,
        "data_size": file.size,
    }
    if signature is None:
        signature = keys.private.sign_pss(mdmf_signed_prefix(**common))
    shares = {
        number: pack_mdmf_share(
            **common,
            public_key=keys.public_der,
            signature=signature,
            share_hash_chain={node: share_tree[node] for node in needed_hashes(n, number)},
            block_hash_tree=block_trees[number],
            salts_and_blocks=((segment.salt, segment.blocks[number]) for segment in coded),
            encrypted_private_key=keys.encrypted_private_key,
        )
        for number in range(n)
    }
    return EncodedVersion(parse_header(shares[0][:HEADER_BYTES]), shares)


async def prepare_mdmf(
    read: Read,
    size: int,
    keys: MutableKeys,
    *,
    seqnum: int,
    k: int,
    n: int,
    random_bytes: RandomBytes,
    segment_size: int | None = None,
    signature: bytes | None = None,
) -> EncodedVersion:
    """Whole MDMF shares of a file of `size` bytes: `n`/`k` times that in memory.

    `segment_size` and `signature` take the place of our own, to get known bytes.
    """
    file = Segmentation(size, k, segment_size or mdmf_segment_size(k))

    async def plaintext_of(segment: int) -> bytes:
        return await read(file.segment_start(segment), file.segment_bytes(segment))

    coded = await code_segments(
        range(file.num_segments), plaintext_of, keys.readkey, k=k, n=n, random_bytes=random_bytes
    )
    in_order = [coded[segment] for segment in range(file.num_segments)]
    return await run_cpu_work(
        lambda: _pack_mdmf(in_order, keys, seqnum=seqnum, file=file, n=n, signature=signature),
        size * n // k,
    )
