"""Uploads to servers in memory: placement, round trips, servers that fail, hang or are full, cancellation."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing
from attrs import define, field

from grid.errors import NotEnoughServersError
from grid.formats.caps import CHKReadCap
from grid.operations import share_writer, upload
from grid.operations.happiness import happiness
from grid.operations.placement import SUSPECT_S
from grid.operations.push import LAG_SEGMENTS_MAX
from tests.grid.operations.grid import MemoryGrid, noise, uploadable

SMALL = noise(5000)
LARGE = noise(4 << 20)  # shares above 1 MiB, four segments and a tail


async def test_share_i_goes_to_permuted_server_i() -> None:
    grid = MemoryGrid(12)
    cap = await grid.upload(SMALL)
    for number, server in enumerate(grid.permuted(cap.storage_index)[:10]):
        assert list(server.immutable[cap.storage_index]) == [number]
    assert sum(bool(server.immutable) for server in grid.servers) == 10


async def test_a_small_file_costs_three_calls_a_server() -> None:
    grid = MemoryGrid(10)
    await grid.upload(SMALL)
    for server in grid.servers:
        assert server.calls == {"allocate_buckets": 1, "write": 1, "close": 1}


async def test_blocks_of_a_large_file_are_written_a_megabyte_at_a_time() -> None:
    grid = MemoryGrid(10)
    await grid.upload(LARGE, segment_size=1 << 17)  # 33 blocks of 43 kB
    for server in grid.servers:
        assert server.calls["write"] == 2


async def test_every_server_is_told_its_own_lease_secret() -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(SMALL)
    assert len({renew for server in grid.servers for renew in server.leases[cap.storage_index]}) == 10


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_a_stored_file_is_not_sent_again(data: bytes) -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(data)
    for server in grid.servers:
        server.bytes_written = 0
        server.leases.clear()
    results = await grid.uploader.upload(uploadable(data))
    assert results.cap == cap
    assert (results.pushed_shares, results.preexisting_shares) == (0, 10)
    assert sum(server.bytes_written for server in grid.servers) == 0
    assert all(server.leases[cap.storage_index] for server in grid.servers)
    grid.assert_nothing_left()


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_shares_lying_elsewhere_are_recognised(data: bytes) -> None:
    """As the real client leaves them: anywhere among the servers."""
    grid = MemoryGrid(10)
    cap = await grid.upload(data)
    held = [server.immutable[cap.storage_index] for server in grid.servers]
    for server, shares in zip(grid.servers, [*held[3:], *held[:3]], strict=True):
        server.immutable[cap.storage_index] = shares
        server.bytes_written = 0
    results = await grid.uploader.upload(uploadable(data))
    assert results.pushed_shares == 0
    assert sum(server.bytes_written for server in grid.servers) == 0
    grid.assert_nothing_left()


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_only_what_is_missing_is_sent(data: bytes) -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(data)
    for number in (2, 7):
        for server in grid.holders(cap.storage_index)[number]:
            del server.immutable[cap.storage_index]
    results = await grid.uploader.upload(uploadable(data))
    assert (results.pushed_shares, results.preexisting_shares) == (2, 8)
    assert sorted(grid.shares(cap.storage_index)) == list(range(10))


@pytest.mark.parametrize("servers", [1, 4, 7, 10, 30])
async def test_all_shares_are_placed_and_spread(servers: int) -> None:
    grid = MemoryGrid(servers)
    results = await grid.uploader.upload(uploadable(SMALL, happy=1))
    assert sorted(results.sharemap) == list(range(10))
    assert happiness({number: set(ids) for number, ids in results.sharemap.items()}) == min(servers, 10)
    held = grid.holders(results.cap.storage_index or b"")
    assert {number: {s.server_id for s in where} for number, where in held.items()} == results.sharemap


@pytest.mark.parametrize("kind", ["allocate_buckets", "write", "close"])
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_three_failing_servers_of_ten_are_survived(data: bytes, kind: str) -> None:
    grid = MemoryGrid(10)
    for server in grid.servers[:3]:
        server.fail_on.add(kind)
    cap = await grid.upload(data)
    grid.assert_nothing_left()
    stored = grid.holders(cap.storage_index)
    assert happiness({number: {s.server_id for s in where} for number, where in stored.items()}) == 7
    if kind == "allocate_buckets":  # in time to place its share elsewhere
        assert sorted(stored) == list(range(10))


@pytest.mark.parametrize("kind", ["allocate_buckets", "write", "close"])
@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_four_failing_servers_of_ten_are_too_many(data: bytes, kind: str) -> None:
    grid = MemoryGrid(10)
    for server in grid.servers[:4]:
        server.fail_on.add(kind)
    with pytest.raises(NotEnoughServersError) as caught:
        await grid.upload(data)
    assert (caught.value.happy, caught.value.reached) == (7, 6)
    assert not caught.value.refused_for_space
    grid.assert_nothing_left()


@define
class Progress:
    """IUploadProgress that keeps what it is told."""

    begun: list[tuple[int, int, int]] = field(factory=list)
    pushed_bytes: int = 0
    shares: int = 0

    def begin(self, placed: int, total: int, push_bytes: int) -> None:
        assert (self.pushed_bytes, self.shares) == (0, 0)
        self.begun.append((placed, total, push_bytes))

    def pushed(self, count: int) -> None:
        assert self.begun
        self.pushed_bytes += count

    def placed(self) -> None:
        self.shares += 1


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_progress_is_told(data: bytes) -> None:
    grid, first, second, third = MemoryGrid(10), Progress(), Progress(), Progress()
    cap = (await grid.uploader.upload(uploadable(data), first)).cap
    assert isinstance(cap, CHKReadCap)
    blocks = first.pushed_bytes
    assert (first.begun, first.shares) == ([(0, 10, blocks)], 10)
    assert blocks % 10 == 0 and len(data) <= blocks * 3 // 10 < len(data) + 20  # rounded up in each segment
    for number in (2, 7):
        for server in grid.holders(cap.storage_index)[number]:
            del server.immutable[cap.storage_index]
    await grid.uploader.upload(uploadable(data), second)
    assert (second.begun, second.pushed_bytes, second.shares) == ([(8, 10, blocks // 5)], blocks // 5, 2)
    for server in grid.servers[:2]:
        server.immutable.clear()
        server.fail_on.add("close")
    await grid.uploader.upload(uploadable(data), third)
    assert (third.begun, third.shares) == ([(8, 10, blocks // 5)], 0)  # what did not get there is not placed


async def test_a_server_lost_half_way_through_a_large_file() -> None:
    grid = MemoryGrid(10)
    grid.servers[5].fail_after["write"] = 1
    cap = await grid.upload(LARGE)
    assert len(grid.shares(cap.storage_index)) == 9
    grid.assert_nothing_left()


async def test_full_servers_are_replaced_by_further_ones() -> None:
    grid = MemoryGrid(15)
    for server in grid.servers[:5]:
        server.full = True
    cap = await grid.upload(SMALL)
    assert sorted(grid.shares(cap.storage_index)) == list(range(10))
    assert not any(server.immutable for server in grid.servers[:5])


@pytest.mark.parametrize("fault", ["full", "readonly"])
async def test_no_space_says_so(fault: str) -> None:
    grid = MemoryGrid(10)
    for server in grid.servers[:4]:
        setattr(server, fault, True)
    with pytest.raises(NotEnoughServersError) as caught:
        await grid.upload(SMALL)
    assert caught.value.refused_for_space
    grid.assert_nothing_left()


async def test_too_few_servers_is_not_a_matter_of_space() -> None:
    grid = MemoryGrid(6)
    grid.servers[0].full = True
    with pytest.raises(NotEnoughServersError) as caught:
        await grid.upload(SMALL)
    assert (caught.value.connected, caught.value.refused_for_space) == (6, False)
    assert "6 servers" in str(caught.value)


async def test_shares_on_read_only_servers_count() -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(SMALL)
    for server in grid.servers:
        server.readonly = True
    results = await grid.uploader.upload(uploadable(SMALL))
    assert (results.cap, results.pushed_shares) == (cap, 0)


async def test_servers_no_grid_manager_certifies_get_nothing() -> None:
    grid = MemoryGrid(10)
    grid.broker.forbidden = {server.server_id for server in grid.servers[:3]}
    await grid.upload(SMALL)
    assert not any(server.calls for server in grid.servers[:3])


@pytest.mark.parametrize("kind", ["get_buckets", "allocate_buckets", "write", "close"])
async def test_hanging_servers_are_dropped(
    kind: str, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small enough to be encoded without a thread, during which the clock would jump; asked for like a large file.
    monkeypatch.setattr(upload, "SMALL_SHARE_BYTES_MAX", 0)
    grid = MemoryGrid(10)
    for server in grid.servers[:3]:
        server.hang_on.add(kind)
    began = trio.current_time()
    cap = await grid.upload(noise(20_000))
    assert trio.current_time() - began < 30
    assert len(grid.holders(cap.storage_index)) >= 7
    for server in grid.servers[3:]:
        assert server.immutable[cap.storage_index]


@pytest.mark.parametrize("kind", ["allocate_buckets", "close"])
async def test_a_server_that_hung_is_left_out_next_time(kind: str, autojump_clock: trio.testing.MockClock) -> None:
    grid = MemoryGrid(10)
    grid.servers[0].hang_on.add(kind)
    await grid.upload(noise(100))
    began = trio.current_time()
    for seed in range(1, 5):
        cap = await grid.upload(noise(100, seed))
        assert sorted(grid.shares(cap.storage_index)) == list(range(10))
    assert trio.current_time() - began < 1
    grid.servers[0].hang_on.clear()
    await trio.sleep(SUSPECT_S)
    await grid.upload(noise(100, 5))
    assert len(grid.servers[0].immutable) == 1


async def test_a_server_that_hung_is_asked_when_there_are_too_few_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    grid = MemoryGrid(7)
    grid.servers[0].hang_on.add("allocate_buckets")
    with pytest.raises(NotEnoughServersError):
        await grid.upload(noise(100))
    grid.servers[0].hang_on.clear()
    await grid.upload(noise(100))


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_cancelling_leaves_nothing_behind(data: bytes) -> None:
    grid = MemoryGrid(10)
    stuck = grid.servers[4]
    stuck.hang_on.add("close")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(grid.upload, data)
        while not stuck.calls["close"]:
            await trio.lowlevel.checkpoint()
        assert any(server.incoming for server in grid.servers)
        nursery.cancel_scope.cancel()
    grid.assert_nothing_left()


async def test_the_same_contents_twice_at_once() -> None:
    """A server refuses a share that is on its way already: that must not look like a lack of space."""
    grid = MemoryGrid(10)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(grid.upload, SMALL)
    assert sum(server.calls["write"] for server in grid.servers) == 10


async def test_one_slow_server_lets_the_others_run_ahead_but_not_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one server stuck in its first write, the others get a few segments more and no further."""
    monkeypatch.setattr(share_writer, "WRITE_BYTES", 1)
    grid = MemoryGrid(10)
    stuck, others = grid.servers[0], grid.servers[1:]
    stuck.hang_on.add("write")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(grid.upload, noise(200_000), segment_size=3000))
        while min(server.calls["write"] for server in others) < LAG_SEGMENTS_MAX + 1:
            await trio.lowlevel.checkpoint()
        for _ in range(100):
            await trio.lowlevel.checkpoint()
        assert max(server.calls["write"] for server in others) <= LAG_SEGMENTS_MAX + 2
        nursery.cancel_scope.cancel()
    grid.assert_nothing_left()


async def test_a_literal_needs_no_server() -> None:
    results = await MemoryGrid(0).uploader.upload(uploadable(b"x" * 55))
    assert results.uri.startswith("URI:LIT:")


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_shares_that_cannot_be_count_for_nothing(data: bytes) -> None:
    grid = MemoryGrid(10)
    cap = await upload.chk_cap_of(uploadable(data))
    assert cap.storage_index is not None
    for server in grid.servers:
        server.immutable[cap.storage_index] = {number: bytearray(b"x") for number in (*range(-9, 0), 10)}
    results = await grid.uploader.upload(uploadable(data))
    assert set(results.sharemap) == set(range(10))
    assert (results.pushed_shares, results.preexisting_shares) == (10, 0)
