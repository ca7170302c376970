"""Repair of mutable files: shares of the version that is there, in bounded memory, and never a share seen half."""

from __future__ import annotations

import os
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from grid.errors import InconsistentEncodingError, UncoordinatedWriteError
from grid.formats import hashutil
from grid.formats.hashtree import build_tree, needed_hashes
from grid.formats.mdmf_share import mdmf_signed_prefix, pack_mdmf_share
from grid.formats.mutable_share import parse_header
from grid.nodes.mutable import MutableFileNode
from grid.operations import recode
from grid.operations.changes import VERSION_BYTES_MAX, Changes
from grid.operations.check import check_cap
from grid.operations.check_results import CheckResults
from grid.operations.mutable_encode import code_segments
from grid.operations.repair_mutable import marker_of
from tests.grid.operations import mutable_grid as grid
from tests.grid.operations.grid import noise
from tests.memory_server import MemoryBroker, MemoryServer

SOAK: Final = bool(os.environ.get("TAHOEFS_SOAK"))
SEGMENT: Final = 300  # of the small files here
HEAD_BYTES: Final = 2167

Shares = dict[tuple[str, int], bytes]  # {(server id, share number): contents}


def shares(broker: MemoryBroker) -> Shares:
    index = grid.storage_index()
    return {
        (server.server_id, number): bytes(share[:])
        for server in broker.servers
        if index in server.slots
        for number, share in server.slots[index].shares.items()
    }


async def verified(broker: MemoryBroker) -> CheckResults:
    return await check_cap(broker, grid.mdmf_cap().verifier, verify=True)


def numbered(broker: MemoryBroker) -> list[tuple[int, MemoryServer]]:
    """[(share number, its server)], ascending; one of each."""
    servers = {server.server_id: server for server in broker.servers}
    return sorted({number: servers[server_id] for server_id, number in shares(broker)}.items())


def lose(broker: MemoryBroker, *numbers: int) -> None:
    for number, server in numbered(broker):
        if number in numbers:
            del server.slots[grid.storage_index()].shares[number]


async def contents(broker: MemoryBroker) -> bytes:
    return await MutableFileNode(grid.access(broker), grid.mdmf_cap().readonly).download_to_data()


def parts(share: bytes) -> list[bytes]:
    """All of it that has a meaning."""
    header = parse_header(share)
    offsets = header.offsets
    data = (offsets.share_data[0], header.num_segments * header.salt_bytes + header.segmentation.share_data_size)
    head = [offsets.public_key, offsets.signature, offsets.share_hash_chain, offsets.encrypted_private_key]
    return [share[:123], *(share[at : at + length] for at, length in (*head, data, header.block_hash_tree_range))]


def written(broker: MemoryBroker) -> int:
    """Bytes since it was last asked."""
    total = sum(server.slot_bytes_in for server in broker.servers)
    for server in broker.servers:
        server.slot_bytes_in = 0
    return total


# --- the same shares again


@pytest.mark.parametrize("step_bytes", [1, 2000, 1 << 20], ids=["a segment a step", "some steps", "one step"])
@pytest.mark.parametrize(
    ("size", "k", "n"), [(0, 3, 10), (1, 3, 10), (5 * SEGMENT + 7, 3, 10), (8 * SEGMENT, 1, 2), (2 * SEGMENT, 2, 5)]
)
async def test_what_is_lost_is_made_again_byte_for_byte(
    size: int, k: int, n: int, step_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else is written, apart from markers."""
    monkeypatch.setattr(recode, "STEP_BYTES", step_bytes)
    broker = MemoryBroker(n)
    await grid.place_mdmf(broker, noise(size), SEGMENT, k, n)
    whole = {number: share for (_, number), share in shares(broker).items()}
    for lost in ([0], [n - 1], list(range(n - k))):
        lose(broker, *lost)
        written(broker)
        await grid.mdmf_node(broker, k, n).repair()
        made = shares(broker)
        assert len(made) == n and {number: share for (_, number), share in made.items()} == whole
        assert len({server_id for server_id, _ in made}) == n
        assert written(broker) <= sum(len(whole[number]) + len(marker_of(parse_header(whole[0]))) for number in lost)
    assert await contents(broker) == noise(size)


async def test_sdmf_and_what_has_its_trees_elsewhere() -> None:
    broker = MemoryBroker(10)
    await grid.created(broker, noise(5000))
    whole = shares(broker)
    lose(broker, 1, 2, 9)
    await grid.new_node(broker).repair()
    assert shares(broker) == whole
    broker = MemoryBroker(10)
    await grid.place_mdmf(broker, noise(40 * SEGMENT), SEGMENT)
    await grid.mdmf_node(broker).append(noise(30))  # the trees get a new place, with room before them
    whole = shares(broker)
    lose(broker, 0, 5)
    await grid.mdmf_node(broker).repair()
    assert {key: parts(share) for key, share in shares(broker).items()} == {
        key: parts(share) for key, share in whole.items()
    }, "but for what older versions left between the parts"
    assert (await verified(broker)).healthy


async def test_damaged_and_old_shares_are_replaced_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recode, "STEP_BYTES", 500)
    broker = MemoryBroker(12)
    await grid.place_mdmf(broker, noise(6 * SEGMENT), SEGMENT)
    old = dict(numbered(broker))
    before = shares(broker)
    await grid.mdmf_node(broker).write_at(100, b"new")
    whole = shares(broker)
    index = grid.storage_index()
    old[0].slots[index].shares[0] = bytearray(before[old[0].server_id, 0])
    old[1].corrupt(index, 1, 20)  # its header
    old[2].corrupt(index, 2, HEAD_BYTES + 50)  # a block
    del old[3].slots[index].shares[3][100:]
    old[4].slots[index].shares[4].clear()
    seen = await verified(broker)
    damaged = {(share.server_id, share.share_number) for share in seen.corrupt}
    assert damaged == {(old[2].server_id, 2)} and len(seen.good) == 5
    await grid.mdmf_node(broker).repair(damaged=damaged)
    assert shares(broker) == whole


async def test_damage_found_on_the_way_is_repaired_too() -> None:
    broker = MemoryBroker(10)
    await grid.place_mdmf(broker, noise(6 * SEGMENT), SEGMENT)
    whole = shares(broker)
    lose(broker, 9)
    (_, first), *_ = numbered(broker)
    first.corrupt(grid.storage_index(), 0, HEAD_BYTES + 50)  # nobody said so, but it is among those read
    await grid.mdmf_node(broker).repair()
    assert sorted((number, share) for (_, number), share in shares(broker).items()) == sorted(
        (number, share) for (_, number), share in whole.items()
    )


# --- servers that fail, others that write, being stopped


class Watched(MemoryServer):
    """Keeps what all servers held after each write, and calls `after` then."""

    states: list[Shares]
    broker: MemoryBroker

    async def after(self) -> None: ...

    async def slot_testv_and_readv_and_writev(self, *arguments: Any) -> Any:
        answer = await super().slot_testv_and_readv_and_writev(*arguments)
        self.states.append(shares(self.broker))
        await self.after()
        return answer


def watched_broker(count: int) -> tuple[MemoryBroker, list[Shares]]:
    states: list[Shares] = []
    servers = [Watched(number) for number in range(count)]
    broker = MemoryBroker(servers)
    for server in servers:
        server.states, server.broker = states, broker
    return broker, states


async def test_no_share_is_seen_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every single call: a share is whole, or has no valid signature; and the file can be read."""
    monkeypatch.setattr(recode, "STEP_BYTES", 1000)
    broker, states = watched_broker(10)
    await grid.place_mdmf(broker, noise(9 * SEGMENT), SEGMENT)
    lose(broker, 0, 4, 8)
    await grid.mdmf_node(broker).repair()
    assert len(states) > 12
    half_made = 0
    for state in states:
        then = MemoryBroker(10)
        for (server_id, number), share in state.items():
            (server,) = [server for server in then.servers if server.server_id == server_id]
            grid.put(server, number, share)
        results = await verified(then)
        assert not results.corrupt and results.recoverable_versions == 1 and not results.wrong_shares
        assert len(results.good) + len(results.invalid) == len(state)
        half_made += len(results.invalid)
        assert await contents(then) == noise(9 * SEGMENT)
    assert half_made > 0


async def test_a_server_that_fails_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share goes elsewhere; what it is left with is replaced by the next repair."""
    monkeypatch.setattr(recode, "STEP_BYTES", 500)
    broker = MemoryBroker(11)
    await grid.place_mdmf(broker, noise(9 * SEGMENT), SEGMENT)
    lose(broker, 3)
    (spare,) = [server for server in broker.servers if not server.slots.get(grid.storage_index())]
    empty = [server for server in grid.permuted(broker) if server.server_id not in {s for s, _ in shares(broker)}]
    assert spare in empty and len(empty) == 2
    empty[0].fail_after["slot_writev"] = 2
    await grid.mdmf_node(broker).repair()
    assert empty[0].slots[grid.storage_index()].shares[3] and empty[1].slots[grid.storage_index()].shares[3]
    seen = await verified(broker)
    assert len(seen.good) == 10 and seen.good[3] == {empty[1].server_id}
    assert [(share.server_id, share.share_number) for share in seen.invalid] == [(empty[0].server_id, 3)]
    empty[0].fail_after.clear()
    await grid.mdmf_node(broker).repair()
    seen = await verified(broker)
    assert not seen.invalid and seen.good[3] == {server.server_id for server in empty}


async def test_another_writer_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The repair gives way, and what that one wrote is whole."""
    monkeypatch.setattr(recode, "STEP_BYTES", 500)
    broker, states = watched_broker(10)
    await grid.place_mdmf(broker, noise(9 * SEGMENT), SEGMENT)
    lose(broker, 3)
    writer = grid.mdmf_node(broker)
    begun = len(states)

    async def write(server: Watched) -> None:
        if len(states) == begun + 2:
            await writer.replace(noise(700, 5))

    monkeypatch.setattr(Watched, "after", write)
    with pytest.raises(UncoordinatedWriteError):
        await grid.mdmf_node(broker).repair()
    assert (await verified(broker)).healthy and await contents(broker) == noise(700, 5)


async def test_stopped_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recode, "STEP_BYTES", 500)
    broker, states = watched_broker(10)
    await grid.place_mdmf(broker, noise(9 * SEGMENT), SEGMENT)
    lose(broker, 3, 4)
    before = shares(broker)
    with trio.CancelScope() as scope:

        async def stop(server: Watched) -> None:
            if len(states) == 3:
                scope.cancel()

        monkeypatch.setattr(Watched, "after", stop)
        await grid.mdmf_node(broker).repair()
    assert scope.cancelled_caught and any(len(state) > len(before) for state in states)
    assert shares(broker) == before, "nothing half-made is left"


# --- when there has to be a next version


@pytest.mark.parametrize("step_bytes", [500, 1 << 20])
async def test_shares_that_a_change_in_place_left_out(step_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are there get a new head, and no more."""
    monkeypatch.setattr(recode, "STEP_BYTES", step_bytes)
    monkeypatch.setattr("grid.nodes.mutable.fits_at_once", lambda size, k, n: False)  # as if it were large
    broker = MemoryBroker(10)
    await grid.place_mdmf(broker, noise(9 * SEGMENT), SEGMENT)
    away = dict(numbered(broker))[7]
    away.connected = False
    await grid.mdmf_node(broker).write_at(1000, b"changed while one was away")
    away.connected = True
    expected = bytearray(noise(9 * SEGMENT))
    expected[1000:1026] = b"changed while one was away"
    seen = await verified(broker)
    assert len(seen.good) == 9 and seen.wrong_shares == 1
    written(broker)
    await grid.mdmf_node(broker).repair()
    seen = await verified(broker)
    assert seen.healthy and not seen.wrong_shares and not seen.invalid
    assert {parse_header(share).seqnum for share in shares(broker).values()} == {3}
    assert away.slot_bytes_in > 9 * (SEGMENT // 3)
    assert all(0 < server.slot_bytes_in < HEAD_BYTES for server in broker.servers if server is not away)
    assert await contents(broker) == expected


@pytest.mark.parametrize("step_bytes", [500, 1 << 20])
@pytest.mark.parametrize("failing", [False, True])
async def test_two_newest_versions_of_a_file(step_bytes: int, failing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one becomes the next, also when the servers that hold the other one take nothing."""
    monkeypatch.setattr(recode, "STEP_BYTES", step_bytes)
    broker = MemoryBroker(10)
    await grid.place_mdmf(broker, noise(9 * SEGMENT), SEGMENT)
    first = shares(broker)
    heads = []
    texts = (b"one", b"two")
    for text in texts:
        for server in broker.servers:
            for number in server.slots[grid.storage_index()].shares:
                server.slots[grid.storage_index()].shares[number] = bytearray(first[server.server_id, number])
        await grid.mdmf_node(broker).write_at(0, text)
        heads.append(shares(broker))
    for number, server in numbered(broker)[:5]:
        server.slots[grid.storage_index()].shares[number] = bytearray(heads[0][server.server_id, number])
    assert (await verified(broker)).recoverable_versions == 2
    roots = [parse_header(next(iter(head.values()))).root_hash for head in heads]
    losers = [
        server
        for server in broker.servers
        for share in server.slots[grid.storage_index()].shares.values()
        if parse_header(share).root_hash == min(roots)
    ]
    if failing:
        for server in losers:
            server.fail_on.add("slot_writev")
    assert await grid.mdmf_node(broker).repair() == 2
    seen = await verified(broker)
    at = {share_id.partition("-")[0]: servers for share_id, servers in seen.sharemap.items()}
    assert len(losers) == 5 and seen.healthy is not failing and at.keys() == ({"seq2", "seq3"} if failing else {"seq3"})
    assert len(seen.good) == 10
    assert await contents(broker) == texts[roots.index(max(roots))] + noise(9 * SEGMENT)[3:]


async def inconsistent_shares(segments: Sequence[bytes], odd: int) -> dict[int, bytes]:
    """Of a file whose share `odd` was coded from something else, though the share tree and the signature are right."""
    k, n, keys = 3, 10, grid.keys()

    async def plaintext_of(segment: int) -> bytes:
        return segments[segment]

    numbers = range(len(segments))
    coded = await code_segments(numbers, plaintext_of, keys.readkey, k=k, n=n, random_bytes=os.urandom)
    blocks = {s: [bytes(block) for block in coded[s].blocks] for s in numbers}
    for s in numbers:
        blocks[s][odd] = bytes(len(blocks[s][odd]))
    leaves = [[hashutil.salted_block_hash(coded[s].salt, blocks[s][number]) for s in numbers] for number in range(n)]
    trees = [build_tree(each) for each in leaves]
    share_tree = build_tree([tree[0] for tree in trees])
    sizes = {"k": k, "n": n, "segment_size": SEGMENT, "data_size": sum(map(len, segments))}
    prefix = mdmf_signed_prefix(seqnum=1, root_hash=share_tree[0], **sizes)
    return {
        number: pack_mdmf_share(
            seqnum=1,
            root_hash=share_tree[0],
            **sizes,
            public_key=keys.public_der,
            signature=keys.private.sign_pss(prefix),
            share_hash_chain={node: share_tree[node] for node in needed_hashes(n, number)},
            block_hash_tree=trees[number],
            salts_and_blocks=[(coded[s].salt, blocks[s][number]) for s in numbers],
            encrypted_private_key=keys.encrypted_private_key,
        )
        for number in range(n)
    }


@pytest.mark.parametrize("step_bytes", [500, 1 << 20])
async def test_what_was_never_of_one_coding_is_left_alone(step_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recode, "STEP_BYTES", step_bytes)
    broker = MemoryBroker(10)
    grid.place(broker, await inconsistent_shares([noise(SEGMENT, n) for n in range(5)], odd=8))
    lose(broker, 9)
    before = shares(broker)
    with pytest.raises(InconsistentEncodingError, match="share 8"):
        await grid.mdmf_node(broker).repair()
    assert shares(broker) == before


# --- memory


class FileShare:
    """What MemoryServer needs of a bytearray, in a nameless file."""

    def __init__(self) -> None:
        self._fd, name = tempfile.mkstemp()
        Path(name).unlink()

    def __len__(self) -> int:
        return os.fstat(self._fd).st_size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(len(self))
        return os.pread(self._fd, max(0, stop - start), start)

    def __setitem__(self, part: slice, data: bytes) -> None:
        os.pwrite(self._fd, data, part.start or 0)

    def close(self) -> None:
        os.close(self._fd)


class FileServer(MemoryServer):
    """Holds mutable shares in files, so that they do not count as memory."""

    @staticmethod
    def _apply(slot: Any, number: int, write: Any) -> None:
        if number not in slot.shares:
            slot.shares[number] = FileShare()
        for offset, data in write.data:
            slot.shares[number][offset : offset + len(data)] = data  # what is left out before it is zeros


def contents_at(offset: int, length: int) -> bytes:
    """Of a large file, made as they are asked for."""
    first = offset // 4096
    pieces = [noise(4096, number % 50) for number in range(first, (offset + length) // 4096 + 1)]
    return b"".join(pieces)[offset - first * 4096 :][:length]


LARGE: Final = 300 << 20 if SOAK else 4 << 20
PUBLISH_BYTES_MAX: Final = 3 * VERSION_BYTES_MAX if SOAK else 4 << 20  # plaintext, and blocks twice, of one version
REPAIR_BYTES_MAX: Final = 8 * recode.STEP_BYTES if SOAK else 1 << 20


async def test_memory_does_not_hold_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when it is made, nor changed, nor repaired. TAHOEFS_SOAK=1: 300 MiB with the bounds as they are."""
    if not SOAK:
        monkeypatch.setattr(recode, "STEP_BYTES", 128 << 10)
        monkeypatch.setattr("grid.operations.changes.VERSION_BYTES_MAX", 1 << 20)
    broker = MemoryBroker([FileServer(number) for number in range(4)])

    async def read(offset: int, length: int) -> bytes:
        return contents_at(offset, length)

    peaks: dict[str, int] = {}

    async def measured(what: str, work: Any) -> None:
        tracemalloc.start()
        try:
            await work
            peaks[what] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    await measured("made", grid.created_mdmf(broker, Changes.everything(LARGE, read), 2, 4))
    await measured("changed", grid.mdmf_node(broker, 2, 4).write_at(LARGE // 2, b"changed"))
    lose(broker, 0, 3)
    await measured("repaired", grid.mdmf_node(broker, 2, 4).repair())
    results = await verified(broker)
    assert results.healthy and len(results.good) == 4 and not results.invalid
    version = await grid.mdmf_node(broker, 2, 4).get_best_version()
    segment = version.num_segments // 2 - 1
    at = segment * version.header.segment_size
    assert await version.read_segment(segment) == contents_at(at, version.header.segment_size)
    assert max(peaks["made"], peaks["changed"]) < PUBLISH_BYTES_MAX and peaks["repaired"] < REPAIR_BYTES_MAX, peaks
    for server in broker.servers:
        for share in server.slots[grid.storage_index()].shares.values():
            assert isinstance(share, FileShare)
            share.close()
