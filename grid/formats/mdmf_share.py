"""Writing MDMF shares: many segments, each with its own salt. See `mutable_share` for the header.

    header 123 | private key | share hash chain | signature | public key | unused
    at 2167:   salt 16 and block, for each segment | block hash tree, 32 bytes a node

The parts before 2167 are packed tightly, in a room that holds them for every N: so data, once written, need
never move when a chain or key is replaced. A fresh share has zeros in what is left of the room.

The offsets leave it open where the parts stand. Tahoe-LAFS 1.20 reads and updates shares with a gap before the tree
(so a file can grow without its trees being moved each time), but takes it for granted that the data begins at 2167: a
share with data elsewhere it reads, and spoils when it updates it. We never write one.

Source: the MDMF share layout, as Tahoe-LAFS 1.20 writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from grid.formats.chk_share import pack_hashes, pack_share_hashes
from grid.formats.mutable_share import MDMF_HEADER_BYTES, MDMF_OFFSETS, MDMF_PREFIX, MDMF_VERSION, SALT_BYTES
from grid.formats.segments import MDMF_SEGMENT_BYTES, Segmentation, round_up

MDMF_DATA_OFFSET: Final = 2167


def mdmf_segment_size(k: int) -> int:
    """Segment size in bytes of every MDMF file we write: other writers' updates count on just this one."""
    return round_up(MDMF_SEGMENT_BYTES, k)


def mdmf_signed_prefix(*, seqnum: int, root_hash: bytes, k: int, n: int, segment_size: int, data_size: int) -> bytes:
    """The 59 bytes the signature covers; every share begins with them."""
    return MDMF_PREFIX.pack(MDMF_VERSION, seqnum, root_hash, k, n, segment_size, data_size)


def mdmf_data_end(size: int, k: int, segment_size: int) -> int:
    """Where the salts and blocks of a share end, if the file has `size` bytes: the first place for the tree."""
    file = Segmentation(size, k, segment_size)
    return MDMF_DATA_OFFSET + SALT_BYTES * file.num_segments + file.share_data_size


def pack_mdmf_head(
    prefix: bytes,
    *,
    public_key: bytes,
    signature: bytes,
    share_hash_chain: Mapping[int, bytes],
    encrypted_private_key: bytes,
    tree_at: int,
    eof: int,
) -> bytes:
    """Everything before the share data but the unused room: what a new version of a share begins with.

    `prefix` is mdmf_signed_prefix()'s. `share_hash_chain` leaves out the share's own leaf. `tree_at`: where the block
    hash tree stands, at or after the end of the data. Raises ValueError when the parts do not fit.
    """
    chain = pack_share_hashes(sorted(share_hash_chain.items()))
    chain_at = MDMF_HEADER_BYTES + len(encrypted_private_key)
    signature_at = chain_at + len(chain)
    public_key_at = signature_at + len(signature)
    public_key_end = public_key_at + len(public_key)
    if public_key_end > MDMF_DATA_OFFSET:
        raise ValueError("keys, chain and signature do not fit before the share data")
    offsets = MDMF_OFFSETS.pack(
        MDMF_HEADER_BYTES,
        chain_at,
        signature_at,
        public_key_at,
        public_key_end,
        MDMF_DATA_OFFSET,
        tree_at,
        eof,
    )
    return b"".join((prefix, offsets, encrypted_private_key, chain, signature, public_key))


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
    """One whole new share, its block hash tree right after the data."""
    data: list[bytes | memoryview] = [part for pair in salts_and_blocks for part in pair]
    tree_at = MDMF_DATA_OFFSET + sum(map(len, data))
    tree = pack_hashes(block_hash_tree)
    head = pack_mdmf_head(
        mdmf_signed_prefix(
            seqnum=seqnum, root_hash=root_hash, k=k, n=n, segment_size=segment_size, data_size=data_size
        ),
        public_key=public_key,
        signature=signature,
        share_hash_chain=share_hash_chain,
        encrypted_private_key=encrypted_private_key,
        tree_at=tree_at,
        eof=tree_at + len(tree),
    )
    return b"".join((head, bytes(MDMF_DATA_OFFSET - len(head)), *data, tree))
