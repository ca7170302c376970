"""Reading one version of a mutable file, from any k good shares of it.

    MutableVersion.get_segment(i)
        block i of k shares  ── each verified: block tree, share hash chain, root hash (which is signed)
        decode, cut to size  ── ciphertext

Shares whose bytes the servermap brought already cost no round trip. A share that fails a check is reported and
another one taken; a server that shows no progress for STALL_S is helped out by another. When the known shares
run out, the map is made once more, thoroughly.

SDMF ciphertext is handed out as it is: its salt is in the header. An MDMF segment's salt stands beside its
block, so whoever keeps that ciphertext could not decrypt it without asking the grid again; MDMF segments are
therefore handed out encrypted with a salt that follows from version and segment number. No two plaintexts
share one: a version's root hash vouches for its contents.

Source: Tahoe-LAFS 1.20's mutable shares. Time limits are ours.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

import trio
from attrs import define, field

from grid import stats
from grid.crypto import aes_ctr
from grid.erasure import Buffer, Decoder
from grid.errors import (
    CorruptShareError,
    FormatError,
    NotEnoughSharesError,
    PeerError,
    PeerTimeoutError,
    ShareError,
)
from grid.formats import hashutil
from grid.formats.chk_share import unpack_hashes, unpack_share_hashes
from grid.formats.hashtree import IncompleteHashTree, needed_hashes, runs_of
from grid.formats.hashutil import HASH_BYTES
from grid.formats.mutable_share import MutableHeader, Range
from grid.formats.segments import div_ceil
from grid.operations.lanes import in_lanes
from grid.operations.servermap import BadShare, ServerMap, report_corrupt
from grid.operations.slot_share import FoundShare, ShareReplacedError
from grid.operations.worker import run_cpu_work

log = logging.getLogger(__name__)

SEGMENT_BYTES: Final = stats.counter("retrieve_bytes", "Verified bytes read from mutable files on the grid.")
SEGMENT_SECONDS: Final = stats.histogram("retrieve_seconds", "Seconds one segment of a mutable file took to come.")

STALL_S: Final = 1.0  # a share that brought nothing for so long gets a rival
LANE_TIMEOUT_S: Final = 15.0  # for one call to one server
CHUNK_BYTES: Final = 1 << 20  # of a long block, asked for in one call
CHUNKS_IN_FLIGHT: Final = 4  # per share
WHOLE_TREE_BYTES: Final = 16 << 10  # a block hash tree up to this size is fetched at once
NEAR_NODES: Final = 32  # of a larger one: nodes so close to each other are read together
SEGMENTS_IN_FLIGHT: Final = 4  # when a whole MDMF file is read

CACHE_TAG: Final = b"tahoefs_mutable_cache_v1"
_MDMF_TAG: Final = b"tahoefs_mdmf_segment_salt_v1"

Block = tuple[bytes, memoryview]  # salt and block


@define(eq=False)
class _Lane:
    """One share being asked for one block."""

    share: FoundShare
    progress_at: float
    has_rival: bool = field(default=False)


class MutableVersion:
    """IReadableSnapshot of one version. Segments are fetched and verified on demand, in any order.

    `remap` makes a fresh, thorough servermap: called at most once for a segment, when shares run out. `is_our_try`: it
    was published by who reads it now, and lost a race.
    """

    def __init__(
        self,
        servermap: ServerMap,
        header: MutableHeader,
        *,
        storage_index: bytes,
        readkey: bytes,
        remap: Callable[[], Awaitable[ServerMap]] | None = None,
        is_our_try: bool = False,
    ) -> None:
        self.servermap = servermap
        self.header = header
        self.is_our_try = is_our_try
        self._storage_index = storage_index
        self._readkey = readkey
        self._remap = remap
        self._shares = servermap.shares_of(header)
        self._share_tree = IncompleteHashTree(header.n, header.root_hash)
        self._block_trees: dict[int, IncompleteHashTree] = {}  # share number: its tree, the root known
        self._slow: set[str] = set()  # server ids that stalled

    @property
    def storage_index(self) -> bytes:
        return self._storage_index

    @property
    def cache_secret(self) -> bytes:
        return hashutil.tagged_hash(CACHE_TAG, self._readkey)

    @property
    def version(self) -> bytes:
        return version_of(self.header)

    @property
    def size(self) -> int:
        return self.header.data_size

    @property
    def num_segments(self) -> int:
        return self.header.num_segments

    async def get_segment_size(self) -> int:
        """Bytes; at least 1, also for an empty file."""
        await trio.lowlevel.checkpoint()
        return self.header.segment_size or 1

    def remember_segment_size(self, segment_size: int) -> None:
        """The header told already."""

    async def get_segment(self, number: int) -> bytes:
        """One verified ciphertext segment. Raises NotEnoughSharesError."""
        header = self.header
        size = header.segmentation.segment_bytes(number)
        salt, blocks = await self._get_blocks(number)

        def decode() -> bytes:
            ciphertext = b"".join(self._decode(blocks))[:size]
            if header.format == "sdmf":
                return ciphertext
            plaintext = aes_ctr(hashutil.datakey(salt, self._readkey), ciphertext)
            return aes_ctr(self._key(number), plaintext)

        return await run_cpu_work(decode, size)

    async def get_pieces(self, number: int) -> tuple[bytes, Sequence[Buffer]]:
        """One segment as it was coded: its salt, and its verified ciphertext in k pieces with the padding.

        Raises NotEnoughSharesError.
        """
        salt, blocks = await self._get_blocks(number)
        return salt, await run_cpu_work(lambda: self._decode(blocks), self.header.segmentation.segment_bytes(number))

    def _decode(self, blocks: Mapping[int, memoryview]) -> Sequence[Buffer]:
        """CPU-bound."""
        numbers = sorted(blocks)[: self.header.k]  # lanes that end together may bring more
        return Decoder(self.header.k, self.header.n).decode([blocks[number] for number in numbers], numbers)

    def decrypt(self, segment: int, offset: int, data: bytes | memoryview) -> bytes:
        return aes_ctr(self._key(segment), data, offset)

    def _key(self, segment: int) -> bytes:
        if self.header.format == "sdmf":
            salt = self.header.salt
        else:
            salt = hashutil.tagged_hash(_MDMF_TAG, self.version + segment.to_bytes(8, "big"))[:16]
        return hashutil.datakey(salt, self._readkey)

    async def read_all(self) -> bytes:
        """The whole plaintext. Raises NotEnoughSharesError."""
        return await self.read_start(self.size)

    async def read_start(self, size: int) -> bytes:
        """The first `size` bytes of it, or all if it has fewer. Raises NotEnoughSharesError."""
        count = min(div_ceil(size, self.header.segment_size), self.num_segments) if self.size else 0
        return (await self.read_segments(range(count)))[:size]

    async def read_segments(self, numbers: Sequence[int]) -> bytes:
        """The plaintext of several segments, joined. Raises NotEnoughSharesError."""
        if len(numbers) == 1:
            return await self.read_segment(numbers[0])
        found = await in_lanes(SEGMENTS_IN_FLIGHT, numbers, self.read_segment)
        return b"".join(found[number] for number in numbers)

    async def read_segment(self, number: int) -> bytes:
        """One segment's plaintext. Raises NotEnoughSharesError."""
        ciphertext = await self.get_segment(number)
        return await run_cpu_work(lambda: self.decrypt(number, 0, ciphertext), len(ciphertext))

    # --- blocks from shares

    async def _get_blocks(self, segment: int) -> tuple[bytes, dict[int, memoryview]]:
        """Its salt, and k verified blocks or a few more. Raises NotEnoughSharesError."""
        began = trio.current_time()
        blocks: dict[int, Block] = {}
        failures: list[Exception] = []
        tried: set[FoundShare] = set()
        await self._race(segment, blocks, failures, tried)
        if len(blocks) < self.header.k and self._remap is not None:
            log.info("too few good shares of a mutable file: mapping it again")
            self.servermap = await self._remap()
            self._shares = self.servermap.shares_of(self.header)
            await self._race(segment, blocks, failures, tried)
        if len(blocks) < self.header.k:
            raise NotEnoughSharesError(self.header.k, len(blocks), tuple(failures))
        SEGMENT_BYTES.add(self.header.segmentation.segment_bytes(segment))
        SEGMENT_SECONDS.observe(trio.current_time() - began)
        salt = next(iter(blocks.values()))[0]
        return salt, {number: block for number, (_, block) in blocks.items()}

    def _candidates(self, segment: int, blocks: Iterable[int]) -> deque[FoundShare]:
        """Best first: those at hand, then different numbers on different servers, low numbers first."""
        wanted = [self.header.salt_and_block_range(segment)]
        have = set(blocks)
        shares = [share for share in self._shares if share.number not in have]
        shares.sort(key=lambda share: (share.server.server_id in self._slow, not share.has(wanted), share.number))
        copies: Counter[int] = Counter()
        loads: Counter[str] = Counter()
        ranked: list[tuple[tuple[bool, int, bool, int], FoundShare]] = []
        for share in shares:
            rank = (
                share.server.server_id in self._slow,
                copies[share.number],
                not share.has(wanted),
                loads[share.server.server_id],
            )
            copies[share.number] += 1
            loads[share.server.server_id] += 1
            ranked.append((rank, share))
        return deque(share for _, share in sorted(ranked, key=lambda item: item[0]))

    async def _race(
        self, segment: int, blocks: dict[int, Block], failures: list[Exception], tried: set[FoundShare]
    ) -> None:
        """Add verified blocks to `blocks` until there are k, or no share is left that was not `tried`."""
        unasked = self._candidates(segment, blocks)
        bad: list[BadShare] = []
        lanes: list[_Lane] = []
        send, receive = trio.open_memory_channel[_Lane](len(unasked) or 1)

        async def run_lane(lane: _Lane) -> None:
            share = lane.share
            try:
                blocks.setdefault(share.number, await self._read_block(lane, segment))
            except CorruptShareError as error:
                failures.append(error)
                self.servermap.mark_bad(share, error)
                self._shares = [other for other in self._shares if other is not share]
                bad.append(BadShare(share.server, share.number, b"", error))
            except ShareReplacedError as error:
                failures.append(error)
                self._shares = [other for other in self._shares if other is not share]
            except (PeerError, ShareError) as error:
                failures.append(error)
                self._slow.add(share.server.server_id)
            send.send_nowait(lane)

        def start_one() -> None:
            while unasked:
                share = unasked.popleft()
                if share.number in blocks or share in tried:
                    continue
                tried.add(share)
                lane = _Lane(share, trio.current_time())
                lanes.append(lane)
                nursery.start_soon(run_lane, lane)
                return

        async with trio.open_nursery() as nursery:
            for _ in range(self.header.k - len(blocks)):
                start_one()
            while lanes and len(blocks) < self.header.k:
                waits = [lane.progress_at + STALL_S for lane in lanes if not lane.has_rival]
                with trio.move_on_at(min(waits, default=float("inf"))):
                    ended = await receive.receive()
                    lanes.remove(ended)
                    if ended.share.number not in blocks and not ended.has_rival:
                        start_one()
                for lane in lanes:
                    if not lane.has_rival and trio.current_time() >= lane.progress_at + STALL_S:
                        lane.has_rival = True
                        self._slow.add(lane.share.server.server_id)
                        start_one()
            nursery.cancel_scope.cancel()
        await report_corrupt(self.servermap.reports, self._storage_index, bad)

    async def _read_block(self, lane: _Lane, segment: int) -> Block:
        """Salt and verified block. Raises CorruptShareError, PeerError."""
        share, header = lane.share, self.header
        nodes = self._nodes_to_read(share.number, segment)
        parts = [header.salt_and_block_range(segment)]
        if share.number not in self._block_trees:
            parts.append(header.offsets.share_hash_chain)
        ranges = tree_ranges(header, nodes)
        data, *rest = await self._read_parts(lane, [*parts, *ranges])
        chain = rest.pop(0) if len(rest) > len(ranges) else None
        hashes = tree_nodes(header, nodes, ranges, rest)
        try:
            salt, block = header.split_salt_and_block(segment, data)
            leaf = await run_cpu_work(lambda: block_leaf(header, salt, block), len(block))
            self._verify(share.number, segment, leaf, hashes, chain)
        except FormatError as error:
            raise share.corrupt(str(error)) from None
        return salt, block

    def _nodes_to_read(self, number: int, segment: int) -> Sequence[int]:
        """Block tree nodes, ascending; with the root, if the share's tree is not known yet."""
        tree = self._block_trees.get(number)
        if tree is not None:
            return sorted(tree.needed_hashes(segment))
        if self.header.block_hash_tree_range[1] <= WHOLE_TREE_BYTES:
            return range(self.header.block_hash_tree_range[1] // HASH_BYTES)
        return sorted({0, *needed_hashes(self.num_segments, segment)})

    def _verify(self, number: int, segment: int, leaf: bytes, hashes: dict[int, bytes], chain: bytes | None) -> None:
        """Raises FormatError unless the block's hash leads to the root hash. Remembers the hashes if it does."""
        tree = self._block_trees.get(number)
        if tree is None:
            if chain is None:
                raise FormatError("no share hash chain")
            self._share_tree.set_hashes(unpack_share_hashes(chain), leaves={number: hashes[0]})
            tree = IncompleteHashTree(self.num_segments, hashes[0])
        tree.set_hashes(hashes, leaves={segment: leaf})
        self._block_trees[number] = tree

    async def _read_parts(self, lane: _Lane, parts: list[Range]) -> list[bytes]:
        """share.read(), with the first part in chunks if it is long, so that progress can be seen."""
        offset, length = parts[0]
        if length <= CHUNK_BYTES or lane.share.has(parts):
            return await self._read_noting(lane, parts)
        chunks = [(at, min(CHUNK_BYTES, offset + length - at)) for at in range(offset, offset + length, CHUNK_BYTES)]
        first, *rest = await self._read_noting(lane, [chunks[0], *parts[1:]])

        async def fetch(chunk: Range) -> bytes:
            return (await self._read_noting(lane, [chunk]))[0]

        found = await in_lanes(CHUNKS_IN_FLIGHT, chunks[1:], fetch)
        return [b"".join((first, *(found[chunk] for chunk in chunks[1:]))), *rest]

    async def _read_noting(self, lane: _Lane, parts: list[Range]) -> list[bytes]:
        try:
            with trio.fail_after(LANE_TIMEOUT_S):
                found = await lane.share.read(parts)
        except trio.TooSlowError:
            raise PeerTimeoutError(f"{lane.share.server.name}: share {lane.share.number} came too slowly") from None
        lane.progress_at = trio.current_time()
        return found


def block_leaf(header: MutableHeader, salt: bytes, block: Buffer) -> bytes:
    """What stands for a block in its share's block hash tree."""
    return hashutil.block_hash(block) if header.format == "sdmf" else hashutil.salted_block_hash(salt, block)


def tree_ranges(header: MutableHeader, nodes: Sequence[int]) -> list[Range]:
    """Where these nodes (ascending) of a share's block hash tree stand; near ones are read together."""
    tree_at = header.offsets.block_hash_tree[0]
    return [(tree_at + HASH_BYTES * first, HASH_BYTES * count) for first, count in runs_of(nodes, NEAR_NODES)]


def tree_nodes(
    header: MutableHeader, nodes: Sequence[int], ranges: Sequence[Range], found: Sequence[bytes]
) -> dict[int, bytes]:
    """{node: hash} of what was read at `tree_ranges`."""
    tree_at = header.offsets.block_hash_tree[0]
    hashes = {
        (offset - tree_at) // HASH_BYTES + index: node_hash
        for (offset, _), data in zip(ranges, found, strict=True)
        for index, node_hash in enumerate(unpack_hashes(data))
    }
    return {node: hashes[node] for node in nodes}


def version_of(header: MutableHeader) -> bytes:
    """What tells a version from all others of its file: seqnum (8 bytes) and root hash (32)."""
    return header.seqnum.to_bytes(8, "big") + header.root_hash
