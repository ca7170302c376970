"""Reads one share whole and proves every byte of it that has a meaning. For both kinds of files.

    blocks ── hashed as they come ──→ leaves ─┐
    block hash tree ── whole array ───────────┴→ its root ── share hash chain ──→ UEB, or the signed root hash
    CHK: ciphertext hash tree, whole array → UEB         mutable: private key, if the cap can tell

Blocks are not decoded: k of them with right hashes give what was encoded, by whoever made the file. Not covered, since
no reader looks at them: two informational sizes in a CHK share's header, and its region for plaintext hashes.
Memory: two pieces of READ_BYTES, and 64 bytes a segment for each hash tree. Source: the verifier of Tahoe-LAFS 1.20.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from grid.errors import CorruptShareError, FormatError
from grid.formats import hashutil
from grid.formats.caps import CHKVerifyCap
from grid.formats.chk_share import unpack_share_hashes
from grid.formats.hashtree import IncompleteHashTree, check_tree, tree_size
from grid.formats.hashutil import HASH_BYTES
from grid.interfaces import IBucketReader, IStorageServer
from grid.operations.keys import MutableKeys
from grid.operations.share_reader import FileState, RemoteShare
from grid.operations.slot_share import FoundShare
from grid.operations.worker import run_cpu_work

READ_BYTES: Final = 1 << 20  # asked for at a time, of one share

Read = Callable[[int, int], Awaitable[bytes | memoryview]]  # (offset, length) -> exactly these bytes, or FormatError


async def verify_chk_share(cap: CHKVerifyCap, server: IStorageServer, number: int, reader: IBucketReader) -> None:
    """Raises CorruptShareError, ShareVersionError, PeerError."""
    # Of its own, so that what one share claims is never believed of another.
    file = FileState(cap.storage_index, cap.ueb_hash, cap.k, cap.n, cap.size, strict=True)
    share = RemoteShare(file, server, number, reader)
    await share.open()
    layout, segmentation = share.layout, file.segmentation
    root, extension = file.share_tree.get_leaf(number), file.ueb
    assert root is not None and extension is not None, "open() proved them"
    count = segmentation.num_segments
    try:
        if layout.share_hashes - layout.block_hashes != HASH_BYTES * tree_size(count):
            raise FormatError("block hash tree of a wrong size")
        sizes = [segmentation.block_bytes(segment) for segment in range(count)]
        leaves = await hash_blocks(share.read_range, layout.data, sizes)
        await _check_tree(share.read_range, layout.block_hashes, count, root, leaves)
        await _check_tree(share.read_range, layout.crypttext_hashes, count, extension.crypttext_root_hash, None)
    except FormatError as error:
        raise share.corrupt(str(error)) from None


async def verify_mutable_share(share: FoundShare, writekey: bytes | None) -> None:
    """`writekey`: the cap's, if it has one, to prove the private key with. The header was authenticated before.

    Raises CorruptShareError, PeerError (ShareReplacedError when it has another version by now).
    """
    header = share.header

    async def read(offset: int, length: int) -> bytes:
        return (await share.read([(offset, length)]))[0]

    try:
        chain, root = await share.read([header.offsets.share_hash_chain, (header.block_hash_tree_range[0], HASH_BYTES)])
        share_tree = IncompleteHashTree(header.n, header.root_hash)
        share_tree.set_hashes(unpack_share_hashes(chain), leaves={share.number: root})
        sizes = [header.salt_and_block_range(segment)[1] for segment in range(header.num_segments)]
        leaves = await hash_blocks(read, header.offsets.share_data[0], sizes)
        await _check_tree(read, header.block_hash_tree_range[0], header.num_segments, root, leaves)
        encrypted = await share.read_encrypted_private_key()
        if writekey is not None:
            MutableKeys.from_share(encrypted, writekey=writekey, public_der=share.public_der)
    except FormatError as error:
        raise CorruptShareError(share.server.name, share.number, str(error)) from None


async def hash_blocks(read: Read, start: int, sizes: Sequence[int]) -> bytes:
    """The leaf of each block, 32 bytes each; blocks of these sizes stand one after the other from `start`.

    An MDMF block is hashed with the salt before it: it counts as one block with that.
    """
    hasher = _BlockHasher(sizes)
    total = sum(sizes)
    for offset in range(0, total, READ_BYTES):
        piece = await read(start + offset, min(READ_BYTES, total - offset))

        def hash_piece(piece: bytes | memoryview = piece) -> None:
            hasher.update(piece)

        await run_cpu_work(hash_piece, len(piece))
    return bytes(hasher.leaves)


class _BlockHasher:
    """Cuts a stream into blocks, and keeps nothing but their hashes."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.leaves = bytearray()
        self._sizes = iter(sizes)
        self._left = next(self._sizes, 0)
        self._hasher = hashutil.block_hasher()

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while len(view):
            part = view[: self._left]
            self._hasher.update(part)
            view = view[len(part) :]
            self._left -= len(part)
            if not self._left:
                self.leaves += self._hasher.digest()
                self._hasher = hashutil.block_hasher()
                self._left = next(self._sizes, 0)


async def _check_tree(read: Read, start: int, leaf_count: int, root: bytes, leaves: bytes | None) -> None:
    """The whole array from `start` against its root and, if given, what its leaves should be. Raises FormatError."""
    size = HASH_BYTES * tree_size(leaf_count)
    pieces = [await read(start + at, min(READ_BYTES, size - at)) for at in range(0, size, READ_BYTES)]
    nodes = b"".join(pieces)
    await run_cpu_work(lambda: check_tree(nodes, root, leaves), 10 * size)
