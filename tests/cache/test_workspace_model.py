"""Random operations on a workspace, servers failing now and then: what arrives is what a plain tree would hold."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from cache import Directory, Workspace
from grid.errors import GridError
from grid.formats.caps import Cap, DirectoryCap
from tests.cache.memory_client import QUICK, MemoryClient, mounted, put

NAMES = ["a", "b", "c", "d"]
STEPS = 120
SEEDS = 300 if os.environ.get("TAHOEFS_SOAK") else 8
DIRECTORIES_MAX = 8
OPERATIONS = [*["write"] * 3, *["change"] * 2, "mkdir", *["rename"] * 2, "unlink", "describe", "exchange"]

Tree = dict[str, Any]  # name -> bytes | Tree


class Twin:
    """The workspace and the model, changed alike."""

    def __init__(self, workspace: Workspace, rng: random.Random) -> None:
        self.workspace = workspace
        self.rng = rng
        self.model: Tree = {}
        self.made = 0

    def places(self) -> list[tuple[Directory, Tree]]:
        found = [(self.workspace.root, self.model)]
        for directory, tree in found:
            for name, child in tree.items():
                if isinstance(child, dict):
                    entry = directory.get(name)
                    assert entry is not None
                    found.append((self.workspace.directory(entry.target), child))
        return found

    async def step(self) -> None:
        directory, tree = self.rng.choice(self.places())
        name = self.rng.choice(NAMES)
        what = self.rng.choice(OPERATIONS)
        await self.workspace.load(directory)
        if what == "write" and not isinstance(tree.get(name), dict):
            data = self.rng.randbytes(self.rng.choice([3, 200, 3000]))
            await put(self.workspace, directory, name, data)
            tree[name] = data
        elif what == "change" and isinstance(tree.get(name), bytes):
            tree[name] = await self.change(directory, name, bytearray(tree[name]))
        elif what == "mkdir" and name not in tree and self.made < DIRECTORIES_MAX:
            self.made += 1
            await self.workspace.make_directory(directory, name, {})
            tree[name] = {}
        elif what == "unlink" and tree.get(name, {}) != {}:
            if isinstance(tree[name], bytes):
                await self.workspace.unlink(directory, name)
                del tree[name]
        elif what == "describe" and name in tree:
            await self.workspace.set_metadata(directory, name, {"v": self.rng.random()})
        elif what in ("rename", "exchange") and name in tree:
            other, other_tree = self.rng.choice(self.places())
            await self.workspace.load(other)
            await self.move(what, directory, tree, name, other, other_tree, self.rng.choice(NAMES))

    async def change(self, directory: Directory, name: str, data: bytearray) -> bytes:
        """Written over, lengthened, cut: laid over what may be on its way, or on the grid. Returns what it is now."""
        entry = directory.get(name)
        assert entry is not None
        contents = await self.workspace.new_contents(entry.target)
        try:
            for _ in range(self.rng.randrange(1, 4)):
                size = self.rng.choice([contents.size, self.rng.randrange(4000)])
                await contents.truncate(size)
                data = data[:size] + bytes(max(0, size - len(data)))
                offset, piece = self.rng.randrange(size + 50), self.rng.randbytes(self.rng.choice([1, 60, 900]))
                await contents.write(offset, piece)
                data += bytes(max(0, offset - len(data)))
                data[offset : offset + len(piece)] = piece
            await self.workspace.store(directory, name, contents, {}, over=entry.target)
        finally:
            contents.close()
        return bytes(data)

    async def move(
        self, what: str, src: Directory, tree: Tree, name: str, dst: Directory, dst_tree: Tree, dst_name: str
    ) -> None:
        if dst_tree is tree and dst_name == name:
            return
        if any(_holds(child, dst_tree) for child in (tree[name],)):
            return  # into itself: the kernel does not let that through
        there = dst_tree.get(dst_name)
        if what == "rename" and not isinstance(there, dict):
            await self.workspace.rename(src, name, dst, dst_name, {})
            dst_tree[dst_name] = tree.pop(name)
        elif what == "exchange" and there is not None and not _holds(there, tree):
            await self.workspace.exchange(src, name, dst, dst_name)
            tree[name], dst_tree[dst_name] = there, tree[name]


def _holds(tree: Any, inner: Tree) -> bool:
    return tree is inner or (isinstance(tree, dict) and any(_holds(child, inner) for child in tree.values()))


async def on_the_grid(client: MemoryClient, cap: Cap | None) -> Tree:
    found: Tree = {}
    for name, child in (await client.listing(cap)).items():
        found[name] = await on_the_grid(client, child) if isinstance(child, DirectoryCap) else await client.fetch(child)
    return found


async def disturb(client: MemoryClient, rng: random.Random) -> None:
    """Now and then all servers fail, for a moment, in the middle of whatever is under way."""
    while True:
        for _ in range(rng.randrange(200)):
            await trio.lowlevel.checkpoint()
        kind = rng.choice(["write", "close", "slot_writev", "slot_readv", "allocate_buckets", "*"])
        for server in client.servers:
            server.fail_on.add(kind)
        for _ in range(rng.randrange(50)):
            await trio.lowlevel.checkpoint()
        client.mend()


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_what_arrives_is_what_was_done(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    options = evolve(QUICK, publish_quiet_s=0.001, publish_latest_s=0.01, new_directory_latest_s=0.05)
    if seed % 3 == 0:  # nothing is read back from here, and often there is no room to fetch what is sent
        options = evolve(options, keep_bytes=0, journal_bytes=60_000)
    async with mounted(tmp_path, options) as (client, workspace):
        twin = Twin(workspace, rng)
        async with trio.open_nursery() as nursery:
            if seed % 2:
                nursery.start_soon(disturb, client, rng)
            for _ in range(STEPS):
                try:
                    await twin.step()
                except GridError:
                    continue  # a listing that could not be had; nothing was done
                if rng.random() < 0.1:
                    await trio.sleep(rng.random() * 0.05)
            nursery.cancel_scope.cancel()
        client.mend()
        await workspace.wait()
        assert await on_the_grid(client, workspace.root.cap) == twin.model
        status = workspace.status()
        assert status["pending"] == {"files": 0, "bytes": 0, "directories": 0}
        assert status["conflicts"] == 0 and status["errors"] == []
