"""The shares of a version of a mutable file that is there, coded again from any k of them, a few segments at a time.

    a segment as it was coded: salt, k pieces ── encode ── n blocks ── their hashes, of all n
                                                             └── those of the share numbers wanted
    hashes of all blocks ── a block tree for each share ── share tree

Salts are the version's own and nothing is encrypted, so what comes out is byte for byte what its writer had.
Memory: the blocks of one step, and 32 bytes a segment for each share number; at the end the trees of the wanted ones.
Source: mutable shares as Tahoe-LAFS 1.20 writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from grid.erasure import Encoder
from grid.formats.chk_share import pack_hashes, pack_share_hashes
from grid.formats.hashtree import build_tree, needed_hashes
from grid.formats.hashutil import HASH_BYTES
from grid.operations.lanes import in_lanes
from grid.operations.retrieve import SEGMENTS_IN_FLIGHT, MutableVersion, block_leaf
from grid.operations.worker import run_cpu_work

STEP_BYTES: Final = 4 << 20  # of all wanted shares' blocks in one step; one segment always is one

Write = tuple[int, bytes]  # (offset in the share, what is to stand there)


class Recoding:
    """`numbers`: the shares whose blocks are wanted. code() every step, in order, then finish()."""

    def __init__(self, version: MutableVersion, numbers: Sequence[int]) -> None:
        self.header = version.header
        self.numbers = numbers
        self.roots: list[bytes] = []  # of all shares' block trees, by number; from finish() on
        self.trees: dict[int, bytes] = {}  # {wanted number: its block tree}, the same
        self._version = version
        self._encoder = Encoder(self.header.k, self.header.n)
        self._leaves = [bytearray(HASH_BYTES * self.header.num_segments) for _ in range(self.header.n)]
        self._share_tree: list[bytes] = []

    def steps(self) -> list[range]:
        """At least one; segment numbers."""
        count = self.header.num_segments
        block_bytes = self.header.salt_bytes + self.header.segmentation.block_size
        at_once = max(1, STEP_BYTES // (max(1, len(self.numbers)) * max(1, block_bytes)))
        return [range(first, min(first + at_once, count)) for first in range(0, max(1, count), at_once)]

    async def code(self, segments: range) -> dict[int, list[Write]]:
        """{wanted number: what it has for these segments}. Raises NotEnoughSharesError."""
        coded = await in_lanes(SEGMENTS_IN_FLIGHT, segments, self._code_segment)
        if not segments:
            return {number: [] for number in self.numbers}
        offset, _ = self.header.salt_and_block_range(segments[0])
        return {number: [(offset, b"".join(coded[segment][number] for segment in segments))] for number in self.numbers}

    async def _code_segment(self, segment: int) -> Mapping[int, bytes]:
        header = self.header
        salt, pieces = await self._version.get_pieces(segment)

        def encode() -> Mapping[int, bytes]:
            blocks = self._encoder.encode(pieces)
            at = HASH_BYTES * segment
            for number, block in enumerate(blocks):
                self._leaves[number][at : at + HASH_BYTES] = block_leaf(header, salt, block)
            before = b"" if header.format == "sdmf" else salt
            return {number: b"".join((before, blocks[number])) for number in self.numbers}

        return await run_cpu_work(encode, header.segmentation.segment_bytes(segment) * header.n // header.k)

    async def finish(self) -> None:
        """All steps were coded: make the trees."""

        def make_trees() -> None:
            for number, leaves in enumerate(self._leaves):
                tree = build_tree([bytes(leaves[at : at + HASH_BYTES]) for at in range(0, len(leaves), HASH_BYTES)])
                self.roots.append(tree[0])
                if number in self.numbers:
                    self.trees[number] = pack_hashes(tree)
            self._share_tree = build_tree(self.roots)

        await run_cpu_work(make_trees, 3 * HASH_BYTES * self.header.n * self.header.num_segments)

    @property
    def root_hash(self) -> bytes:
        return self._share_tree[0]

    def chain(self, number: int) -> dict[int, bytes]:
        """A share's share hash chain: {node: hash}."""
        return {node: self._share_tree[node] for node in needed_hashes(self.header.n, number)}

    def packed_chain(self, number: int) -> bytes:
        return pack_share_hashes(sorted(self.chain(number).items()))
