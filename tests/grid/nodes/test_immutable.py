"""Nodes and snapshots of immutable files, over servers in memory."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from grid.errors import NotEnoughSharesError
from grid.formats.caps import LiteralCap
from grid.nodes.immutable import ImmutableFileNode, LiteralFileNode
from tests.grid.operations.grid import MemoryGrid, noise


class Target:
    """IDownloadTarget that writes down what happens to it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.data = b""
        self.cancel: Any = None

    def open(self, size: int) -> None:
        self.events.append(f"open {size}")

    async def write(self, data: bytes | memoryview) -> None:
        self.data += data
        if self.cancel is not None and len(self.data) > 1000:
            self.cancel()
            await trio.lowlevel.checkpoint()

    def close(self) -> None:
        self.events.append("close")

    def fail(self, why: Exception) -> None:
        self.events.append(f"fail {type(why).__name__}")

    def register_canceller(self, cb: Any) -> None:
        pass

    def finish(self) -> str:
        return "finished"


@pytest.mark.parametrize("size", [1, 55])
async def test_literal(size: int) -> None:
    data = noise(size)
    node = LiteralFileNode(LiteralCap(data))
    assert await node.download_to_data() == data
    assert (node.get_size(), node.is_readonly(), node.is_mutable()) == (size, True, False)
    assert (node.get_storage_index(), node.get_verifier()) == (None, None)
    snapshot = await node.open_snapshot()
    assert (snapshot.storage_index, snapshot.size, await snapshot.get_segment_size()) == (None, size, size)
    assert snapshot.decrypt(0, 0, await snapshot.get_segment(0)) == data
    assert data.hex() not in repr(snapshot) and repr(data) not in repr(snapshot)


async def test_empty_literal() -> None:
    node = LiteralFileNode(LiteralCap(b""))
    assert await node.download_to_data() == b""
    with pytest.raises(ValueError, match="no segment"):
        await (await node.open_snapshot()).get_segment(0)


@pytest.mark.parametrize("size", [56, 1000, 10_000])
async def test_chk(size: int) -> None:
    grid = MemoryGrid(10)
    data = noise(size)
    cap = await grid.upload(data, segment_size=1000)
    node = ImmutableFileNode(cap, grid.broker)
    assert await node.download_to_data() == data
    assert (node.get_size(), node.get_uri(), node.get_readonly_uri()) == (size, str(cap), str(cap))
    assert (node.get_storage_index(), node.get_verifier()) == (cap.storage_index, cap.verifier)
    target = Target()
    assert await node.download(target) == "finished"
    assert (target.events, target.data) == ([f"open {size}", "close"], data)


async def test_random_access_decrypts_at_the_right_place() -> None:
    grid = MemoryGrid(10)
    data = noise(10_000)
    snapshot = await ImmutableFileNode(await grid.upload(data, segment_size=999), grid.broker).open_snapshot()
    with pytest.raises(ValueError, match="not known"):
        snapshot.decrypt(0, 0, b"x")
    segment_size = await snapshot.get_segment_size()
    assert segment_size == 999
    for number in (7, 0, 10):
        segment = await snapshot.get_segment(number)
        start = number * segment_size
        assert snapshot.decrypt(number, 0, segment) == data[start : start + segment_size]
        assert snapshot.decrypt(number, 5, memoryview(segment)[5:9]) == data[start + 5 : start + 9]


async def test_cached_segments_are_decrypted_without_the_grid() -> None:
    grid = MemoryGrid(10)
    data = noise(3000)
    cap = await grid.upload(data, segment_size=999)
    segment = await (await ImmutableFileNode(cap, grid.broker).open_snapshot()).get_segment(1)
    later = await ImmutableFileNode(cap, MemoryGrid(0).broker).open_snapshot()
    later.remember_segment_size(999)
    assert await later.get_segment_size() == 999
    assert later.decrypt(1, 0, segment) == data[999:1998]


async def test_one_snapshot_for_all() -> None:
    grid = MemoryGrid(10)
    node = ImmutableFileNode(await grid.upload(noise(100)), grid.broker)
    assert await node.open_snapshot() is await node.open_snapshot()


async def test_a_failed_download_tells_its_target() -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(noise(5000), segment_size=1000)
    for server in grid.servers[:8]:
        server.connected = False
    target = Target()
    with pytest.raises(NotEnoughSharesError):
        await ImmutableFileNode(cap, grid.broker).download(target)
    assert target.events == ["open 5000", "fail NotEnoughSharesError"]


async def test_a_download_can_be_cancelled_by_its_target() -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(noise(50_000), segment_size=1000)
    target = Target()

    def keep(cancel: Any) -> None:
        target.cancel = cancel

    target.register_canceller = keep  # type: ignore[method-assign]
    assert await ImmutableFileNode(cap, grid.broker).download(target) is None
    assert "close" not in target.events
    assert len(target.data) < 50_000
