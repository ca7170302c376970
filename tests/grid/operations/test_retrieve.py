"""Retrieve: every vector's contents from its shares; damage up to N-k shares; never a wrong byte."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.errors import CorruptShareError, NotEnoughSharesError
from grid.formats.mutable_share import parse_header
from grid.operations.mutable_encode import encode_sdmf
from grid.operations.retrieve import CHUNK_BYTES, STALL_S, MutableVersion
from grid.operations.servermap import MapMode, MapRequest, update_servermap
from tests.grid.operations import mutable_grid as grid
from tests.memory_server import MemoryBroker
from tests.vectors import expand, name_of


def sdmf(contents: bytes, k: int = 3, n: int = 10, seqnum: int = 1) -> dict[int, bytes]:
    return dict(encode_sdmf(contents, grid.keys(), seqnum=seqnum, salt=bytes(range(16)), k=k, n=n).shares)


def vector_named(name: str) -> dict[str, Any]:
    return next(vector for vector in grid.files() if vector["name"] == name)


async def open_version(broker: MemoryBroker, mode: MapMode = MapMode.READ) -> MutableVersion:
    request = MapRequest.of_cap(grid.write_cap().readonly, 3, 10)

    async def remap() -> Any:
        return await update_servermap(broker, request, MapMode.WRITE)

    servermap = await update_servermap(broker, request, mode)
    best = servermap.best()
    assert best is not None
    return MutableVersion(servermap, best, storage_index=grid.storage_index(), readkey=grid.keys().readkey, remap=remap)


def reads(broker: MemoryBroker) -> int:
    return sum(server.calls["slot_readv"] for server in broker.servers)


@pytest.mark.parametrize("vector", grid.files(), ids=name_of)
async def test_vectors(vector: dict[str, Any]) -> None:
    broker = MemoryBroker(vector["n"])
    grid.place(broker, grid.shares_of(vector))
    version = await open_version(broker)
    contents = grid.contents_of(vector)
    assert await version.read_all() == contents
    assert version.size == len(contents)
    assert version.version == vector["seqnum"].to_bytes(8, "big") + bytes.fromhex(vector["root_hash"])


@pytest.mark.parametrize("vector", [v for v in grid.files() if len(v["shares"]) >= v["k"]], ids=name_of)
async def test_shares_as_tahoe_stored_them(vector: dict[str, Any]) -> None:
    """Only the shares kept whole in the vectors, with a longer version's stale tail behind their end."""
    broker = MemoryBroker(4)
    grid.place(broker, {int(number): expand(share) + b"stale" * 300 for number, share in vector["shares"].items()})
    assert await (await open_version(broker)).read_all() == grid.contents_of(vector)


@pytest.mark.parametrize("segment", range(4))
async def test_mdmf_segments_in_any_order(segment: int) -> None:
    vector = vector_named("mdmf-three-segs-tail-3of10-seq1")
    broker = MemoryBroker(10)
    grid.place(broker, grid.shares_of(vector))
    version = await open_version(broker)
    size = await version.get_segment_size()
    assert size == 66
    ciphertext = await version.get_segment(segment)
    contents = grid.contents_of(vector)[segment * size : (segment + 1) * size]
    assert version.decrypt(segment, 0, ciphertext) == contents
    assert version.decrypt(segment, 5, ciphertext[5:]) == contents[5:]


async def test_kept_mdmf_ciphertext_is_decrypted_without_asking_again() -> None:
    broker = MemoryBroker(10)
    vector = vector_named("mdmf-three-segs-tail-3of10-seq1")
    grid.place(broker, grid.shares_of(vector))
    ciphertext = await (await open_version(broker)).get_segment(1)
    contents = grid.contents_of(vector)[66:132]
    assert (await open_version(broker)).decrypt(1, 0, ciphertext) == contents
    assert contents not in ciphertext


async def test_a_small_file_takes_no_second_round() -> None:
    broker = MemoryBroker(10)
    grid.place(broker, sdmf(b"directory" * 400))
    version = await open_version(broker)
    before = reads(broker)
    assert await version.read_all() == b"directory" * 400
    assert reads(broker) == before


@pytest.mark.parametrize("size", [9_000, 3 * CHUNK_BYTES + 17])
async def test_a_large_file_asks_k_servers(size: int) -> None:
    contents = bytes(range(256)) * (size // 256) + b"end"
    broker = MemoryBroker(10)
    grid.place(broker, sdmf(contents, k=2, n=4))
    version = await open_version(broker)
    before = reads(broker)
    assert await version.read_all() == contents
    chunks = -(-len(contents) // 2 // CHUNK_BYTES) if size > 2 * CHUNK_BYTES else 1
    assert reads(broker) == before + 2 * chunks


FIELDS = ["public_key", "signature", "share_hash_chain", "block_hash_tree", "share_data"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", ["sdmf-1000-3of10-seq1", "mdmf-three-segs-tail-3of10-seq1"])
async def test_damage_in_any_field(name: str, field: str) -> None:
    vector = vector_named(name)
    broker = MemoryBroker(10)
    shares = grid.shares_of(vector)
    grid.place(broker, shares)
    servers = grid.permuted(broker)
    offset, length = getattr(parse_header(shares[0]).offsets, field)

    def damage(number: int) -> None:
        servers[number].corrupt(grid.storage_index(), number, offset + length // 2)

    for number in range(7):
        damage(number)
    version = await open_version(broker, MapMode.WRITE)
    assert await version.read_all() == grid.contents_of(vector)
    # the root hash of a wrong leaf may be used by no share: only those that were looked at are reported
    assert sum(len(server.advisories) for server in servers) >= 1
    damage(7)
    if field in ("public_key", "signature"):
        request = MapRequest.of_cap(grid.write_cap(), 3, 10)
        assert (await update_servermap(broker, request, MapMode.WRITE)).best() is None
        return
    with pytest.raises(NotEnoughSharesError) as caught:
        await (await open_version(broker, MapMode.WRITE)).read_all()
    assert caught.value.needed == 3 and caught.value.found == 2
    assert any(isinstance(failure, CorruptShareError) for failure in caught.value.failures)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_damage_never_gives_wrong_bytes(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["sdmf-seven-2of3-seq1", "mdmf-tail-2of3-seq1"]))
    vector = vector_named(name)
    shares = {number: bytearray(share) for number, share in grid.shares_of(vector).items()}
    hits = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2600), st.integers(1, 255)), max_size=6))
    for number, offset, mask in hits:
        if offset < len(shares[number]):
            shares[number][offset] ^= mask

    async def read() -> bytes | None:
        broker = MemoryBroker(3)
        grid.place(broker, {number: bytes(share) for number, share in shares.items()})
        servermap = await update_servermap(broker, MapRequest.of_cap(grid.write_cap(), 2, 3), MapMode.WRITE)
        best = servermap.best()
        if best is None:
            return None
        version = MutableVersion(servermap, best, storage_index=grid.storage_index(), readkey=grid.keys().readkey)
        try:
            return await version.read_all()
        except NotEnoughSharesError:
            return None

    found = trio.run(read)
    assert found in (None, grid.contents_of(vector))
    if len({number for number, _, _ in hits}) <= 1:
        assert found is not None


async def test_a_server_that_stops_between_map_and_read(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    contents = bytes(30_000)
    grid.place(broker, sdmf(contents))
    version = await open_version(broker)
    grid.permuted(broker)[0].pause()
    began = trio.current_time()
    assert await version.read_all() == contents
    assert trio.current_time() - began == pytest.approx(STALL_S)


async def test_servers_that_fail_between_map_and_read() -> None:
    broker = MemoryBroker(10)
    contents = bytes(30_000)
    grid.place(broker, sdmf(contents))
    version = await open_version(broker)
    for server in grid.permuted(broker)[:5]:  # of the six the map knows: another map is needed
        server.connected = False
    assert await version.read_all() == contents


async def test_a_replaced_version_is_not_called_corrupt() -> None:
    broker = MemoryBroker(10)
    grid.place(broker, sdmf(bytes(30_000)))
    version = await open_version(broker)
    grid.place(broker, sdmf(bytes(31_000), seqnum=2))
    with pytest.raises(NotEnoughSharesError):
        await version.read_all()
    assert not any(server.advisories for server in broker.servers)


async def test_many_shares_on_one_server() -> None:
    broker = MemoryBroker(1)
    grid.place(broker, sdmf(bytes(9_000)))
    assert await (await open_version(broker)).read_all() == bytes(9_000)


async def test_duplicates_stand_in_for_each_other() -> None:
    """k different shares, each twice; of every pair one copy is damaged."""
    broker = MemoryBroker(6)
    shares = sdmf(b"x" * 5_000)
    for position, server in enumerate(grid.permuted(broker)):
        number = position % 3
        grid.put(server, number, shares[number])
        if position in (0, 4, 2):
            server.corrupt(grid.storage_index(), number, 830)
    assert await (await open_version(broker)).read_all() == b"x" * 5_000
