"""MDMF files changed in place: always as a bytearray would be, moving what changes, whatever servers and rivals do."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.errors import NotEnoughServersError, NotEnoughSharesError, UncoordinatedWriteError
from grid.formats.mutable_share import parse_header
from grid.nodes.mutable import MutableFileNode
from grid.operations import changes as changes_module
from grid.operations.changes import Changes
from tests.grid.nodes.test_mutable import Target
from tests.grid.operations import mutable_grid as grid
from tests.memory_server import MemoryBroker

SEGMENT = 131_073  # of a file in 3 of 10 shares
BLOCK = SEGMENT // 3 + 16  # with its salt
HEAD = 2167


def moved(broker: MemoryBroker) -> tuple[int, int]:
    """(bytes out of the servers, bytes in) since it was last asked."""
    total = sum(server.slot_bytes_out for server in broker.servers), sum(s.slot_bytes_in for s in broker.servers)
    for server in broker.servers:
        server.slot_bytes_out = server.slot_bytes_in = 0
    return total


def seqnums(broker: MemoryBroker) -> list[int]:
    """Of each share, by its number."""
    found = [
        (number, parse_header(share).seqnum)
        for server in broker.servers
        for number, share in server.slots[grid.storage_index()].shares.items()
    ]
    return [seqnum for _, seqnum in sorted(found)]


async def contents(broker: MemoryBroker) -> bytes:
    """As somebody sees it who never saw it before."""
    return await MutableFileNode(grid.access(broker), grid.mdmf_cap().readonly).download_to_data()


# --- like a bytearray

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 700), st.integers(0, 300)),
        st.tuples(st.just("truncate"), st.integers(0, 1200), st.just(0)),
        st.tuples(st.just("append"), st.integers(0, 400), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


async def change(node: MutableFileNode, model: bytearray, operation: str, a: int, b: int, rng: random.Random) -> None:
    if operation == "write":
        data = rng.randbytes(b)
        if b:
            model.extend(bytes(max(0, a - len(model))))
            model[a : a + b] = data
        await node.write_at(a, data)
    elif operation == "append":
        data = rng.randbytes(a)
        model += data
        await node.append(data)
    else:
        del model[a:]
        model.extend(bytes(a - len(model)))
        await node.truncate(a)


@given(
    size=st.integers(0, 900),
    operations=OPERATIONS,
    seed=st.integers(0, 9),
    k_n=st.sampled_from([(3, 10), (1, 1), (2, 5)]),
)
@settings(max_examples=25, deadline=None)
def test_any_changes_are_a_bytearrays(
    size: int, operations: list[tuple[str, int, int]], seed: int, k_n: tuple[int, int]
) -> None:
    """Tiny segments, so that trees grow, shrink and move; now by who wrote last, now by one who knows nothing."""
    k, n = k_n

    async def run() -> None:
        rng = random.Random(seed)
        model = bytearray(rng.randbytes(size))
        broker = MemoryBroker(10)
        await grid.place_mdmf(broker, bytes(model), 12 * k, k, n)
        node = grid.mdmf_node(broker)
        for operation in operations:
            if rng.random() < 0.3:
                node = grid.mdmf_node(broker)
            await change(node, model, *operation, rng)
            assert await contents(broker) == model

    trio.run(run)


async def test_usual_segments() -> None:
    """Around the boundaries of segments and of tree depths: 1 B to 1.3 MB."""
    rng = random.Random(5)
    model = bytearray(b"x")
    broker = MemoryBroker(10)
    node = await grid.created_mdmf(broker, bytes(model))
    edges = [SEGMENT * count + shift for count in (0, 1, 2, 4, 8) for shift in (-1, 0, 1)]
    for _ in range(40):
        operation = rng.choice(["write", "truncate", "append"])
        at = max(0, rng.choice(edges)) if operation != "append" else rng.choice([1, 5000, SEGMENT])
        if operation == "append" and len(model) > 9 * SEGMENT:
            continue
        await change(node, model, operation, at, rng.choice([1, 4096, SEGMENT + 1]), rng)
        assert await contents(broker) == model
    assert len(set(seqnums(broker))) == 1


@pytest.mark.parametrize("size", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT])
async def test_created_and_replaced(size: int) -> None:
    rng = random.Random(size)
    broker = MemoryBroker(10)
    data = rng.randbytes(size)
    node = await grid.created_mdmf(broker, data)
    assert await contents(broker) == data
    await node.replace(data[::-1])
    assert await contents(broker) == data[::-1]
    await grid.mdmf_node(broker).modify(lambda old: old + b"!")
    assert await contents(broker) == data[::-1] + b"!"
    assert seqnums(broker) == [3] * 10


async def test_nothing_changed_is_not_published() -> None:
    broker = MemoryBroker(10)
    node = await grid.created_mdmf(broker, b"contents")
    await node.truncate(8)
    await node.write_at(3, b"")
    await node.append(b"")
    assert seqnums(broker) == [1] * 10


async def test_sdmf_files_take_changes_too() -> None:
    broker = MemoryBroker(10)
    node = await grid.created(broker, b"contents")
    await node.write_at(10, b"more")
    await node.append(b"!")
    await node.truncate(14)
    assert await grid.new_node(broker).download_to_data() == b"contents\0\0more"


# --- how little is moved


@pytest.fixture
async def large() -> tuple[MemoryBroker, bytearray]:
    """A file of 64 segments, 8 MiB."""
    model = bytearray(random.Random(1).randbytes(64 * SEGMENT - 1000))
    broker = MemoryBroker(10)
    await grid.created_mdmf(broker, bytes(model))
    moved(broker)
    return broker, model


async def test_a_small_write_moves_a_segment(large: tuple[MemoryBroker, bytearray]) -> None:
    broker, model = large
    node = grid.mdmf_node(broker)
    model[5_000_000:5_004_096] = b"w" * 4096
    await node.write_at(5_000_000, b"w" * 4096)
    read, written = moved(broker)
    assert read < 10 * 4000 + 3 * (BLOCK + 4200) + 10 * 2500  # the map, one segment, a path in each tree
    assert written < 10 * (BLOCK + HEAD + 32 * 7)
    await node.write_at(0, b"again")  # now that it knows where all is
    model[:5] = b"again"
    read, written = moved(broker)
    assert read < 3 * (BLOCK + 4200) + 10 * 2500
    assert await contents(broker) == model


async def test_a_whole_segment_is_not_read_before_it_is_written(large: tuple[MemoryBroker, bytearray]) -> None:
    broker, model = large
    await grid.mdmf_node(broker).write_at(7 * SEGMENT, bytes(2 * SEGMENT))
    read, written = moved(broker)
    assert read < 10 * 4000 + 10 * 2500
    assert written < 10 * (2 * BLOCK + HEAD + 32 * 14)
    model[7 * SEGMENT : 9 * SEGMENT] = bytes(2 * SEGMENT)
    assert await contents(broker) == model


async def test_an_append_reads_the_last_segment_at_most(large: tuple[MemoryBroker, bytearray]) -> None:
    """The first one moves the trees to where they have room; those after it a path in each."""
    broker, model = large
    node = grid.mdmf_node(broker)
    most_read = []
    for _ in range(10):
        await node.append(bytes(1000))
        model += bytes(1000)
        read, written = moved(broker)
        most_read.append(read)
        assert written < 10 * (2 * BLOCK + HEAD + 32 * 256)
    assert most_read[0] < 10 * 4000 + 3 * (BLOCK + 4200) + 10 * 32 * 64
    assert max(most_read[3:]) < 3 * (BLOCK + 4200) + 10 * 2500
    assert await contents(broker) == model


async def test_a_truncation_reads_the_new_last_segment_at_most(large: tuple[MemoryBroker, bytearray]) -> None:
    broker, model = large
    node = grid.mdmf_node(broker)
    for size in (50 * SEGMENT, 40 * SEGMENT + 17, 3 * SEGMENT, 100, 0):
        await node.truncate(size)
        del model[size:]
        read, written = moved(broker)
        assert read < 10 * 4000 + 3 * (BLOCK + 4200) + 10 * 32 * 64
        assert written < 10 * (BLOCK + HEAD + 32 * 64)
        assert await contents(broker) == model
        moved(broker)


async def test_a_small_read_fetches_a_segment(large: tuple[MemoryBroker, bytearray]) -> None:
    broker, model = large
    version = await grid.mdmf_node(broker).get_best_version()
    segment = await version.read_segment(40)
    assert segment == model[40 * SEGMENT : 41 * SEGMENT]
    assert moved(broker)[0] < 6 * 4000 + 3 * (BLOCK + 2000 + 32 * 127)


async def test_a_download_goes_by_pieces(large: tuple[MemoryBroker, bytearray]) -> None:
    broker, model = large
    target = Target()
    assert await grid.mdmf_node(broker).download(target) == "finished"
    size, *pieces, closed = target.told
    assert (size, closed) == (len(model), "closed") and b"".join(pieces) == model  # type: ignore[arg-type]
    assert max(map(len, pieces)) == 8 * SEGMENT  # type: ignore[arg-type]


async def test_a_download_never_mixes_versions(large: tuple[MemoryBroker, bytearray]) -> None:
    broker, model = large
    node = grid.mdmf_node(broker)

    class Interrupted(Target):
        async def write(self, data: bytes | memoryview) -> None:
            await super().write(data)
            if len(self.told) == 3:
                await grid.mdmf_node(broker).write_at(20 * SEGMENT, b"another version")

    target = Interrupted()
    with pytest.raises(NotEnoughSharesError):
        await node.download(target)
    assert target.told[-1] is NotEnoughSharesError
    pieces = [piece for piece in target.told if isinstance(piece, bytes)]
    assert model.startswith(b"".join(pieces))


async def test_deep_trees_are_read_and_written_by_paths() -> None:
    """As many segments as 1 GiB has: a change takes a path of each tree, not the half megabyte it has."""
    count = 8192
    broker = MemoryBroker(4)
    data = random.Random(2).randbytes(2 * count)
    await grid.place_mdmf(broker, data, 2, 2, 4)
    moved(broker)
    node = grid.mdmf_node(broker)
    for at in (0, 2 * 4095, 2 * 4096, 2 * count - 1):
        await node.write_at(at, b"!")
        read, written = moved(broker)
        assert read < 4 * 4000 + 2 * 3000 + 4 * 8 * 32 * 32
        assert written < 4 * (HEAD + 20 + 32 * 14)
    moved(broker)
    version = await node.get_best_version()
    assert await version.read_segment(5000) == data[10_000:10_002]
    assert moved(broker)[0] < 4 * 4000 + 2 * (200 + 8 * 32 * 32)  # as a read of 4 KiB in a file of 1 GiB
    assert [(await version.read_segment(segment))[0] for segment in (0, 4096)] == [ord("!")] * 2
    assert await version.read_segment(1) == data[2:4]


# --- in several versions


@pytest.fixture
def small_versions(monkeypatch: pytest.MonkeyPatch) -> int:
    """As if memory had room for three segments' blocks at a time."""
    monkeypatch.setattr(changes_module, "VERSION_BYTES_MAX", 3 * SEGMENT * 10 // 3 + 1)
    return 3


def source(data: bytes, most: list[int]) -> Changes:
    async def read(offset: int, length: int) -> bytes:
        most.append(length)
        await trio.lowlevel.checkpoint()
        return data[offset : offset + length]

    return Changes.everything(len(data), read)


async def test_a_large_file_is_made_in_steps(small_versions: int) -> None:
    broker = MemoryBroker(10)
    data = random.Random(3).randbytes(20 * SEGMENT + 5)
    asked: list[int] = []
    await grid.created_mdmf(broker, source(data, asked))
    assert await contents(broker) == data
    assert max(asked) <= 3 * SEGMENT
    assert seqnums(broker)[0] == 7
    written = moved(broker)[1]
    assert written < 1.02 * len(data) * 10 / 3 + 7 * 10 * HEAD  # neither blocks nor trees are written again and again
    offsets = parse_header(broker.servers[0].slots[grid.storage_index()].shares.popitem()[1]).offsets
    assert offsets.block_hash_tree[0] == sum(offsets.share_data) == 2167 + 20 * BLOCK + 16 + 2


async def test_a_large_change_is_a_series_of_versions(small_versions: int) -> None:
    """Front to back, each one whole: who reads in between finds the change made up to somewhere."""
    broker = MemoryBroker(10)
    old = bytes(10 * SEGMENT)
    node = await grid.created_mdmf(broker, source(old, []))
    new = b"n" * (8 * SEGMENT + 3)
    before = seqnums(broker)[0]
    seen: list[bytes] = []

    async def read(offset: int, length: int) -> bytes:
        if offset % (3 * SEGMENT) == 0:
            seen.append(await contents(broker))
        return new[offset : offset + length]

    await node.apply(Changes.everything(len(new), read))
    assert seqnums(broker) == [before + 3] * 10
    assert await contents(broker) == new
    for state in seen:
        done = state.count(b"n")
        assert done in (0, 3 * SEGMENT, 6 * SEGMENT) and state == b"n" * done + bytes(10 * SEGMENT - done)
    assert len(set(seen)) == 3


async def test_a_writer_that_dies_between_leaves_a_whole_version(small_versions: int) -> None:
    broker = MemoryBroker(10)
    node = await grid.created_mdmf(broker, source(bytes(9 * SEGMENT), []))
    with trio.CancelScope() as scope:

        async def read(offset: int, length: int) -> bytes:
            if offset >= 6 * SEGMENT:
                scope.cancel()
                await trio.sleep_forever()
            return b"n" * length

        await node.apply(Changes.everything(9 * SEGMENT, read))
    assert await contents(broker) == b"n" * 6 * SEGMENT + bytes(3 * SEGMENT)
    await node.apply(Changes.of_bytes(6 * SEGMENT, b"n" * 3 * SEGMENT))
    assert await contents(broker) == b"n" * 9 * SEGMENT


async def test_a_rival_between_two_steps_has_the_series_begun_again(
    small_versions: int, autojump_clock: trio.testing.MockClock
) -> None:
    broker = MemoryBroker(10)
    node = await grid.created_mdmf(broker, source(bytes(9 * SEGMENT), []))
    rivals = [grid.mdmf_node(broker)]

    async def read(offset: int, length: int) -> bytes:
        if offset >= 6 * SEGMENT and rivals:
            await rivals.pop().write_at(9 * SEGMENT - 5, b"rival and longer")
        return b"n" * length

    await node.apply(Changes([(0, 8 * SEGMENT)], read))
    assert await contents(broker) == b"n" * 8 * SEGMENT + bytes(SEGMENT - 5) + b"rival and longer"


async def test_appending_much(small_versions: int) -> None:
    broker = MemoryBroker(10)
    node = await grid.created_mdmf(broker, b"start")
    data = random.Random(4).randbytes(8 * SEGMENT)
    await node.append(data)
    assert await contents(broker) == b"start" + data


# --- ill servers, other writers


async def test_a_lost_server_keeps_an_older_version_that_is_not_read(
    large: tuple[MemoryBroker, bytearray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its share of a large file stays as it was; the others go on."""
    broker, model = large
    monkeypatch.setattr(changes_module, "VERSION_BYTES_MAX", 1 << 20)
    node = grid.mdmf_node(broker)
    lost = grid.permuted(broker)[3]
    lost.connected = False
    await node.write_at(100, b"one")
    lost.connected = True
    await grid.mdmf_node(broker).write_at(200, b"two")
    model[100:103], model[200:203] = b"one", b"two"
    assert await contents(broker) == model
    assert sorted(seqnums(broker)) == [1] + [3] * 9
    for server in grid.permuted(broker)[4:]:
        server.connected = False
    assert await contents(broker) == model  # from shares 0, 1, 2


async def test_what_is_missing_of_a_small_file_is_made_again() -> None:
    broker = MemoryBroker(10)
    data = bytearray(random.Random(6).randbytes(5 * SEGMENT))
    await grid.created_mdmf(broker, bytes(data))
    servers = grid.permuted(broker)
    del servers[2].slots[grid.storage_index()]
    servers[5].corrupt(grid.storage_index(), 5, 200)  # private key
    servers[6].corrupt(grid.storage_index(), 6, 20)  # root hash
    await grid.mdmf_node(broker).write_at(1000, b"x")
    data[1000:1001] = b"x"
    assert await contents(broker) == data
    assert seqnums(broker) == [2] * 10
    assert bytes(servers[5].share(grid.storage_index(), 5)[123:]).startswith(grid.keys().encrypted_private_key)


@pytest.mark.parametrize("small", [True, False])
async def test_a_corrupt_tree_is_not_built_on(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client would: here the share is left out, or made anew if the file is small."""
    broker = MemoryBroker(10)
    data = bytearray(random.Random(7).randbytes(5 * SEGMENT))
    await grid.created_mdmf(broker, bytes(data))
    if not small:
        monkeypatch.setattr(changes_module, "VERSION_BYTES_MAX", 4 * SEGMENT * 10 // 3)
    for number in (0, 4):
        server = grid.permuted(broker)[number]
        tree_at = parse_header(server.share(grid.storage_index(), number)).offsets.block_hash_tree[0]
        for node in range(15):
            server.corrupt(grid.storage_index(), number, tree_at + 32 * node)
    await grid.mdmf_node(broker).write_at(SEGMENT + 5, b"x" * 10)
    data[SEGMENT + 5 : SEGMENT + 15] = b"x" * 10
    assert await contents(broker) == data
    assert seqnums(broker) == ([2] * 10 if small else [1, 2, 2, 2, 1, 2, 2, 2, 2, 2])
    assert {number for server in broker.servers for _, _, number, _ in server.advisories} == {0, 4}


async def test_corrupt_blocks_are_read_around() -> None:
    broker = MemoryBroker(10)
    data = bytearray(random.Random(8).randbytes(3 * SEGMENT))
    await grid.created_mdmf(broker, bytes(data))
    for number in range(6):
        grid.permuted(broker)[number].corrupt(grid.storage_index(), number, HEAD + BLOCK + 1000)
    await grid.mdmf_node(broker).write_at(SEGMENT + 5, b"x" * 10)
    data[SEGMENT + 5 : SEGMENT + 15] = b"x" * 10
    assert await contents(broker) == data


async def test_servers_lost_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes_module, "VERSION_BYTES_MAX", SEGMENT)
    broker = MemoryBroker(10)
    data = bytearray(random.Random(9).randbytes(3 * SEGMENT))
    await grid.created_mdmf(broker, bytes(data))
    for server in grid.permuted(broker)[:4]:
        server.fail_on.add("slot_writev")
    await grid.mdmf_node(broker).write_at(5, b"x" * 10)
    data[5:15] = b"x" * 10
    assert await contents(broker) == data
    for server in grid.permuted(broker)[4:9]:
        server.fail_on.add("*")
    with pytest.raises(NotEnoughServersError):
        await grid.mdmf_node(broker).write_at(5, b"y")
    for server in broker.servers:
        server.fail_on.clear()
    assert await contents(broker) == data


TINY = 12  # bytes a segment, where the virtual clock must not run ahead of worker threads


async def test_a_hung_server_does_not_hold_up_an_update(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    model = bytearray(600)
    await grid.place_mdmf(broker, bytes(model), TINY)
    node = grid.mdmf_node(broker)
    await node.write_at(0, b"one")
    grid.permuted(broker)[1].pause()
    began = trio.current_time()
    await node.write_at(0, b"two")
    assert trio.current_time() - began < 12
    model[:3] = b"two"
    assert await contents(broker) == model


@pytest.mark.parametrize("seed", range(4))
async def test_racing_appends_are_not_lost(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    random.seed(seed)
    broker = MemoryBroker(10)
    for server in broker.servers:
        server.latency_s = random.random() / 10
    await grid.place_mdmf(broker, b"", TINY)
    tokens = [b"%s%d " % (name, count) for name in (b"a", b"b", b"c") for count in range(4)]

    async def write(node: MutableFileNode, own: list[bytes]) -> None:
        for token in own:
            await node.append(token)
            await trio.sleep(random.random())

    async with trio.open_nursery() as nursery:
        for first in range(0, len(tokens), 4):
            nursery.start_soon(write, grid.mdmf_node(broker), tokens[first : first + 4])
    found = (await contents(broker)).split()
    assert {*found} == {token.strip() for token in tokens} and len(found) < 2 * len(tokens)


async def test_a_write_from_memory_goes_to_what_a_rival_wrote() -> None:
    broker = MemoryBroker(10)
    data = bytearray(random.Random(10).randbytes(3 * SEGMENT))
    one = await grid.created_mdmf(broker, bytes(data))
    await grid.mdmf_node(broker).write_at(5, b"rival")
    await one.write_at(2 * SEGMENT, b"ours")
    data[5:10], data[2 * SEGMENT : 2 * SEGMENT + 4] = b"rival", b"ours"
    assert await contents(broker) == data


async def test_who_always_loses_gives_up(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    await grid.place_mdmf(broker, bytes(200), TINY)
    node = grid.mdmf_node(broker)
    rival = grid.mdmf_node(broker)

    async def read(offset: int, length: int) -> bytes:
        await rival.append(b"x")
        return bytes(length)

    with pytest.raises(UncoordinatedWriteError):
        await node.apply(Changes([(0, 10)], read))
    assert (await contents(broker)).endswith(b"x" * 8)


async def test_two_heads_are_told_and_resolved(caplog: pytest.LogCaptureFixture) -> None:
    """Both recoverable, at one sequence number: the larger root hash is the file, the next write settles it."""
    broker = MemoryBroker(10)
    base = random.Random(11).randbytes(2 * SEGMENT)
    await grid.created_mdmf(broker, base)
    shares = [bytes(grid.permuted(broker)[number].share(grid.storage_index(), number)) for number in range(10)]
    await grid.mdmf_node(broker).write_at(0, b"one")
    ones = [bytes(grid.permuted(broker)[number].share(grid.storage_index(), number)) for number in range(10)]
    for number, share in enumerate(shares):
        grid.put(grid.permuted(broker)[number], number, share)
    await grid.mdmf_node(broker).write_at(0, b"two")
    for number in range(0, 10, 2):
        grid.put(grid.permuted(broker)[number], number, ones[number])
    seen = await contents(broker)
    assert seen[3:] == base[3:] and seen[:3] in (b"one", b"two") and "raced" in caplog.text
    await grid.mdmf_node(broker).write_at(SEGMENT, b"next")
    assert await contents(broker) == seen[:SEGMENT] + b"next" + seen[SEGMENT + 4 :]
    assert seqnums(broker) == [3] * 10
