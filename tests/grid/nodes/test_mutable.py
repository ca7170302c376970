"""MutableFileNode: read, replace, modify; races between writers; what is asked of the servers and what is not."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from grid.errors import NotEnoughServersError, NotEnoughSharesError, NotWriteableError, UncoordinatedWriteError
from grid.nodes.mutable import MAP_FRESH_S, MutableFileNode
from grid.operations.mutable_encode import encode_sdmf
from tests.grid.operations import mutable_grid as grid
from tests.memory_server import MemoryBroker


def calls(broker: MemoryBroker) -> dict[str, int]:
    total: dict[str, int] = {}
    for server in broker.servers:
        for kind, count in server.calls.items():
            total[kind] = total.get(kind, 0) + count
        server.calls.clear()
    return total


def reader(broker: MemoryBroker) -> MutableFileNode:
    return MutableFileNode(grid.access(broker), grid.write_cap().readonly)


async def test_what_one_writes_another_reads() -> None:
    broker = MemoryBroker(10)
    await grid.created(broker, b"first")
    assert await grid.new_node(broker).download_to_data() == b"first"
    await grid.new_node(broker).replace(b"second")
    node = reader(broker)
    assert node.get_size() is None
    assert await node.download_to_data() == b"second"
    assert node.get_size() == 6 == await node.get_current_size()


async def test_an_empty_file() -> None:
    broker = MemoryBroker(10)
    await grid.created(broker, b"")
    snapshot = await reader(broker).open_snapshot()
    assert snapshot.size == 0 and await snapshot.read_all() == b""


async def test_a_read_cap_does_not_write() -> None:
    broker = MemoryBroker(10)
    await grid.created(broker, b"first")
    node = reader(broker)
    assert node.is_readonly() and node.get_writekey() is None and node.get_uri() == node.get_readonly_uri()
    with pytest.raises(NotWriteableError):
        await node.replace(b"x")


async def test_round_trips() -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"first")
    assert calls(broker) == {"slot_writev": 10}
    await node.replace(b"second")  # knows where all shares are
    assert calls(broker) == {"slot_writev": 10}
    other = grid.new_node(broker)
    await other.modify(lambda old: old + b"!")
    assert calls(broker) == {"slot_readv": 10, "slot_writev": 10}
    await other.download_to_data()
    assert calls(broker) == {"slot_readv": 6}


async def test_what_was_remembered_may_be_out_of_date() -> None:
    broker = MemoryBroker(10)
    one = await grid.created(broker, b"a")
    two = grid.new_node(broker)
    await two.modify(lambda old: old + b"b")
    await one.modify(lambda old: old + b"c")  # from memory this fails, without waiting it is redone
    assert await reader(broker).download_to_data() == b"abc"
    await two.replace(b"z")
    assert await reader(broker).download_to_data() == b"z"


async def test_memory_of_a_publish_ends(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"a")
    await trio.sleep(MAP_FRESH_S + 1)
    calls(broker)
    await node.replace(b"b")
    assert calls(broker)["slot_readv"] == 10


async def test_no_change_is_not_published() -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"a")
    calls(broker)
    assert await node.modify(lambda old: old) == b"a"
    assert calls(broker) == {"slot_readv": 10}  # it looked, rather than go by memory


async def test_a_version_that_reached_too_few_servers_is_published_again() -> None:
    """Also by who has nothing to change, and knows nothing of the publish that was cut short."""
    broker = MemoryBroker(10)
    await grid.created(broker, b"one")
    lost = grid.permuted(broker)[6:]
    for server in lost:
        server.fail_on.add("slot_writev")
    with pytest.raises(NotEnoughServersError):
        await MutableFileNode(grid.access(broker, happy=7), grid.write_cap()).replace(b"two")
    for server in lost:
        server.fail_on.clear()
    other = MutableFileNode(grid.access(broker, happy=7), grid.write_cap())
    assert await other.modify(lambda old: old) == b"two"
    for server in grid.permuted(broker)[:7]:  # the others alone tell what is the newest
        server.connected = False
    assert await reader(broker).download_to_data() == b"two"


async def test_a_file_keeps_its_own_k_and_n() -> None:
    broker = MemoryBroker(10)
    await grid.created(broker, b"a", k=2, n=5)
    await grid.new_node(broker).replace(b"b")
    version = await reader(broker).get_best_version()
    assert (version.header.k, version.header.n, version.header.seqnum) == (2, 5, 2)


async def test_private_key_stays_byte_for_byte() -> None:
    broker = MemoryBroker(10)
    await grid.created(broker, b"a")
    await grid.new_node(broker).replace(b"b")
    share = grid.permuted(broker)[0].share(grid.storage_index(), 0)
    assert bytes(share).endswith(grid.keys().encrypted_private_key)


async def test_nothing_there() -> None:
    broker = MemoryBroker(10)
    with pytest.raises(NotEnoughSharesError):
        await reader(broker).download_to_data()
    with pytest.raises(NotEnoughSharesError):
        await grid.new_node(broker).modify(lambda old: old)


async def test_replaced_while_being_read() -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, bytes(30_000))
    versions: list[int] = []

    async def use(version: object) -> bytes:
        versions.append(version.size)  # type: ignore[attr-defined]
        if len(versions) == 1:
            await node.replace(bytes(40_000))
        return await version.read_all()  # type: ignore[attr-defined,no-any-return]

    assert await reader(broker).use_best_version(use) == bytes(40_000)
    assert versions == [30_000, 40_000]


async def test_known_holders_are_asked_first() -> None:
    broker = MemoryBroker(40)
    shares = encode_sdmf(b"far away", grid.keys(), seqnum=1, salt=bytes(16), k=3, n=10).shares
    for number, server in enumerate(grid.permuted(broker)[30:]):
        grid.put(server, number, shares[number])
    node = reader(broker)
    await node.download_to_data()
    calls(broker)
    assert await node.download_to_data() == b"far away"
    assert calls(broker) == {"slot_readv": 6}


class Target:
    """IDownloadTarget that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def open(self, size: int) -> None:
        self.told.append(size)

    async def write(self, data: bytes | memoryview) -> None:
        self.told.append(bytes(data))

    def close(self) -> None:
        self.told.append("closed")

    def fail(self, why: Exception) -> None:
        self.told.append(type(why))

    def register_canceller(self, cb: object) -> None:
        pass

    def finish(self) -> str:
        return "finished"


async def test_download_to_a_target() -> None:
    broker = MemoryBroker(10)
    target = Target()
    with pytest.raises(NotEnoughSharesError):
        await reader(broker).download(target)
    await grid.created(broker, b"contents")
    assert await reader(broker).download(target) == "finished"
    assert target.told == [NotEnoughSharesError, 8, b"contents", "closed"]


async def test_a_version_once_seen_is_not_forgotten() -> None:
    """The first servers lag behind: whoever knows of a newer version looks further."""
    broker = MemoryBroker(20)
    old = encode_sdmf(b"old", grid.keys(), seqnum=1, salt=bytes(16), k=3, n=10).shares
    new = encode_sdmf(b"new", grid.keys(), seqnum=2, salt=bytes(16), k=3, n=10).shares
    servers = grid.permuted(broker)
    for number in range(10):
        grid.put(servers[number], number, new[number])
    node = reader(broker)
    assert await node.download_to_data() == b"new"
    for number in range(6):
        grid.put(servers[number], number, old[number])
    assert await node.download_to_data() == b"new"
    assert await reader(broker).download_to_data() == b"old"  # one who does not know is content with this


@pytest.mark.parametrize("seed", range(6))
async def test_racing_writers_lose_nothing(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    random.seed(seed)
    broker = MemoryBroker(10)
    for server in broker.servers:
        server.latency_s = random.random() / 10
    await grid.created(broker, b"")
    writers = [grid.new_node(broker) for _ in range(3)]

    async def write(name: bytes, node: MutableFileNode) -> None:
        for count in range(4):
            token = b"%s%d " % (name, count)
            await node.modify(lambda old, token=token: old if token in old else old + token)  # type: ignore[misc]
            await trio.sleep(random.random())

    async with trio.open_nursery() as nursery:
        for name, node in zip((b"a", b"b", b"c"), writers, strict=True):
            nursery.start_soon(write, name, node)
    tokens = (await reader(broker).download_to_data()).split()
    assert sorted(tokens) == [b"%s%d" % (name, count) for name in (b"a", b"b", b"c") for count in range(4)]


async def test_one_node_queues_its_writers() -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"")
    async with trio.open_nursery() as nursery:
        for token in (b"a", b"b", b"c"):
            nursery.start_soon(node.modify, lambda old, token=token: old + token)
    assert sorted(await reader(broker).download_to_data()) == [97, 98, 99]


async def test_of_two_heads_ours_that_failed_is_not_the_base() -> None:
    """After a lost race, our version may be as recoverable as the winner's, and rank above it: the winner's
    change must not get lost for that.
    """
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"base ")
    theirs = encode_sdmf(b"base theirs ", grid.keys(), seqnum=2, salt=bytes(16), k=3, n=10)
    for number in range(5, 10):
        grid.put(grid.permuted(broker)[number], number, theirs.shares[number])
    await node.modify(lambda old: old if b"ours" in old else old + b"ours ")
    assert await reader(broker).download_to_data() == b"base theirs ours "


async def test_who_always_loses_gives_up(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"")
    rival = grid.new_node(broker)
    tries = 0

    async def make(version: object, must: bool) -> bytes:
        nonlocal tries
        tries += 1
        await rival.modify(lambda old: old + b"x")
        return b"never"

    with pytest.raises(UncoordinatedWriteError):
        await node.update(make)
    assert tries == 9  # the first from memory
    assert await reader(broker).download_to_data() == b"x" * 9


async def test_damage_is_healed_by_the_next_write() -> None:
    broker = MemoryBroker(10)
    await grid.created(broker, b"contents" * 1000)
    servers = grid.permuted(broker)
    for number in range(7):
        servers[number].corrupt(grid.storage_index(), number, 900)
    await grid.new_node(broker).modify(lambda old: old + b"!")
    for server in servers[3:]:
        server.connected = False
    assert await reader(broker).download_to_data() == b"contents" * 1000 + b"!"


async def test_stopped_servers(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"contents")
    grid.permuted(broker)[1].pause()
    began = trio.current_time()
    assert await reader(broker).download_to_data() == b"contents"
    assert trio.current_time() - began < 3
    began = trio.current_time()
    await node.modify(lambda old: old + b"!")
    await grid.new_node(broker).modify(lambda old: old + b"!")
    assert trio.current_time() - began < 12
    assert await reader(broker).download_to_data() == b"contents!!"


async def test_cancelled_publish_is_not_trusted_afterwards(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"a")
    for server in grid.permuted(broker)[5:]:
        server.hang_on.add("slot_writev")
    with trio.move_on_after(0.5):
        await node.replace(b"b")
    for server in broker.servers:
        server.hang_on.clear()
    await node.modify(lambda old: old + b"c")
    assert await reader(broker).download_to_data() in (b"bc", b"ac")


async def test_a_race_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"one")
    heads = [
        encode_sdmf(text, grid.keys(), seqnum=2, salt=bytes(16), k=3, n=10).shares for text in (b"two", b"another")
    ]
    grid.place(broker, {number: heads[number % 2][number] for number in range(10)})
    other = grid.new_node(broker)
    for _ in range(3):
        assert await other.download_to_data() in (b"two", b"another")
    assert caplog.text.count("raced") == 1
    await node.replace(b"three")
    assert await other.download_to_data() == b"three"


async def test_a_mutable_file_has_one_share_less_than_an_immutable_one_may_have() -> None:
    """N is one byte there: a node set to 256 shares can still make directories."""
    broker = MemoryBroker(10)
    await grid.created(broker, b"x", k=3, n=256)
    numbers = {number for server in broker.servers for number in server.slots[grid.storage_index()].shares}
    assert numbers == set(range(255))
    assert await grid.new_node(broker).download_to_data() == b"x"
