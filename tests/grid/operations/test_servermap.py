"""The servermap: versions told apart, bad shares set aside, no longer a search than needed, ill servers."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.errors import CorruptShareError, ShareVersionError
from grid.formats.hashutil import write_enabler
from grid.operations.corruption import AGAIN_AFTER_S
from grid.operations.keys import make_keys
from grid.operations.mutable_encode import encode_sdmf
from grid.operations.servermap import (
    CHECK_READ_BYTES,
    KNOWN_LATE,
    QUERY_TIMEOUT_S,
    READ_SLOW_S,
    WRITE_SLOW_S,
    MapMode,
    MapRequest,
    ServerMap,
    update_servermap,
)
from tests.grid.operations import mutable_grid as grid
from tests.memory_server import MemoryBroker, Slot


def version(contents: bytes, seqnum: int, k: int = 3, n: int = 10, salt: bytes = bytes(16)) -> dict[int, bytes]:
    return dict(encode_sdmf(contents, grid.keys(), seqnum=seqnum, salt=salt, k=k, n=n).shares)


async def update(broker: MemoryBroker, mode: MapMode, *, want_key: bool = False) -> ServerMap:
    return await update_servermap(broker, MapRequest.of_cap(grid.write_cap(), 3, 10, want_key=want_key), mode)


@pytest.mark.parametrize("mode", MapMode)
async def test_finds_a_whole_file(mode: MapMode) -> None:
    broker = MemoryBroker(10)
    grid.place(broker, version(b"contents", 5))
    servermap = await update(broker, mode, want_key=True)
    best = servermap.best()
    assert best is not None and (best.seqnum, best.k, best.n, best.data_size) == (5, 3, 10, 8)
    assert not servermap.bad and not servermap.unrecoverable_newer and not servermap.needs_merge
    assert len(servermap.shares) == (6 if mode is MapMode.READ else 10)
    assert (servermap.keys is not None) == (mode in (MapMode.WRITE, MapMode.REPAIR))


async def test_one_query_a_server() -> None:
    broker = MemoryBroker(10)
    grid.place(broker, version(b"small", 1))
    await update(broker, MapMode.WRITE, want_key=True)
    assert [server.calls["slot_readv"] for server in broker.servers] == [1] * 10


async def test_read_asks_few_of_many_servers() -> None:
    broker = MemoryBroker(40)
    grid.place(broker, version(b"small", 1))
    await update(broker, MapMode.READ)
    assert [server.calls["slot_readv"] for server in grid.permuted(broker)] == [1] * 6 + [0] * 34


async def test_read_goes_on_to_the_last_server() -> None:
    broker = MemoryBroker(30)
    shares = version(b"far away", 1)
    for number, server in enumerate(grid.permuted(broker)[-3:]):
        grid.put(server, number, shares[number])
    assert (await update(broker, MapMode.READ)).best() is not None


async def test_write_stops_behind_k_empty_servers() -> None:
    """It asks a few further ones while those before have not answered; how many depends on who answers first."""
    broker = MemoryBroker(80)
    shares = version(b"x", 1)
    servers = grid.permuted(broker)
    for number, server in enumerate(servers[:10]):
        grid.put(server, number, shares[number])
    grid.put(servers[12], 3, shares[3])  # a straggler, moved back by servers that came later
    servermap = await update(broker, MapMode.WRITE)
    assert len(servermap.shares) == 11
    asked = [server.calls["slot_readv"] for server in servers]
    assert asked[:16] == [1] * 16 and sum(asked) <= 40


async def test_nothing_there() -> None:
    broker = MemoryBroker(4)
    servermap = await update(broker, MapMode.WRITE, want_key=True)
    assert servermap.best() is None and servermap.highest_seqnum == 0 and len(servermap.empty) == 4
    assert (await update(MemoryBroker(0), MapMode.READ)).best() is None


async def test_versions_are_told_apart() -> None:
    broker = MemoryBroker(10)
    old, new = version(b"old", 1), version(b"new", 2)
    grid.place(broker, old | {number: new[number] for number in (0, 1)})
    servermap = await update(broker, MapMode.CHECK)
    best = servermap.best()
    assert best is not None and best.seqnum == 1
    assert servermap.highest_seqnum == 2 and servermap.unrecoverable_newer


async def test_read_looks_for_more_of_a_newer_version() -> None:
    broker = MemoryBroker(20)
    old, new = version(b"old", 1), version(b"new", 2)
    servers = grid.permuted(broker)
    for number in range(10):
        grid.put(servers[number], number, old[number])
    grid.put(servers[2], 7, new[7])
    for number, server in ((8, servers[14]), (9, servers[15])):
        grid.put(server, number, new[number])
    best = (await update(broker, MapMode.READ)).best()
    assert best is not None and best.seqnum == 2


async def test_two_heads() -> None:
    broker = MemoryBroker(10)
    one, other = version(b"one", 4), version(b"other", 4)
    grid.place(broker, {number: (one if number % 2 else other)[number] for number in range(10)})
    servermap = await update(broker, MapMode.CHECK)
    assert servermap.needs_merge
    assert [head.root_hash for head in servermap.recoverable()] == sorted(
        (head.root_hash for head in servermap.recoverable()), reverse=True
    )


async def test_k_copies_of_one_share_are_not_recoverable() -> None:
    broker = MemoryBroker(5)
    share = version(b"x", 1)[4]
    for server in broker.servers:
        grid.put(server, 4, share)
    servermap = await update(broker, MapMode.READ)
    assert servermap.best() is None and servermap.found == 1


@pytest.mark.parametrize("offset", [1, 10, 45, 57, 59, 70, 110, 300, 401, 650])
async def test_a_damaged_header_key_or_signature_makes_a_bad_share(offset: int) -> None:
    broker = MemoryBroker(10)
    grid.place(broker, version(b"contents", 1))
    server = grid.permuted(broker)[2]
    server.corrupt(grid.storage_index(), 2, offset)
    servermap = await update(broker, MapMode.READ)
    (bad,) = servermap.bad.values()
    assert isinstance(bad.error, CorruptShareError)
    assert bad.specimen == bytes(server.share(grid.storage_index(), 2)[:75])
    assert server.advisories[0][:3] == ("mutable", grid.storage_index(), 2)
    assert servermap.best() is not None


async def test_an_unknown_layout_is_not_called_corrupt() -> None:
    broker = MemoryBroker(10)
    grid.place(broker, version(b"contents", 1) | {1: b"\x07from the future"})
    servermap = await update(broker, MapMode.READ)
    assert not servermap.bad
    (other,) = servermap.incompatible.values()
    assert isinstance(other.error, ShareVersionError) and other.error.version == 7


async def test_a_share_that_ends_early_and_an_empty_one() -> None:
    broker = MemoryBroker(10)
    grid.place(broker, version(b"contents", 1) | {0: b"", 1: version(b"contents", 1)[1][:500]})
    servermap = await update(broker, MapMode.READ)
    assert {number for _, number in servermap.bad} == {0, 1}


async def test_mdmf_headers_need_a_second_read_in_check_mode() -> None:
    vector = next(vector for vector in grid.files() if vector["name"] == "mdmf-three-segs-tail-3of10-seq1")
    assert vector["offsets"]["signature"] > CHECK_READ_BYTES
    broker = MemoryBroker(10)
    grid.place(broker, grid.shares_of(vector))
    servermap = await update(broker, MapMode.CHECK)
    best = servermap.best()
    assert best is not None and best.format == "mdmf" and len(servermap.shares) == 10


async def test_a_server_known_to_hang_costs_less(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    grid.place(broker, version(b"contents", 1))
    stopped = grid.permuted(broker)[0]
    stopped.pause()
    await update(broker, MapMode.READ)
    began = trio.current_time()
    await update(broker, MapMode.READ)
    assert trio.current_time() - began == pytest.approx(READ_SLOW_S * KNOWN_LATE)
    stopped.resume()
    assert not (await update(broker, MapMode.READ)).failures


@pytest.mark.parametrize(
    ("mode", "limit_s"), [(MapMode.READ, READ_SLOW_S), (MapMode.WRITE, WRITE_SLOW_S), (MapMode.CHECK, QUERY_TIMEOUT_S)]
)
async def test_a_stopped_server_costs_little(
    mode: MapMode, limit_s: float, autojump_clock: trio.testing.MockClock
) -> None:
    broker = MemoryBroker(10)
    grid.place(broker, version(b"contents", 1))
    stopped = grid.permuted(broker)[0]
    stopped.pause()
    began = trio.current_time()
    servermap = await update(broker, mode, want_key=True)
    assert trio.current_time() - began == pytest.approx(limit_s)
    assert servermap.best() is not None and stopped.server_id in servermap.failures


async def test_when_most_servers_are_stopped_the_others_are_asked(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(20)
    shares = version(b"contents", 1)
    servers = grid.permuted(broker)
    for server in servers[:6]:
        server.pause()
    for number, server in enumerate(servers[6:16]):
        grid.put(server, number, shares[number])
    assert (await update(broker, MapMode.READ)).best() is not None
    assert trio.current_time() < 3


async def test_failing_servers_are_named() -> None:
    broker = MemoryBroker(6)
    grid.place(broker, version(b"contents", 1, n=6))
    for server in broker.servers[:2]:
        server.fail_on.add("slot_readv")
    servermap = await update(broker, MapMode.WRITE)
    assert set(servermap.failures) == {"server-0", "server-1"}
    assert len(servermap.shares) == 4


async def test_private_key_comes_from_another_share_when_one_is_damaged() -> None:
    broker = MemoryBroker(10)
    contents = bytes(20_000)  # the key is beyond the first read
    shares = version(contents, 1)
    grid.place(broker, shares)
    for number in (0, 1, 2):
        grid.permuted(broker)[number].corrupt(grid.storage_index(), number, len(shares[number]) - 5)
    servermap = await update(broker, MapMode.WRITE, want_key=True)
    assert servermap.keys is not None and servermap.keys.writekey == grid.keys().writekey


async def test_a_file_of_another_owner_at_our_storage_index() -> None:
    """All shares verify among themselves, but not against the cap's fingerprint."""
    broker = MemoryBroker(10)
    stranger = make_keys()
    forged = encode_sdmf(b"forged", stranger, seqnum=9, salt=bytes(16), k=3, n=10).shares
    for number, server in enumerate(broker.servers):
        slot = Slot(write_enabler(grid.keys().writekey, server.tub_id))
        slot.shares[number] = bytearray(forged[number])
        server.slots[grid.storage_index()] = slot
    servermap = await update(broker, MapMode.WRITE)
    assert servermap.best() is None and len(servermap.bad) == 10


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=2500), st.sampled_from([b"", b"\0", b"\1"]), st.integers(0, 255), st.booleans())
def test_whatever_a_server_holds_the_map_gets_made(data: bytes, start: bytes, number: int, over_real: bool) -> None:
    """Noise, and noise laid over the beginning of a real share: set aside, and the good shares still found."""
    good = version(b"contents", 1)
    noise = start + data
    if over_real:
        noise += good[number % 10][len(noise) :]

    async def make() -> ServerMap:
        broker = MemoryBroker(10)
        grid.place(broker, {n: share for n, share in good.items() if n != number})
        grid.put(broker.servers[0], number, noise)
        return await update(broker, MapMode.WRITE, want_key=True)

    servermap = trio.run(make)
    best = servermap.best()
    assert best is not None and best.seqnum == 1 and servermap.keys is not None
    intact = len(noise) >= 700 and noise[:657] == good.get(number, b"")[:657]
    assert len(servermap.shares) == 10 - (number in good) + intact


async def test_a_bad_share_that_stays_is_reported_once_a_day(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    broker = MemoryBroker(10)
    grid.place(broker, version(b"contents", 1))
    server = grid.permuted(broker)[2]
    server.corrupt(grid.storage_index(), 2, 45)
    for reports in (1, 2):
        for _ in range(5):
            await update(broker, MapMode.READ)
        assert len(server.advisories) == reports
        assert sum("corrupt share 2" in record.message for record in caplog.records) == reports
        await trio.sleep(AGAIN_AFTER_S)
