"""The CPU side of an immutable upload: ciphertext segments in, blocks out, hash trees and UEB at the end.

Does no I/O and keeps no data, only hashes: 32 bytes per segment and share. Calls are made one after another,
from any thread. Source: the encoding of immutable files, as Tahoe-LAFS 1.20 does it.
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import evolve, frozen

from grid import erasure
from grid.errors import InconsistentEncodingError
from grid.formats import hashutil
from grid.formats.chk_share import ShareLayout
from grid.formats.hashtree import build_tree, needed_hashes
from grid.formats.segments import Segmentation
from grid.formats.ueb import URIExtension, expected_ueb_size
from grid.interfaces import EncodingParameters

Buffer = bytes | memoryview


@frozen
class EncodedTail:
    """What every share ends in, and what differs from share to share (lists by share number)."""

    ueb: bytes
    ueb_hash: bytes
    crypttext_hashes: list[bytes]  # whole tree
    block_hashes: list[list[bytes]]  # whole tree of each share
    share_hashes: list[list[tuple[int, bytes]]]  # chain of each share, own leaf included


class SegmentEncoder:
    """Encodes one file of `size` bytes.

    `ueb`: of a file that exists and is encoded again, proven; its bytes are kept, and it must come to the same hashes.
    """

    def __init__(self, size: int, params: EncodingParameters, ueb: bytes | None = None) -> None:
        self.params = params
        self.segmentation = Segmentation(size, params.k, params.segment_size)
        self._ueb = ueb
        self._ueb_size = expected_ueb_size(self.segmentation, params.n) if ueb is None else len(ueb)
        self.layout = ShareLayout.for_upload(self.segmentation, params.n, self._ueb_size)
        self._fec = erasure.Encoder(params.k, params.n)
        self._whole = hashutil.crypttext_hasher()
        self._segment_hashes: list[bytes] = []
        self._block_hashes: list[list[bytes]] = [[] for _ in range(params.n)]

    @property
    def share_size(self) -> int:
        """Bytes each share takes on its server."""
        return self.layout.total_size(self._ueb_size)

    def encode(self, ciphertext: Sequence[Buffer]) -> list[Buffer]:
        """The n blocks of the next segment, in share order. `ciphertext`: all of the segment, in pieces."""
        segment = ciphertext[0] if len(ciphertext) == 1 else b"".join(ciphertext)
        expected = self.segmentation.segment_bytes(len(self._segment_hashes))
        if len(segment) != expected:
            raise ValueError(f"the uploadable gave {len(segment)} bytes for a segment of {expected}")
        self._whole.update(segment)
        self._segment_hashes.append(hashutil.crypttext_segment_hash(segment))
        blocks = self._fec.encode(erasure.split_segment(segment, self.params.k))
        for hashes, block in zip(self._block_hashes, blocks, strict=True):
            hashes.append(hashutil.block_hash(block))
        return list(blocks)

    def finish(self) -> EncodedTail:
        """Build all trees and the UEB, after the last segment. Raises InconsistentEncodingError."""
        n = self.params.n
        crypttext_hashes = build_tree(self._segment_hashes)
        block_trees = [build_tree(leaves) for leaves in self._block_hashes]
        share_tree = build_tree([tree[0] for tree in block_trees])
        extension = URIExtension(
            size=self.segmentation.size,
            segment_size=self.segmentation.segment_size,
            k=self.params.k,
            n=n,
            num_segments=self.segmentation.num_segments,
            crypttext_hash=self._whole.digest(),
            crypttext_root_hash=crypttext_hashes[0],
            share_root_hash=share_tree[0],
        )
        ueb = extension.pack() if self._ueb is None else self._checked(self._ueb, extension)
        chains = [[(i, share_tree[i]) for i in needed_hashes(n, share, include_leaf=True)] for share in range(n)]
        return EncodedTail(ueb, hashutil.uri_extension_hash(ueb), crypttext_hashes, block_trees, chains)

    @staticmethod
    def _checked(ueb: bytes, made: URIExtension) -> bytes:
        """An older uploader's UEB may say more: its bytes are what the cap vouches for."""
        known = URIExtension.unpack(ueb, ueb_hash=hashutil.uri_extension_hash(ueb), k=made.k, n=made.n, size=made.size)
        if made != evolve(known, crypttext_hash=known.crypttext_hash or made.crypttext_hash):
            raise InconsistentEncodingError("encoded again, the file is another: its uploader was broken")
        return ueb
