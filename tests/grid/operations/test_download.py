"""Downloads from servers in memory: right bytes or an error, whatever is corrupt, missing, slow or hanging."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grid.crypto import aes_ctr
from grid.errors import InconsistentEncodingError, NotEnoughSharesError, PeerError, ShareError
from grid.formats.caps import CHKReadCap, parse_known_cap
from grid.formats.chk_share import ShareLayout
from grid.formats.hashtree import IncompleteHashTree
from grid.operations import share_reader
from grid.operations.download import ImmutableDownload
from grid.operations.responsiveness import Responsiveness
from tests.grid.operations.grid import MemoryGrid, noise
from tests.memory_server import MemoryServer
from tests.vectors import expand, section

DATA = noise(5000)


async def read_all(download: ImmutableDownload, cap: CHKReadCap) -> bytes:
    segment_size = await download.get_segment_size()
    count = -(-cap.size // segment_size)
    return aes_ctr(cap.key, b"".join([await download.get_segment(number) for number in range(count)]))


def put(grid: MemoryGrid, cap: CHKReadCap, number: int, share: bytes) -> None:
    grid.servers[number % len(grid.servers)].immutable.setdefault(cap.storage_index, {})[number] = bytearray(share)


@pytest.fixture(params=["whole", "in parts"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of reading a share, with small files."""
    if request.param == "in parts":
        monkeypatch.setattr(share_reader, "WHOLE_SHARE_BYTES_MAX", 0)
    return str(request.param)


@pytest.mark.parametrize(
    "vector",
    [v for v in section("formats.json", "chk") if len(v.get("shares", ())) >= v["k"]],
    ids=lambda vector: vector["name"],
)
async def test_reads_tahoes_shares(vector: dict[str, Any], reading: str) -> None:
    cap = parse_known_cap(vector["readcap"])
    assert isinstance(cap, CHKReadCap)
    grid = MemoryGrid(vector["n"])
    for number, pointer in vector["shares"].items():
        put(grid, cap, int(number), expand(pointer))
    assert await read_all(grid.download(cap), cap) == expand(vector["plaintext"])


@pytest.mark.parametrize(("k", "n"), [(1, 1), (1, 4), (2, 3), (3, 10), (7, 12)])
@pytest.mark.parametrize("size", [56, 999, 1000, 1001, 8000, 8001])
async def test_what_is_uploaded_comes_back(k: int, n: int, size: int, reading: str) -> None:
    grid = MemoryGrid(n)
    data = noise(size)
    cap = await grid.upload(data, k=k, happy=1, n=n, segment_size=1000)
    assert await read_all(grid.download(cap), cap) == data


async def test_a_file_of_several_full_segments() -> None:
    grid = MemoryGrid(10)
    data = noise((2 << 20) + 77)
    cap = await grid.upload(data)
    download = grid.download(cap)
    last = await download.get_segment(2)  # first of all, out of order
    assert await read_all(download, cap) == data
    assert aes_ctr(cap.key, last, 2 * await download.get_segment_size()) == data[-len(last) :]


async def test_a_large_hash_tree_is_read_node_by_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share_reader, "WHOLE_TREE_BYTES_MAX", 0)
    monkeypatch.setattr(share_reader, "WHOLE_SHARE_BYTES_MAX", 0)
    monkeypatch.setattr(share_reader, "TAIL_BYTES_MAX", 0)
    grid = MemoryGrid(10)
    data = noise(60_000)
    cap = await grid.upload(data, segment_size=300)
    download = grid.download(cap)
    await download.get_segment(157)
    assert await read_all(download, cap) == data


async def test_a_small_file_costs_one_read_a_share(mock_clock: trio.testing.MockClock) -> None:
    """No time passes, so that nobody is late and asked twice."""
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA)
    await read_all(grid.download(cap), cap)
    assert sum(server.calls["read"] for server in grid.servers) == 3


async def test_a_large_share_is_opened_in_one_round_trip(autojump_clock: trio.testing.MockClock, reading: str) -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA)
    for server in grid.servers:
        server.latency_s = 0.1
    began = trio.current_time()
    await grid.download(cap).get_segment(0)
    assert trio.current_time() - began == pytest.approx(0.2)  # who holds what; the shares


async def test_segments_are_read_side_by_side(autojump_clock: trio.testing.MockClock) -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(noise(100_000), segment_size=10_000)
    download = grid.download(cap)
    await download.get_segment(0)
    for server in grid.servers:
        server.latency_s = 0.1
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(1, 9):
            nursery.start_soon(download.get_segment, number)
    assert trio.current_time() - began < 0.5


async def test_no_such_segment() -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA, segment_size=1000)
    with pytest.raises(ValueError, match="no segment 5"):
        await grid.download(cap).get_segment(5)
    with pytest.raises(ValueError, match="no segment -1"):
        await grid.download(cap).get_segment(-1)


# --- where shares are


async def test_shares_far_down_the_list_are_found() -> None:
    grid = MemoryGrid(40)
    cap = await grid.upload(DATA)
    order = grid.permuted(cap.storage_index)
    for number in range(10):
        order[39 - number].immutable = order[number].immutable
        order[number].immutable = {}
    assert await read_all(grid.download(cap), cap) == DATA


@pytest.mark.parametrize("servers", [1, 2])
async def test_several_shares_on_one_server(servers: int) -> None:
    grid = MemoryGrid(servers)
    cap = await grid.upload(DATA, happy=1)
    assert await read_all(grid.download(cap), cap) == DATA


async def test_different_servers_come_first() -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA)
    everything = grid.shares(cap.storage_index)
    for server in grid.servers[:4]:
        server.immutable[cap.storage_index] = {number: bytearray(share) for number, share in everything.items()}
    await read_all(grid.download(cap), cap)
    assert max(server.calls["read"] for server in grid.servers) == 1


async def test_too_few_shares() -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA)
    for server in grid.permuted(cap.storage_index)[2:9]:
        server.immutable.clear()
    assert await read_all(grid.download(cap), cap) == DATA
    grid.permuted(cap.storage_index)[9].fail_on.add("read")
    with pytest.raises(NotEnoughSharesError) as caught:
        await grid.download(cap).get_segment(0)
    assert (caught.value.needed, caught.value.found) == (3, 2)
    assert any(isinstance(failure, PeerError) for failure in caught.value.failures)


async def test_nobody_there() -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA)
    for server in grid.servers:
        server.connected = False
    download = grid.download(cap)
    with pytest.raises(NotEnoughSharesError):
        await download.get_segment_size()
    for server in grid.servers:  # and back: the same object finds them
        server.connected = True
    assert await read_all(download, cap) == DATA


async def test_lost_connections_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share_reader, "WHOLE_SHARE_BYTES_MAX", 0)  # or nothing more need be read
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA, segment_size=1000)
    download = grid.download(cap)
    await download.get_segment(0)
    order = grid.permuted(cap.storage_index)
    for server in order:
        server.connected = False
    with pytest.raises(NotEnoughSharesError):
        await download.get_segment(1)
    for server in order[4:7]:
        server.connected = True
    assert await read_all(download, cap) == DATA


# --- corruption: right bytes or an error, never wrong bytes


async def stored(segment_size: int = 1000) -> tuple[MemoryGrid, CHKReadCap]:
    grid = MemoryGrid(10)
    return grid, await grid.upload(DATA, segment_size=segment_size)


def fields(share: bytes) -> dict[str, int]:
    """An offset inside each part of a share."""
    layout = ShareLayout.parse(share)
    header = {"version": 3, "block size": 6, "data size": 10, "data offset": 15, "plaintext hashes offset": 19}
    header |= {"crypttext hashes offset": 23, "block hashes offset": 27, "share hashes offset": 31, "UEB offset": 35}
    return header | {
        "first block": layout.data,
        "last block": layout.plaintext_hashes - 1,
        "plaintext hashes": layout.plaintext_hashes + 5,
        "crypttext root": layout.crypttext_hashes + 1,
        "crypttext leaf": layout.block_hashes - 31 - 5 * 32,
        "block hash root": layout.block_hashes + 1,
        "block hash leaf": layout.share_hashes - 31 - 5 * 32,
        "share hash index": layout.share_hashes + 1,
        "share hash": layout.share_hashes + 10,
        "UEB size": layout.ueb + 3,
        "UEB": layout.ueb + 50,
        "UEB end": len(share) - 1,
    }


FIELDS = [
    *("version", "block size", "data size", "data offset", "plaintext hashes offset", "crypttext hashes offset"),
    *("block hashes offset", "share hashes offset", "UEB offset", "first block", "last block", "plaintext hashes"),
    *("crypttext root", "crypttext leaf", "block hash root", "block hash leaf", "share hash index", "share hash"),
    *("UEB size", "UEB", "UEB end"),
]
HARMLESS = {"block size", "data size", "plaintext hashes offset", "plaintext hashes"}  # nobody reads these


@pytest.mark.parametrize("where", FIELDS)
async def test_a_flipped_bit_in_seven_shares_does_no_harm(where: str, reading: str) -> None:
    grid, cap = await stored()
    for number, servers in grid.holders(cap.storage_index).items():
        if number < 7:
            servers[0].corrupt(cap.storage_index, number, fields(grid.shares(cap.storage_index)[number])[where])
    assert await read_all(grid.download(cap), cap) == DATA
    advised = {number for server in grid.servers for _, _, number, _ in server.advisories}
    assert advised <= set(range(7))
    if where in HARMLESS:
        assert not advised


@pytest.mark.parametrize("where", FIELDS)
async def test_a_flipped_bit_in_all_shares_gives_an_error_never_wrong_bytes(where: str, reading: str) -> None:
    grid, cap = await stored()
    for number, servers in grid.holders(cap.storage_index).items():
        servers[0].corrupt(cap.storage_index, number, fields(grid.shares(cap.storage_index)[number])[where])
    if where in HARMLESS:
        assert await read_all(grid.download(cap), cap) == DATA
        return
    with pytest.raises(NotEnoughSharesError) as caught:
        await read_all(grid.download(cap), cap)
    assert len(caught.value.failures) >= 8
    advised = {number for server in grid.servers for _, _, number, _ in server.advisories}
    assert where == "version" or len(advised) >= 8


async def test_any_flipped_bit_at_all(reading: str) -> None:
    """Every 19th byte of a share in turn, in seven shares at once."""
    grid, cap = await stored()
    length = len(grid.shares(cap.storage_index)[0])
    damaged = [(number, servers[0]) for number, servers in grid.holders(cap.storage_index).items() if number < 7]
    for offset in range(0, length, 19):
        for number, server in damaged:
            server.corrupt(cap.storage_index, number, offset, 1 << offset % 8)
        assert await read_all(grid.download(cap), cap) == DATA
        for number, server in damaged:
            server.corrupt(cap.storage_index, number, offset, 1 << offset % 8)


@pytest.mark.parametrize("length", [0, 3, 20, 0x24, 0x44, 100, 1700, -400, -1])
async def test_truncated_shares(length: int, reading: str) -> None:
    grid, cap = await stored()
    for number, servers in grid.holders(cap.storage_index).items():
        if number < 7:
            del servers[0].share(cap.storage_index, number)[length:]
    assert await read_all(grid.download(cap), cap) == DATA


async def test_corruption_is_reported_with_server_and_share_number(caplog: pytest.LogCaptureFixture) -> None:
    grid, cap = await stored()
    server = grid.holders(cap.storage_index)[1][0]
    server.corrupt(cap.storage_index, 1, ShareLayout.parse(grid.shares(cap.storage_index)[1]).data)
    for number, servers in grid.holders(cap.storage_index).items():
        if number > 2:
            servers[0].latency_s = 0.001 if number == 3 else 0.002  # so that the damaged one is asked
    assert await read_all(grid.download(cap), cap) == DATA
    assert server.advisories == [("immutable", cap.storage_index, 1, "block 0 does not match its hash")]
    assert f"corrupt share 1 on server {server.name}" in caplog.text
    assert server.calls["read"] == 1  # its other blocks are good and were used


async def test_a_share_of_the_future_is_not_called_corrupt() -> None:
    grid, cap = await stored()
    for number, servers in grid.holders(cap.storage_index).items():
        if number < 7:
            servers[0].share(cap.storage_index, number)[3] = 9
    assert await read_all(grid.download(cap), cap) == DATA
    assert not any(server.advisories for server in grid.servers)


async def test_shares_of_another_encoding_with_the_same_key_do_not_mix() -> None:
    grid, cap = await stored(segment_size=1000)
    other_grid, other = await stored(segment_size=2000)
    for number, share in list(other_grid.shares(other.storage_index).items())[:7]:
        grid.holders(cap.storage_index)[number][0].immutable[cap.storage_index][number] = bytearray(share)
    assert await read_all(grid.download(cap), cap) == DATA


async def test_a_broken_uploader_is_found_out() -> None:
    """Good blocks, proven one by one, that decode to something else."""
    grid, cap = await stored(segment_size=5001)
    download = grid.download(cap)
    await download.get_segment_size()
    file = download.file
    # A file of one segment: the root is the segment's hash. Nobody but an uploader can make the UEB say this.
    file.crypttext_tree = IncompleteHashTree(1, bytes(32))
    with pytest.raises(InconsistentEncodingError):
        await download.get_segment(0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=3000))
def test_garbage_for_shares(garbage: bytes) -> None:
    async def main() -> None:
        grid, cap = await stored()
        for number, servers in grid.holders(cap.storage_index).items():
            if number < 7:
                servers[0].share(cap.storage_index, number)[: len(garbage)] = garbage
        assert await read_all(grid.download(cap), cap) == DATA
        for number, servers in grid.holders(cap.storage_index).items():
            servers[0].immutable[cap.storage_index][number] = bytearray(garbage)
        with pytest.raises(NotEnoughSharesError) as caught:
            await read_all(grid.download(cap), cap)
        assert all(isinstance(failure, ShareError) for failure in caught.value.failures)

    trio.run(main)


# --- servers that hang, or are slow


@pytest.mark.parametrize("when", ["before", "after finding", "between segments"])
@pytest.mark.parametrize("victim", range(10))
async def test_one_hanging_server_costs_less_than_three_seconds(
    when: str, victim: int, autojump_clock: trio.testing.MockClock
) -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA, segment_size=1000)
    download = grid.download(cap)
    server = grid.permuted(cap.storage_index)[victim]
    if when == "before":
        server.pause()
    elif when == "after finding":
        server.hang_on.add("read")
    else:
        await download.get_segment(0)
        server.pause()
    began = trio.current_time()
    assert await read_all(download, cap) == DATA
    assert trio.current_time() - began < 3


@pytest.mark.parametrize("hanging", [2, 7])
async def test_as_many_hanging_servers_as_can_be_spared(hanging: int, autojump_clock: trio.testing.MockClock) -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA, segment_size=1000)
    download = grid.download(cap)
    await download.get_segment(0)
    for server in grid.permuted(cap.storage_index)[:hanging]:
        server.pause()
    began = trio.current_time()
    assert await read_all(download, cap) == DATA
    assert trio.current_time() - began < 10


async def test_a_hanging_server_is_avoided_by_the_next_file(autojump_clock: trio.testing.MockClock) -> None:
    grid = MemoryGrid(10)
    caps = [await grid.upload(noise(3000, seed)) for seed in range(10)]
    responsiveness = Responsiveness()
    for server in grid.servers[:2]:
        server.hang_on.add("read")
    began = trio.current_time()
    for cap in caps:
        await read_all(ImmutableDownload(grid.broker, cap, responsiveness), cap)
    assert trio.current_time() - began < 3


async def test_a_slow_server_is_not_asked_again(autojump_clock: trio.testing.MockClock) -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(noise(100_000), segment_size=1000)
    for server in grid.servers:
        server.latency_s = 0.01
    slow: MemoryServer = grid.permuted(cap.storage_index)[1]
    slow.latency_s = 0.4
    download = grid.download(cap)
    for number in range(50):
        await download.get_segment(number)
    assert slow.calls["read"] <= 2


async def test_cancelling_a_read_does_not_harm_the_next(autojump_clock: trio.testing.MockClock, reading: str) -> None:
    grid = MemoryGrid(10)
    cap = await grid.upload(DATA, segment_size=1000)
    for server in grid.servers:
        server.latency_s = 0.1
    download = grid.download(cap)
    for patience in (0.05, 0.15, 0.25, 0.35):
        with trio.move_on_after(patience):
            await download.get_segment(2)
    assert await read_all(download, cap) == DATA


@pytest.mark.parametrize("number", [-1, -8, 10, 255, 1 << 64])
async def test_a_server_with_shares_that_cannot_be_is_no_obstacle(number: int) -> None:
    grid = MemoryGrid(4)
    cap = await grid.upload(DATA, k=2, happy=4, n=4)
    for server in grid.servers[:2]:
        held = server.immutable[cap.storage_index]
        held[number] = next(iter(held.values()))
    assert await read_all(grid.download(cap), cap) == DATA


async def test_a_share_with_bad_blocks_is_asked_last_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    grid = MemoryGrid(4)
    cap = await grid.upload(DATA, k=2, happy=4, n=4, segment_size=500)
    (server,) = grid.holders(cap.storage_index)[0]
    layout = ShareLayout.parse(grid.shares(cap.storage_index)[0])
    for offset in range(layout.data, layout.data + layout.data_size):
        server.corrupt(cap.storage_index, 0, offset)
    download = grid.download(cap)
    assert await read_all(download, cap) == DATA
    (share,) = (share for share in download.finder.shares if share.number == 0)
    assert len(share.bad_segments) == 1  # of ten
    assert len(server.advisories) == 1
    assert await read_all(grid.download(cap), cap) == DATA  # as when the file is opened again
    assert len(server.advisories) == 1 and caplog.text.count("corrupt share 0") == 1
