"""What is very large costs what is used of it: a file of 100 GiB, a directory of 20,000 names; and cheap walks."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import trio
from attrs import define, evolve

from cache import open_disk, open_workspace
from cache.blocks import BlockCache
from cache.directories import Directory
from cache.readahead import WINDOW_BYTES_MAX
from cache.snapshots import SnapshotContents
from grid.crypto import aes_ctr
from grid.formats.caps import CHKReadCap, parse_cap
from grid.formats.chk_share import ShareLayout, pack_share_hashes
from grid.formats.hashtree import build_tree
from grid.formats.hashutil import block_hash, crypttext_segment_hash
from grid.formats.segments import Segmentation
from grid.formats.ueb import URIExtension
from grid.nodes.immutable import ImmutableSnapshot
from tests.cache.memory_client import QUICK, memory_client
from tests.memory_server import MemoryBroker

HUGE_BYTES = 100 << 30
SEGMENT_BYTES = 1 << 20
PLACES = 40
ENTRIES = 20_000
DIRECTORIES, FILES = 100 if os.environ.get("TAHOEFS_SOAK") == "1" else 6, 100


@define
class RepeatedShare:
    """A share, 1-of-1, whose every block has the same bytes, made while it is read. Counts what is read."""

    head: bytes
    block: bytes
    data_size: int
    tail: dict[int, bytes]  # by offset
    served: int = 0

    def __getitem__(self, wanted: slice) -> bytes:
        start, stop = wanted.start, wanted.stop
        self.served += stop - start
        found = bytearray(stop - start)
        for offset, data in {0: self.head, **self.tail}.items():
            a, b = max(start, offset), min(stop, offset + len(data))
            if a < b:
                found[a - start : b - start] = data[a - offset : b - offset]
        a, b = max(start, len(self.head)), min(stop, len(self.head) + self.data_size)
        for position in range(a, b, SEGMENT_BYTES):
            place = (position - len(self.head)) % SEGMENT_BYTES
            piece = (self.block + self.block)[place : place + min(SEGMENT_BYTES, b - position)]
            found[position - start : position - start + len(piece)] = piece
        return bytes(found)


def _huge_file() -> tuple[CHKReadCap, RepeatedShare]:
    segmentation = Segmentation(HUGE_BYTES, 1, SEGMENT_BYTES)
    count = segmentation.num_segments
    block = random.Random(3).randbytes(SEGMENT_BYTES)
    blocks = build_tree([block_hash(block)] * count)
    crypttext = build_tree([crypttext_segment_hash(block)] * count)
    ueb = URIExtension(HUGE_BYTES, SEGMENT_BYTES, 1, 1, count, bytes(32), crypttext[0], blocks[0])
    packed = ueb.pack()
    layout = ShareLayout.for_upload(segmentation, 1, len(packed))
    tail = {
        layout.crypttext_hashes: b"".join(crypttext),
        layout.block_hashes: b"".join(blocks),
        layout.share_hashes: pack_share_hashes([(0, blocks[0])]),
        layout.ueb: layout.pack_ueb_size(len(packed)) + packed,
    }
    cap = CHKReadCap(bytes(range(16)), ueb.hash(), 1, 1, HUGE_BYTES)
    return cap, RepeatedShare(layout.pack_header(), block, HUGE_BYTES, tail)


async def test_scattered_reads_of_a_huge_file_touch_only_what_they_need(nursery: trio.Nursery) -> None:
    cap, share = _huge_file()
    broker = MemoryBroker(1)
    held: Any = {0: share}
    broker.servers[0].immutable[cap.storage_index] = held
    contents = SnapshotContents(cap, ImmutableSnapshot(cap, broker), BlockCache(nursery, 64 << 20))
    source = random.Random(4)
    for _ in range(PLACES):
        number, start = source.randrange(HUGE_BYTES // SEGMENT_BYTES), source.randrange(SEGMENT_BYTES - 5000)
        offset = number * SEGMENT_BYTES + start
        assert await contents.read(offset, 5000) == aes_ctr(cap.key, share.block[start : start + 5000], offset)
    hashes_bytes = 200 << 10  # a place: two paths in trees of 17 levels, and what stands near; and the UEB
    assert share.served <= PLACES * (SEGMENT_BYTES + hashes_bytes)
    served = share.served
    for offset in range(50 << 30, (50 << 30) + (8 << 20), 128 << 10):  # read on from somewhere
        await contents.read(offset, 128 << 10)
    ahead = WINDOW_BYTES_MAX // SEGMENT_BYTES  # at most, if the reader had to wait again and again
    assert share.served - served <= (8 + ahead) * (SEGMENT_BYTES + hashes_bytes)
    contents.close()


async def test_a_large_directory_is_not_quadratic(tmp_path: Path) -> None:
    """Ten times the names cost about ten times the CPU, not a hundred times: to list, to find, and from the disk."""
    async with memory_client() as (client, _):
        child = parse_cap("URI:LIT:krugkidfnzsc4")
        took: dict[int, float] = {}
        for count in (ENTRIES // 10, ENTRIES):
            children = {f"name {number}": (child, {"number": number}) for number in range(count)}
            cap = (await client.create_dirnode(children)).cap
            state = tmp_path / str(count)
            async with open_disk(state / "cache", 64 << 20) as disk:
                began = time.process_time()
                for _ in range(2):  # from the grid; from the disk
                    async with open_workspace(client, cap, state_dir=state, options=QUICK, disk=disk) as workspace:
                        await workspace.load(workspace.root)
                        assert len(workspace.root.entries()) == count
                        for number in range(0, count, 10):
                            entry = workspace.root.get(f"name {number}")
                            assert entry is not None and entry.metadata["number"] == number
                    for server in client.servers:
                        server.connected = not server.connected
                took[count] = time.process_time() - began
        assert took[ENTRIES] < 40 * took[ENTRIES // 10]


async def test_a_walk_costs_three_rounds_a_directory_and_none_again(tmp_path: Path) -> None:
    """As `ls -lR`: every server is asked at most three times for each directory; the second time nobody is."""
    async with memory_client() as (client, root):
        child = parse_cap("URI:LIT:krugkidfnzsc4")
        for directory in range(DIRECTORIES):
            children = {f"file{number}": (child, {}) for number in range(FILES)}
            node = await client.create_dirnode(children)
            await client.create_node_from_uri(root).set_caps([(f"folder{directory}", node.cap, None)])
        options = evolve(QUICK, poll_s=3600.0)
        async with open_workspace(client, root, state_dir=tmp_path, options=options) as workspace:
            for most in (3, 0):
                asked: list[Directory] = [workspace.root]
                while asked:
                    before = [server.calls.total() for server in client.servers]
                    await workspace.load(each := asked.pop(), options.poll_s)
                    after = [server.calls.total() for server in client.servers]
                    assert all(b - a <= most for a, b in zip(before, after, strict=True))
                    found = each.entries().values()
                    asked += [workspace.directory(entry.target) for entry in found if entry.name.startswith("folder")]
                    assert len(found) in (FILES, DIRECTORIES)
