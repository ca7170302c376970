"""Checker, traversal and repair of mutable things, on servers in memory: who may, what is kept, what is merged."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from grid.check_history import FILE_NAME, RESULTS_KEPT, CheckHistory
from grid.errors import NodeDirectoryError, NotWriteableError
from grid.formats.caps import Cap, DirectoryCap, LiteralCap, UnknownCap
from grid.nodes.checker import Checker
from grid.nodes.deep_stats import DeepStats, bucket_of
from grid.nodes.dirnode import DirectoryNode, merge_entries
from grid.nodes.nodemaker import NodeMaker
from grid.nodes.traversal import Visit, walk
from grid.operations.uploadables import DataUploadable
from tests.grid.nodes.test_dirnode import elsewhere, maker
from tests.grid.operations import mutable_grid as grid
from tests.grid.operations.grid import noise
from tests.memory_server import MemoryBroker, MemoryServer

LIT = LiteralCap(b"lit")
SUMMARY_OF_TWO_HEADS = "multiple versions are recoverable"


def checker(broker: MemoryBroker, nodes: NodeMaker, history: CheckHistory | None = None) -> Checker:
    return Checker(broker, grid.SECRETS, nodes, history or CheckHistory(None))


async def upload(nodes: NodeMaker, size: int, seed: int = 0) -> Cap:
    return (await nodes.uploader.upload(DataUploadable(noise(size, seed), b"convergence"))).cap


def holders(broker: MemoryBroker, storage_index: bytes | None) -> list[MemoryServer]:
    assert storage_index is not None
    return [s for s in broker.servers if storage_index in s.immutable or storage_index in s.slots]


async def visits(nodes: NodeMaker, root: Cap) -> list[Visit]:
    async with aclosing(walk(nodes, root)) as walked:
        return [visit async for visit in walked]


# --- repair, leases, history


async def test_repair_of_a_mutable_file() -> None:
    """Lost, old and damaged shares are replaced by those of the newest version, the others left alone; then it is
    healthy, every byte of it.
    """
    broker = MemoryBroker(10)
    nodes = maker(broker)
    node = await nodes.create_mutable_file(noise(4000))
    index = node.get_storage_index()
    servers = holders(broker, index)
    before = [{n: bytearray(share) for n, share in server.slots[index].shares.items()} for server in servers]
    await node.replace(noise(4000, 1))
    newest = [{n: bytearray(share) for n, share in server.slots[index].shares.items()} for server in servers]
    servers[0].slots[index].shares.clear()
    for number in servers[1].slots[index].shares:
        servers[1].slots[index].shares[number] = before[1][number]
    for number in servers[2].slots[index].shares:
        servers[2].corrupt(index, number, 1000)
    for number in servers[3].slots[index].shares:
        servers[3].corrupt(index, number, 10)
    for server in servers:
        server.calls.clear()
    results = await checker(broker, maker(broker)).repair(node.get_uri(), verify=True)
    assert results.attempted and results.successful and not results.before.healthy
    assert [server.calls["slot_writev"] for server in servers] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    seen = await checker(broker, nodes).verify(str(node.get_verifier()))
    assert seen.healthy and not seen.corrupt and not seen.invalid and seen.happiness == 10
    assert [server.slots[index].shares for server in servers] == newest, "the very same shares, of version 2"
    assert await node.download_to_data() == noise(4000, 1)


@pytest.mark.parametrize("weaker", ["readonly", "verifier"])
async def test_repairing_a_mutable_file_takes_the_write_cap(weaker: str) -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    node = await nodes.create_dirnode({"a": (LIT, {})})
    cap = getattr(node.cap, weaker)
    assert not (await checker(broker, nodes).repair(cap)).attempted
    holders(broker, node.get_storage_index())[0].slots.clear()
    with pytest.raises(NotWriteableError, match="write cap"):
        await checker(broker, nodes).repair(cap)
    assert (await checker(broker, nodes).repair(node.cap)).successful


async def test_a_caretaker_with_a_verify_cap_repairs_an_immutable_file() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    cap = await upload(nodes, 20_000)
    holders(broker, cap.storage_index)[0].immutable.clear()
    assert (await checker(broker, nodes).repair(str(cap.verifier))).successful
    assert (await checker(broker, nodes).check(str(cap.verifier))).healthy
    assert await nodes.create_from_cap(cap).download_to_data() == noise(20_000)


async def test_a_newer_version_that_may_come_back_is_not_written_over() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    node = await nodes.create_mutable_file(b"old")
    index = node.get_storage_index()
    old = {s: {n: bytearray(share) for n, share in s.slots[index].shares.items()} for s in broker.servers}
    await node.replace(b"new")
    for server in broker.servers[2:]:
        server.slots[index].shares = old[server]
    results = await checker(broker, maker(broker)).repair(node.get_uri())
    assert results.attempted and not results.successful and results.reason
    assert (await checker(broker, nodes).check(node.get_uri())).unrecoverable_versions == 1


async def two_heads(broker: MemoryBroker) -> DirectoryNode:
    """A directory of which two writers published version 2 at once; each added a child, and changed one."""
    node = await maker(broker).create_dirnode({"base": (LIT, {}), "both.txt": (LIT, {})})
    index = node.get_storage_index()
    assert index is not None
    first = {server: dict(server.slots[index].shares) for server in broker.servers}
    heads: list[dict[MemoryServer, dict[int, bytearray]]] = []
    for name in ("one", "two"):
        for server, shares in first.items():
            server.slots[index].shares = {number: bytearray(share) for number, share in shares.items()}
        other = elsewhere(broker, node)
        child = LiteralCap(name.encode())
        await other.set_caps([(name, child, {}), ("both.txt", child, {})])
        heads.append({server: dict(server.slots[index].shares) for server in broker.servers})
    for server in broker.servers[:5]:
        server.slots[index].shares = heads[0][server]
    return node


async def test_two_versions_of_a_directory_are_merged() -> None:
    broker = MemoryBroker(10)
    node = await two_heads(broker)
    nodes = maker(broker)
    results = await checker(broker, nodes).repair(node.cap)
    assert SUMMARY_OF_TWO_HEADS in results.before.summary
    assert results.successful and "merged" in results.reason
    children = await nodes.create_from_cap(node.cap).list()
    assert set(children) == {"base", "both.txt", "both (version 2).txt", "one", "two"}
    contents = {children[name][0].cap.data for name in ("both.txt", "both (version 2).txt")}
    assert contents == {b"one", b"two"}


def test_merging_names_without_a_suffix() -> None:
    from grid.formats.directory import DirEntry

    def head(**children: bytes) -> dict[str, DirEntry]:
        return {name: DirEntry(name, LiteralCap(data), {}) for name, data in children.items()}

    merged = merge_entries([head(a=b"1", same=b"s"), head(a=b"2", same=b"s"), {".rc": DirEntry(".rc", LIT, {})}])
    assert {name: entry.cap for name, entry in merged.items()} == {
        "a": LiteralCap(b"1"),
        "a (version 2)": LiteralCap(b"2"),
        "same": LiteralCap(b"s"),
        ".rc": LIT,
    }
    assert all(entry.name == name for name, entry in merged.items())


async def test_leases_are_renewed_where_shares_are() -> None:
    broker = MemoryBroker(12)
    nodes = maker(broker)
    for cap in (await upload(nodes, 5000), (await nodes.create_dirnode({})).cap):
        for server in broker.servers:
            server.leases.clear()
            server.calls.clear()
        broker.servers[3].fail_on.add("add_lease")
        care = checker(broker, nodes)
        results = await care.check(cap.verifier)
        there = holders(broker, cap.storage_index)
        failed = broker.servers[3] in there
        assert await care.renew_leases(results) == (10 - failed, int(failed))
        for server in broker.servers:
            assert (cap.storage_index in server.leases) == (server in there and server is not broker.servers[3])
            assert server.calls["add_lease"] == (server in there)
        broker.servers[3].fail_on.clear()
    assert await checker(broker, nodes).renew_leases(await checker(broker, nodes).check(LIT)) == (0, 0)


async def test_results_are_remembered(tmp_path: Path) -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    cap = await upload(nodes, 5000)
    with CheckHistory(tmp_path) as history:
        care = checker(broker, nodes, history)
        await care.check(cap.verifier)
        holders(broker, cap.storage_index)[0].immutable.clear()
        await care.verify(cap)
    with CheckHistory(tmp_path) as history:
        first, second = checker(broker, nodes, history).checker_results_for(str(cap.verifier))
        assert first[0] <= second[0]
        assert [results["results"]["healthy"] for _, results in (first, second)] == [True, False]
        for _ in range(2 * RESULTS_KEPT):
            await checker(broker, nodes, history).check(cap)
        assert len(checker(broker, nodes, history).checker_results_for(cap)) == RESULTS_KEPT
    file = tmp_path / "tahoefs" / FILE_NAME
    assert file.stat().st_mode & 0o777 == 0o600
    for written in file.parent.iterdir():
        assert b"URI:" not in written.read_bytes()


def test_a_history_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "tahoefs").mkdir()
    (tmp_path / "tahoefs" / FILE_NAME).write_bytes(b"not SQLite" * 1000)
    with pytest.raises(NodeDirectoryError, match=FILE_NAME):
        CheckHistory(tmp_path)


# --- walking


async def tree(nodes: NodeMaker) -> dict[str, Any]:
    """A tree with a cycle, a directory linked twice, and every kind of child that needs no key of its own."""
    chk = await upload(nodes, 5000)
    frozen = (await nodes.create_immutable_dirnode({"f": (chk, {}), "l": (LIT, {})})).cap
    deep = await nodes.create_dirnode({"again": (chk, {}), "x": (LIT, {})})
    root = await nodes.create_dirnode(
        {
            "z file": (chk, {}),
            "deep": (deep.cap, {}),
            "a lit": (LIT, {}),
            "frozen": (frozen, {}),
            "linked twice": (deep.cap, {}),
            "unknown": (UnknownCap(None, "ro.lafs://x"), {}),
            "empty": (DirectoryCap(LiteralCap(b"")), {}),
        }
    )
    await deep.set_uri("up", root.get_uri())
    return {"root": root, "chk": chk, "frozen": frozen, "deep": deep}


async def test_each_object_once_files_before_directories() -> None:
    nodes = maker(MemoryBroker(10))
    made = await tree(nodes)
    found = await visits(nodes, made["root"].cap)
    assert ["/".join(visit.path) for visit in found] == [
        *("", "unknown", "a lit", "z file", "deep", "deep/x", "empty", "frozen", "frozen/l"),
    ]
    assert found[0].children == 7 and found[3].size == 5000
    everything = {str(made[name].verifier) for name in ("chk", "frozen")}
    everything |= {str(made[name].cap.verifier) for name in ("root", "deep")}
    assert await made["root"].build_manifest() == everything


async def test_what_cannot_be_read_is_visited() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    made = await tree(nodes)
    for server in holders(broker, made["deep"].get_storage_index()):
        del server.slots[made["deep"].get_storage_index()]
    found = {visit.path: visit for visit in await visits(maker(broker), made["root"].cap)}
    assert found[("deep",)].error is not None and found[("frozen", "l")].error is None
    assert not [path for path in found if path[:1] == ("deep",) and len(path) > 1]


async def test_walking_a_file_or_by_verify_cap() -> None:
    nodes = maker(MemoryBroker(10))
    made = await tree(nodes)
    for cap in (made["chk"], made["root"].cap.verifier, LIT):
        assert [(visit.path, visit.cap) for visit in await visits(nodes, cap)] == [((), cap)]


async def test_listings_are_not_kept() -> None:
    nodes = maker(MemoryBroker(10))
    made = await tree(nodes)
    await visits(nodes, made["root"].cap)
    assert made["root"]._contents is None and made["deep"]._contents is None


async def test_deep_stats() -> None:
    nodes = maker(MemoryBroker(10))
    made = await tree(nodes)
    stats = DeepStats()
    for visit in await visits(nodes, made["root"].cap):
        stats.add(visit)
    found = stats.to_json()
    assert (found["count-files"], found["count-immutable-files"], found["count-literal-files"]) == (4, 1, 3)
    assert (found["count-directories"], found["count-unknown"], found["count-mutable-files"]) == (4, 1, 0)
    assert found["size-files-histogram"] == [[1, 3, 3], [3163, 10000, 1]]
    assert found["largest-directory-children"] == 7


@pytest.mark.parametrize(
    ("size", "bucket"), [(0, (0, 0)), (1, (1, 3)), (3, (1, 3)), (4, (4, 10)), (316, (101, 316)), (317, (317, 1000))]
)
def test_buckets(size: int, bucket: tuple[int, int]) -> None:
    assert bucket_of(size) == bucket
