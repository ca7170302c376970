"""Writing MDMF shares: many segments, each with its own salt. See `mutable_share` for the header.

    header 123 | private key | share hash chain | signature | public key | unused
    at 2167:   salt 16 and block, for each segment | block hash tree, 32 bytes a node

The parts before 2167 are packed tightly, in a room that holds them for every N: so data, once written, need
never move when a chain or key is replaced. A fresh share has zeros in what is left of the room.

Source: the MDMF share layout, as Tahoe-LAFS 1.20 writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from grid.formats.chk_share import pack_hashes, pack_share_hashes
from grid.formats.mutable_share import MDMF_HEADER_BYTES, MDMF_OFFSETS, MDMF_PREFIX, MDMF_VERSION, SALT_BYTES
from grid.formats.segments import MDMF_SEGMENT_BYTES, round_up

MDMF_DATA_OFFSET: Final = 2167


def mdmf_segment_size(k: int) -> int:
    """Segment size in bytes of every MDMF file we write: other writers' updates count on just this one."""
    return round_up(MDMF_SEGMENT_BYTES, k)


def mdmf_signed_prefix(*, seqnum: int, root_hash: bytes, k: int, n: int, segment_size: int, data_size: int) -> bytes:
    """The 59 bytes the signature covers; every share begins with them."""
    return MDMF_PREFIX.pack(MDMF_VERSION, seqnum, root_hash, k, n, segment_size, data_size)


def pack_mdmf_share(
    *,
    seqnum: int,
    root_hash: bytes,
    k: int,
    n: int,
    segment_size: int,
    data_size: int,
    public_key: bytes,
    signature: bytes,
    share_hash_chain: Mapping[int, bytes],
    block_hash_tree: Sequence[bytes],
    salts_and_blocks: Iterable[tuple[bytes, bytes | memoryview]],
    encrypted_private_key: bytes,
) -> bytes:
    """One whole new share. `share_hash_chain` leaves out the share's own leaf."""
    prefix = mdmf_signed_prefix(
        seqnum=seqnum, root_hash=root_hash, k=k, n=n, segment_size=segment_size, data_size=data_size
    )
    chain = pack_share_hashes(sorted(share_hash_chain.items()))
    chain_at = MDMF_HEADER_BYTES + len(encrypted_private_key)
    signature_at = chain_at + len(chain)
    public_key_at = signature_at + len(signature)
    public_key_end = public_key_at + len(public_key)
    if public_key_end > MDMF_DATA_OFFSET:
        raise ValueError("keys, chain and signature do not fit before the share data")
    data: list[bytes | memoryview] = []
    tree_at = MDMF_DATA_OFFSET
    for salt, block in salts_and_blocks:
        data += (salt, block)
        tree_at += SALT_BYTES + len(block)
    tree = pack_hashes(block_hash_tree)
    offsets = MDMF_OFFSETS.pack(
        MDMF_HEADER_BYTES,
        chain_at,
        signature_at,
        public_key_at,
        public_key_end,
        MDMF_DATA_OFFSET,
        tree_at,
        tree_at + len(tree),
    )
    unused = bytes(MDMF_DATA_OFFSET - public_key_end)
    return b"".join((prefix, offsets, encrypted_private_key, chain, signature, public_key, unused, *data, tree))
