"""Writing SDMF shares: one segment, replaced whole with every version. See `mutable_share` for the header.

    header 107 | public key 294 | signature 256 | share hash chain 34 each | block hash tree 32 | block | private key

Source: the SDMF share layout, as Tahoe-LAFS 1.20 writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grid.formats.chk_share import pack_hashes, pack_share_hashes
from grid.formats.mutable_share import SDMF_HEADER_BYTES, SDMF_OFFSETS, SDMF_PREFIX, SDMF_VERSION
from grid.formats.segments import round_up


def sdmf_segment_size(data_size: int, k: int) -> int:
    """The one segment's size in bytes; 0 for an empty file."""
    return round_up(data_size, k)


def sdmf_signed_prefix(
    *, seqnum: int, root_hash: bytes, salt: bytes, k: int, n: int, segment_size: int, data_size: int
) -> bytes:
    """The 75 bytes the signature covers; every share begins with them."""
    return SDMF_PREFIX.pack(SDMF_VERSION, seqnum, root_hash, salt, k, n, segment_size, data_size)


def pack_sdmf_share(
    *,
    seqnum: int,
    root_hash: bytes,
    salt: bytes,
    k: int,
    n: int,
    segment_size: int,
    data_size: int,
    public_key: bytes,
    signature: bytes,
    share_hash_chain: Mapping[int, bytes],
    block_hash_tree: Sequence[bytes],
    share_data: bytes | memoryview,
    encrypted_private_key: bytes,
) -> bytes:
    """One whole share. `share_hash_chain` leaves out the share's own leaf."""
    prefix = sdmf_signed_prefix(
        seqnum=seqnum,
        root_hash=root_hash,
        salt=salt,
        k=k,
        n=n,
        segment_size=segment_size,
        data_size=data_size,
    )
    chain = pack_share_hashes(sorted(share_hash_chain.items()))
    tree = pack_hashes(block_hash_tree)
    signature_at = SDMF_HEADER_BYTES + len(public_key)
    chain_at = signature_at + len(signature)
    tree_at = chain_at + len(chain)
    data_at = tree_at + len(tree)
    private_key_at = data_at + len(share_data)
    eof = private_key_at + len(encrypted_private_key)
    offsets = SDMF_OFFSETS.pack(signature_at, chain_at, tree_at, data_at, private_key_at, eof)
    return b"".join((prefix, offsets, public_key, signature, chain, tree, share_data, encrypted_private_key))
