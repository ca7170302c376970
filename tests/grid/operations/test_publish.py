"""SDMF publish: byte-exact shares, placement, test-and-set, uncoordinated writes, ill servers."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
import trio.testing

from grid.errors import NotEnoughServersError, RemoteFailure, UncoordinatedWriteError
from grid.formats.mutable_share import parse_header
from grid.interfaces import SlotSecrets, SlotWrite
from grid.operations.mutable_encode import encode_sdmf
from grid.operations.publish import FIRST_ANSWER_S, STRAGGLER_S, publish
from grid.operations.servermap import KNOWN_LATE, MapMode, MapRequest, ServerMap, update_servermap
from tests import vectors
from tests.grid.operations import mutable_grid as grid
from tests.memory_server import MemoryBroker, MemoryServer
from tests.vectors import name_of

SDMF_VECTORS = [vector for vector in grid.files() if vector["format"] == "SDMF"]


async def put(
    broker: MemoryBroker, contents: bytes, servermap: ServerMap | None, k: int = 3, n: int = 10, happy: int = 1
) -> ServerMap:
    seqnum = servermap.highest_seqnum + 1 if servermap else 1
    version = encode_sdmf(contents, grid.keys(), seqnum=seqnum, salt=os.urandom(16), k=k, n=n)
    return await publish(broker, grid.SECRETS, grid.keys(), version, servermap, happy=happy)


async def make_map(broker: MemoryBroker, mode: MapMode = MapMode.WRITE) -> ServerMap:
    return await update_servermap(broker, MapRequest.of_cap(grid.write_cap(), 3, 10), mode)


def holdings(broker: MemoryBroker) -> list[dict[int, int]]:
    """Of each server in permuted order: {share number: seqnum}."""
    found = []
    for server in grid.permuted(broker):
        slot = server.slots.get(grid.storage_index())
        shares = slot.shares if slot else {}
        found.append({number: parse_header(share).seqnum for number, share in shares.items()})
    return found


@pytest.mark.parametrize("vector", SDMF_VECTORS, ids=name_of)
def test_shares_are_byte_for_byte_tahoes(vector: dict[str, Any]) -> None:
    shares = grid.shares_of(vector)  # compares every share's hash
    assert len(shares) == vector["n"]
    header = parse_header(shares[0])
    assert header.signed_prefix.hex() == vector["signed_prefix"]
    for number, pointer in vector["shares"].items():
        assert shares[int(number)] == vectors.expand(pointer)


async def test_new_file_takes_one_call_a_server() -> None:
    broker = MemoryBroker(10)
    placed = await put(broker, b"contents", None)
    assert holdings(broker) == [{number: 1} for number in range(10)]  # share i on the i-th permuted server
    assert all(server.calls == {"slot_writev": 1} for server in broker.servers)
    assert placed.complete(10)


async def test_few_servers_hold_several_shares_each() -> None:
    broker = MemoryBroker(4)
    await put(broker, b"contents", None)
    assert [sorted(shares) for shares in holdings(broker)] == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert all(server.calls == {"slot_writev": 1} for server in broker.servers)


async def test_leases_and_write_enablers_are_per_server() -> None:
    broker = MemoryBroker(10)
    await put(broker, b"contents", None)
    for server in broker.servers:
        expected: SlotSecrets = grid.SECRETS.slot(grid.keys().writekey, grid.storage_index(), server.tub_id)
        assert server.slots[grid.storage_index()].write_enabler == expected.write_enabler
        assert server.leases[grid.storage_index()] == {expected.lease.renew}


async def test_overwrite_in_place_and_home_for_the_homeless() -> None:
    broker = MemoryBroker(12)
    await put(broker, b"one", None)
    servers = grid.permuted(broker)
    del servers[3].slots[grid.storage_index()]
    await put(broker, b"two", await make_map(broker))
    assert holdings(broker) == [{n: 2} for n in range(3)] + [{3: 2}] + [{n: 2} for n in range(4, 10)] + [{}, {}]


async def test_homeless_shares_go_where_the_fewest_are() -> None:
    broker = MemoryBroker(3)
    shares = dict(encode_sdmf(b"one", grid.keys(), seqnum=1, salt=bytes(16), k=1, n=4).shares)
    servers = grid.permuted(broker)
    grid.put(servers[0], 2, shares[2])
    await put(broker, b"two", await make_map(broker), k=1, n=4)
    assert holdings(broker) == [{2: 2, 3: 2}, {0: 2}, {1: 2}]


async def test_duplicates_are_all_updated() -> None:
    broker = MemoryBroker(3)
    shares = dict(encode_sdmf(b"one", grid.keys(), seqnum=1, salt=bytes(16), k=1, n=2).shares)
    for server in grid.permuted(broker):
        grid.put(server, 0, shares[0])
    grid.put(grid.permuted(broker)[1], 1, shares[1])
    await put(broker, b"two", await make_map(broker), k=1, n=2)
    assert holdings(broker) == [{0: 2}, {0: 2, 1: 2}, {0: 2}]


async def test_bad_shares_are_replaced_where_they_are() -> None:
    broker = MemoryBroker(10)
    await put(broker, b"one", None)
    servers = grid.permuted(broker)
    servers[4].corrupt(grid.storage_index(), 4, 500)  # signature
    servers[5].corrupt(grid.storage_index(), 5, 20)  # root hash
    servers[6].slots[grid.storage_index()].shares[6] = bytearray()
    servermap = await make_map(broker)
    assert len(servermap.bad) == 3
    await put(broker, b"two", servermap)
    assert holdings(broker) == [{number: 2} for number in range(10)]


async def test_shares_of_an_unknown_layout_are_left_alone() -> None:
    broker = MemoryBroker(10)
    await put(broker, b"one", None)
    servers = grid.permuted(broker)
    future = bytes([9]) + bytes(200)
    servers[4].slots[grid.storage_index()].shares[4] = bytearray(future)
    await put(broker, b"two", await make_map(broker))
    assert bytes(servers[4].share(grid.storage_index(), 4)) == future
    assert sum(4 in server.slots[grid.storage_index()].shares for server in servers) == 2


async def test_old_shares_beyond_a_smaller_n_do_not_disturb() -> None:
    broker = MemoryBroker(10)
    await put(broker, b"one", None)
    await put(broker, b"two", await make_map(broker), k=2, n=5)
    await put(broker, b"three", await make_map(broker), k=2, n=5)
    assert [next(iter(shares.values())) for shares in holdings(broker)] == [3] * 5 + [1] * 5


async def test_no_server_a_grid_manager_does_not_certify() -> None:
    broker = MemoryBroker(4)
    broker.forbidden = {"server-1"}
    await put(broker, b"contents", None)
    assert not broker.servers[1].calls


# --- other writers


async def test_another_writer_in_between_is_noticed() -> None:
    broker = MemoryBroker(10)
    await put(broker, b"one", None)
    servermap = await make_map(broker)
    await put(broker, b"theirs", await make_map(broker))
    with pytest.raises(UncoordinatedWriteError):
        await put(broker, b"ours", servermap)
    assert holdings(broker) == [{number: 2} for number in range(10)]


async def test_a_share_nobody_expected_is_noticed() -> None:
    """Another writer's share, of a number we write elsewhere, on a server we write to."""
    broker = MemoryBroker(10)
    await put(broker, b"one", None)
    servermap = await make_map(broker)
    other = encode_sdmf(b"theirs", grid.keys(), seqnum=2, salt=bytes(16), k=3, n=10).shares
    grid.put(grid.permuted(broker)[2], 7, other[7])
    with pytest.raises(UncoordinatedWriteError):
        await put(broker, b"ours", servermap)


async def test_a_new_file_is_never_written_over_an_old_one() -> None:
    broker = MemoryBroker(10)
    await put(broker, b"one", None)
    with pytest.raises(UncoordinatedWriteError):
        await put(broker, b"two", None)


async def test_our_own_write_whose_answer_was_lost_counts() -> None:
    """The same version sent again: tests fail, but what is there is what we wanted."""
    broker = MemoryBroker(10)
    version = encode_sdmf(b"one", grid.keys(), seqnum=1, salt=bytes(16), k=3, n=10)
    await publish(broker, grid.SECRETS, grid.keys(), version, None, happy=1)
    placed = await publish(broker, grid.SECRETS, grid.keys(), version, None, happy=1)
    assert placed.complete(10)


# --- ill servers


async def test_a_failed_servers_share_goes_elsewhere() -> None:
    broker = MemoryBroker(10)
    grid.permuted(broker)[0].fail_on.add("slot_writev")
    placed = await put(broker, b"contents", None)
    assert placed.complete(10)
    assert [sorted(shares) for shares in holdings(broker)] == [[], [0, 1], *([n] for n in range(2, 10))]


async def test_a_stopped_server_costs_little(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    grid.permuted(broker)[0].pause()
    began = trio.current_time()
    placed = await put(broker, b"contents", None)
    assert trio.current_time() - began == pytest.approx(STRAGGLER_S, abs=0.1)
    assert placed.complete(10)


async def test_noticing_another_writer_does_not_wait_for_a_stopped_server(
    autojump_clock: trio.testing.MockClock,
) -> None:
    broker = MemoryBroker(10)
    servermap = await put(broker, b"one", None)
    await put(broker, b"theirs", servermap)
    grid.permuted(broker)[0].pause()
    began = trio.current_time()
    with pytest.raises(UncoordinatedWriteError):
        await put(broker, b"ours", servermap)
    assert trio.current_time() - began < STRAGGLER_S + 1


async def test_when_all_servers_hang_the_wait_ends(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    for server in broker.servers:
        server.pause()
    with pytest.raises(NotEnoughServersError):
        await put(broker, b"contents", None)
    assert trio.current_time() < FIRST_ANSWER_S + 1


async def test_a_slow_line_is_given_its_time(autojump_clock: trio.testing.MockClock) -> None:
    """A megabyte a share, one server after the other: slow is not stopped."""
    broker = MemoryBroker(10)
    for position, server in enumerate(grid.permuted(broker)):
        server.latency_s = 8.0 * (position + 1)
    placed = await put(broker, bytes(3 << 20), None)
    assert holdings(broker) == [{number: 1} for number in range(10)]
    assert placed.complete(10) and not placed.failures


async def test_a_server_known_to_hang_gets_no_new_shares(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    grid.permuted(broker)[0].pause()
    await put(broker, b"contents", None)
    for server in broker.servers:
        server.slots.clear()
    began = trio.current_time()
    placed = await put(broker, b"contents", None)
    assert placed.complete(10)
    assert trio.current_time() == began
    grid.permuted(broker)[1].pause()  # it holds a share, and a read has found it hanging
    await make_map(broker, MapMode.READ)
    began = trio.current_time()
    assert (await put(broker, b"more", placed)).complete(10)
    assert trio.current_time() - began == pytest.approx(STRAGGLER_S * KNOWN_LATE, abs=0.1)


async def test_fewer_than_k_shares_is_a_failure() -> None:
    broker = MemoryBroker(4)
    for server in broker.servers:
        server.fail_on.add("slot_writev")
    with pytest.raises(NotEnoughServersError) as caught:
        await put(broker, b"contents", None)
    assert (caught.value.happy, caught.value.reached, caught.value.connected) == (3, 0, 4)
    with pytest.raises(NotEnoughServersError):
        await put(MemoryBroker(0), b"contents", None)


async def test_too_few_servers_are_not_even_begun_with() -> None:
    broker = MemoryBroker(10)
    before = await put(broker, b"contents", None)
    for server in grid.permuted(broker)[6:]:
        server.connected = False
    for servermap in (before, None):  # known places count only where they can be reached
        with pytest.raises(NotEnoughServersError) as caught:
            await put(broker, b"more", servermap, happy=7)
        assert (caught.value.happy, caught.value.reached, caught.value.connected) == (7, 6, 6)
    assert sum(server.calls["slot_writev"] for server in broker.servers) == 10
    await put(broker, b"more", before, happy=6)


async def test_servers_that_fail_meanwhile_make_it_a_failure() -> None:
    """Ten shares have a place each, two on some servers: that does not count."""
    broker = MemoryBroker(10)
    for server in grid.permuted(broker)[6:]:
        server.fail_on.add("slot_writev")
    with pytest.raises(NotEnoughServersError) as caught:
        await put(broker, b"contents", None, happy=7)
    assert (caught.value.happy, caught.value.reached) == (7, 6)
    assert sum(map(len, holdings(broker))) == 10


async def test_one_server_is_enough_for_all_shares() -> None:
    broker = MemoryBroker(1)
    await put(broker, b"contents", None)
    assert sorted(holdings(broker)[0]) == list(range(10))


async def test_a_foreign_write_enabler_only_costs_that_server() -> None:
    broker = MemoryBroker(10)
    await put(broker, b"one", None)
    server = grid.permuted(broker)[3]
    server.slots[grid.storage_index()].write_enabler = bytes(32)
    placed = await put(broker, b"two", await make_map(broker))
    assert placed.complete(10)
    assert isinstance(placed.failures[server.server_id], RemoteFailure)


async def test_large_shares_go_in_several_calls() -> None:
    broker = MemoryBroker(1)
    contents = bytes(12 << 20)
    calls: list[int] = []
    server = broker.servers[0]
    original = server.slot_testv_and_readv_and_writev

    async def counted(si: bytes, secrets: SlotSecrets, writes: Any, vectors: Any) -> Any:
        calls.append(sum(_size(write) for write in writes.values()))
        return await original(si, secrets, writes, vectors)

    server.slot_testv_and_readv_and_writev = counted  # type: ignore[method-assign]
    placed = await put(broker, contents, None, k=2, n=4)
    assert placed.complete(4) and len(calls) == 4 and max(calls) < 8 << 20
    placed = await put(broker, contents, placed, k=2, n=4)
    assert placed.complete(4)


def _size(write: SlotWrite) -> int:
    return sum(len(data) for _, data in write.data)


async def test_shorter_version_leaves_a_tail_that_nobody_reads() -> None:
    broker = MemoryBroker(10)
    placed = await put(broker, b"long" * 3000, None)
    await put(broker, b"short", placed)
    server: MemoryServer = grid.permuted(broker)[0]
    assert len(server.share(grid.storage_index(), 0)) > 4000
    best = (await make_map(broker, MapMode.READ)).best()
    assert best is not None and best.data_size == 5


@pytest.mark.parametrize(
    ("failure", "for_space"),
    [
        (RemoteFailure("allmydata.interfaces.NoSpace", ""), True),
        (RemoteFailure("builtins.OSError", "[Errno 28] No space left on device"), True),
        (RemoteFailure("builtins.OSError", "[Errno 5] Input/output error"), False),
    ],
)
async def test_servers_that_refuse_for_space_are_told_from_broken_ones(
    failure: RemoteFailure, for_space: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object) -> None:
        raise failure

    monkeypatch.setattr(MemoryServer, "slot_testv_and_readv_and_writev", refuse)
    with pytest.raises(NotEnoughServersError) as caught:
        await grid.created(MemoryBroker(10), b"x")
    assert caught.value.refused_for_space is for_space
