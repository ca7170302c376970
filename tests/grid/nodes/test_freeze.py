"""Freezing a tree on servers in memory: what is uploaded, what is copied, what stays out, and that it never changes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from grid.errors import NotEnoughSharesError, WrongKindError
from grid.formats.caps import Cap, DirectoryCap, LiteralCap, UnknownCap
from grid.nodes.freeze import DEPTH_MAX, Freezer
from grid.nodes.nodemaker import NodeMaker
from grid.operations.retrieve import MutableVersion
from grid.operations.version_uploadable import SEGMENTS_AT_ONCE
from tests.grid.nodes.test_checker import upload
from tests.grid.nodes.test_dirnode import maker
from tests.grid.operations.grid import noise
from tests.memory_server import MemoryBroker

LIT = LiteralCap(b"lit")
METADATA = {"tahoe": {"linkmotime": 1.5}, "tahoefs": {"mode": 0o640}}


def freezer(nodes: NodeMaker) -> Freezer:
    return Freezer(nodes, b"convergence")


async def test_only_directories_are_uploaded() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    chk = await upload(nodes, 50_000)
    below = await nodes.create_dirnode({"file": (chk, METADATA), "lit": (LIT, {})})
    immutable = (await nodes.create_immutable_dirnode({"f": (chk, {})})).cap
    root = await nodes.create_dirnode(
        {"a": (below.cap, {"x": 1}), "twice": (below.cap.readonly, {}), "imm": (immutable, {}), "file": (chk, METADATA)}
    )
    sent = sum(server.bytes_written for server in broker.servers)
    work = freezer(nodes)
    cap = await work.freeze(root.cap.readonly)
    sent = sum(server.bytes_written for server in broker.servers) - sent
    results = work.results
    assert (results.directories, results.kept, results.copied, results.left_out) == (2, 4, [], [])
    assert sent < results.directories * 10 * 1000, "tables and hashes, no file"

    frozen = await nodes.create_from_cap(cap).read()
    assert cap.kind == "dir-chk" and not cap.is_mutable
    assert {name: entry.metadata for name, entry in frozen.entries.items()} == {
        name: entry.metadata for name, entry in (await root.read()).entries.items()
    }
    assert frozen.entries["a"].cap == frozen.entries["twice"].cap and frozen.entries["imm"].cap == immutable
    inner = await nodes.create_from_cap(frozen.entries["a"].cap).read()
    assert {name: entry.cap for name, entry in inner.entries.items()} == {"file": chk, "lit": LIT}
    await below.delete("file")
    await root.delete("a")
    again = await maker(broker).create_from_cap(cap).read()
    assert again.entries == frozen.entries
    assert "file" in (await maker(broker).create_from_cap(frozen.entries["a"].cap).read()).entries


async def test_freezing_twice_gives_the_same_cap_and_sends_nothing_new() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    root = await nodes.create_dirnode({f"f{n}": (await upload(nodes, 100, n), {}) for n in range(5)})
    first = await freezer(nodes).freeze(root.cap)
    before = sum(server.bytes_written for server in broker.servers)
    assert await freezer(nodes).freeze(root.cap) == first
    assert sum(server.bytes_written for server in broker.servers) == before


async def test_mutable_files_are_copied_as_they_are_now() -> None:
    nodes = maker(MemoryBroker(10))
    mutable = await nodes.create_mutable_file(noise(3000))
    root = await nodes.create_dirnode({"m": (mutable.cap, {}), "n": (mutable.cap.readonly, {})})
    work = freezer(nodes)
    cap = await work.freeze(root.cap)
    assert work.results.copied == [("m",), ("n",)] and work.results.copied_bytes == 3000
    await mutable.replace(b"changed")
    children = (await nodes.create_from_cap(cap).read()).entries
    assert await nodes.create_from_cap(children["m"].cap).download_to_data() == noise(3000)
    assert children["m"].cap == children["n"].cap


async def test_a_large_mutable_file_is_copied_a_few_segments_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And all of it from one version, though it is replaced in the middle."""
    broker = MemoryBroker(10)
    nodes = maker(broker)
    old, new = noise(25 * 131_073), noise(24 * 131_073, 1)
    mutable = await nodes.create_mutable_file(old, "mdmf")
    root = await nodes.create_dirnode({"m": (mutable.cap, {})})
    reads: list[int] = []
    read_segments = MutableVersion.read_segments

    async def watched(self: MutableVersion, numbers: Sequence[int]) -> bytes:
        reads.append(len(numbers))
        if len(reads) == 6:
            await maker(broker).create_from_cap(mutable.cap).replace(new)
        return await read_segments(self, numbers)

    monkeypatch.setattr(MutableVersion, "read_segments", watched)
    cap = await freezer(nodes).freeze(root.cap)
    monkeypatch.undo()
    child = (await nodes.create_from_cap(cap).read()).entries["m"].cap
    assert await nodes.create_from_cap(child).download_to_data() == new
    assert max(reads) <= SEGMENTS_AT_ONCE and len(reads) > 6


async def test_what_has_to_stay_out() -> None:
    nodes = maker(MemoryBroker(10))
    inner = await nodes.create_dirnode({"lit": (LIT, {})})
    root = await nodes.create_dirnode(
        {
            "inner": (inner.cap, {}),
            "future": (UnknownCap(None, "ro.lafs://x"), {}),
            "future immutable": (UnknownCap(None, "imm.lafs://x"), {}),
            "literal directory": (DirectoryCap(LiteralCap(b"")), {}),
        }
    )
    await inner.set_uri("up", root.get_uri())
    work = freezer(nodes)
    cap = await work.freeze(root.cap)
    assert sorted(path for path, _ in work.results.left_out) == [("future",), ("inner", "up")]
    assert set((await nodes.create_from_cap(cap).read()).entries) == {"inner", "future immutable", "literal directory"}


async def test_what_cannot_be_frozen() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    root = await nodes.create_dirnode({"lit": (LIT, {})})
    bad: tuple[Cap, ...] = (LIT, root.cap.verifier, await upload(nodes, 100))  # type: ignore[assignment]
    for cap in bad:
        with pytest.raises(WrongKindError):
            await freezer(nodes).freeze(cap)
    for server in broker.servers:
        server.slots.clear()
    with pytest.raises(NotEnoughSharesError):
        await freezer(maker(broker)).freeze(root.cap)
    empty = DirectoryCap(LiteralCap(b""))
    assert await freezer(nodes).freeze(empty) == empty
    assert DEPTH_MAX < 300, "one frame of the interpreter's stack each, and a few more"
