"""DirectoryNode and NodeMaker: children of every kind, one publish for many changes, races, what is kept untouched."""

from __future__ import annotations

import gc
import itertools
import random
import threading
import weakref
from functools import cache
from typing import Any

import pytest
import trio
import trio.testing

from grid.errors import (
    BadCapError,
    NoSuchChildError,
    NotEnoughSharesError,
    NotWriteableError,
    UncoordinatedWriteError,
    WrongKindError,
)
from grid.formats.caps import (
    Cap,
    CHKReadCap,
    DirectoryCap,
    LiteralCap,
    MDMFWriteCap,
    SDMFReadCap,
    SDMFWriteCap,
    UnknownCap,
    child_cap,
)
from grid.formats.directory import DirEntry, encrypt_rwcap, pack_directory
from grid.formats.netstring import netstring
from grid.nodes import dirnode as dirnode_module
from grid.nodes.dirnode import DirectoryNode
from grid.nodes.immutable import ImmutableFileNode, LiteralFileNode
from grid.nodes.mutable import MutableFileNode
from grid.nodes.nodemaker import NODES_KEPT, NodeMaker, UnknownNode
from grid.operations.keys import KeyPool, MutableKeys, make_keys
from grid.operations.upload import Uploader
from grid.operations.uploadables import DataUploadable
from tests.grid.operations import mutable_grid as grid
from tests.memory_server import MemoryBroker

LIT = LiteralCap(b"small")
CHK = CHKReadCap(bytes(16), bytes(32), 3, 10, 1234)
FILE = SDMFWriteCap(bytes(range(16)), bytes(32))


@cache
def made(index: int) -> MutableKeys:
    return make_keys()


def maker(broker: MemoryBroker, first_key: int = 0) -> NodeMaker:
    """One client. Keys come ready-made, since worker threads and a virtual clock do not go together."""
    pool = KeyPool()
    pool._ready.extend(made(index) for index in range(first_key, first_key + 3))
    uploader = Uploader(broker, grid.SECRETS, {"k": 3, "happy": 1, "n": 10, "max_segment_size": 1 << 20})
    return NodeMaker(broker, grid.SECRETS, uploader, pool, k=3, n=10, convergence=b"secret")


def elsewhere(broker: MemoryBroker, node: DirectoryNode) -> DirectoryNode:
    """The same directory as another client's."""
    nodes = maker(broker)
    found = nodes.create_from_cap(node.cap)
    assert isinstance(found, DirectoryNode) and found is not node
    return found


def calls(broker: MemoryBroker) -> dict[str, int]:
    total: dict[str, int] = {}
    for server in broker.servers:
        for kind, count in server.calls.items():
            total[kind] = total.get(kind, 0) + count
        server.calls.clear()
    return total


async def caps(node: DirectoryNode) -> dict[str, Cap]:
    return {name: entry.cap for name, entry in (await node.read()).entries.items()}


def link(name: str, cap: Cap) -> Any:
    return lambda old: DirEntry(name, cap, old.metadata if old else {})


# --- making and reading


async def test_new_directory_with_children_takes_one_publish() -> None:
    broker = MemoryBroker(10)
    children: dict[str, Any] = {"b": (LIT, {"mtime": 1}), "a": (CHK, {}), "é": (FILE, {})}
    node = await maker(broker).create_dirnode(children)
    assert calls(broker) == {"slot_writev": 10}
    entries = (await elsewhere(broker, node).read()).entries
    assert {name: (entry.cap, entry.metadata) for name, entry in entries.items()} == children  # as given: no link times


async def test_an_empty_directory() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode()
    assert await elsewhere(broker, node).list() == {}
    assert not await node.has_child("x")
    with pytest.raises(NoSuchChildError):
        await node.get("x")


async def test_children_are_nodes_of_their_kinds() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    sub = DirectoryCap(SDMFReadCap(bytes(16), bytes(32)))
    unknown = child_cap("lafs://rw", "ro.lafs://ro", deep_immutable=False)
    children: dict[str, Cap] = {
        "lit": LIT, "chk": CHK, "sdmf": FILE, "mdmf": MDMFWriteCap(bytes(16), bytes(32)), "dir": sub,
        "dirchk": DirectoryCap(CHK), "what": unknown,
    }  # fmt: skip
    node = await nodes.create_dirnode({name: (cap, {}) for name, cap in children.items()})
    listing = await elsewhere(broker, node).list()
    kinds = {name: type(child) for name, (child, _) in listing.items()}
    assert kinds == {
        "lit": LiteralFileNode, "chk": ImmutableFileNode, "sdmf": MutableFileNode, "mdmf": MutableFileNode,
        "dir": DirectoryNode, "dirchk": DirectoryNode, "what": UnknownNode,
    }  # fmt: skip
    assert {name: child.cap for name, (child, _) in listing.items()} == children


async def test_an_unchanged_directory_is_not_read_again() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode({f"{n:04}": (CHK, {}) for n in range(300)})
    other = elsewhere(broker, node)
    first = await other.read()
    assert len(first.entries) == 300
    calls(broker)
    assert await other.read() is first
    assert calls(broker) == {"slot_readv": 6}  # only the map; the contents are far more than the first 4000 bytes


async def test_a_large_directory() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode({f"name {n:06}": (CHK, {"n": n}) for n in range(20_000)})
    other = elsewhere(broker, node)
    await other.modify({"name 000007": lambda old: None, "new": link("new", LIT)})
    found = await caps(node)
    assert len(found) == 20_000 and "name 000007" not in found and found["new"] == LIT


async def test_a_holder_of_the_read_cap_sees_read_caps() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    node = await nodes.create_dirnode({"file": (FILE, {})})
    readonly = maker(broker).create_from_cap(node.cap.readonly)
    assert readonly.is_readonly() and readonly.is_mutable()
    assert await caps(readonly) == {"file": FILE.readonly}
    assert readonly.get_uri() == node.get_readonly_uri()
    with pytest.raises(NotWriteableError):
        await readonly.delete("file")
    with pytest.raises(NotWriteableError):
        await readonly.create_empty_directory("x")
    assert await caps(node) == {"file": FILE}


async def test_immutable_directories() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    small = await nodes.create_immutable_dirnode({})
    assert small.cap == DirectoryCap(LiteralCap(b""))
    large = await nodes.create_immutable_dirnode({"a": (LIT, {"x": 1}), "b": (CHK, {}), "c": (small.cap, {})})
    assert large.cap.kind == "dir-chk" and not large.is_mutable()
    other = elsewhere(broker, large)
    assert await caps(other) == {"a": LIT, "b": CHK, "c": small.cap}
    assert (await other.get_metadata_for("a")) == {"x": 1}
    with pytest.raises(NotWriteableError):
        await other.set_uri("d", str(LIT))
    with pytest.raises(BadCapError):
        await nodes.create_immutable_dirnode({"mutable": (FILE.readonly, {})})


async def test_unreadable() -> None:
    broker = MemoryBroker(10)
    node = maker(broker).create_from_cap(DirectoryCap(FILE))
    with pytest.raises(NotEnoughSharesError):
        await node.read()


# --- changing


async def test_many_changes_are_one_publish() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode({"old": (LIT, {}), "gone": (LIT, {})})
    calls(broker)
    changes: dict[str, Any] = {f"{n}": link(f"{n}", CHK) for n in range(1000)}
    contents = await node.modify({**changes, "gone": lambda old: None})
    assert calls(broker) == {"slot_writev": 10}
    assert await elsewhere(broker, node).read() == contents
    assert len(contents.entries) == 1001


async def test_entries_are_read_back_as_modify_returned_them() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode()
    contents = await node.modify({"é": link("e\u0301", FILE), "ro": link("ro", CHK)})
    again = await elsewhere(broker, node).read()
    assert again == contents
    for name, entry in again.entries.items():
        assert bytes(entry.raw or b"") == bytes(contents.entries[name].raw or b"-")


async def test_no_write_children_are_diminished() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode()
    await node.set_uri("file", str(FILE), {"no-write": True})
    assert await caps(node) == {"file": FILE.readonly} == await caps(elsewhere(broker, node))


async def test_link_times() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode({"bare": (LIT, {})})
    times = itertools.count(100.0, 100.0)
    node._clock = lambda: next(times)
    await node.set_uri("a", str(LIT), {"user": 1, "tahoe": {"linkcrtime": 5}})
    assert await node.get_metadata_for("a") == {"user": 1, "tahoe": {"linkcrtime": 100.0, "linkmotime": 100.0}}
    await node.set_uri("a", str(CHK))
    assert await node.get_metadata_for("a") == {"user": 1, "tahoe": {"linkcrtime": 100.0, "linkmotime": 200.0}}
    await node.set_metadata_for("a", {"other": 2})
    assert await node.get_metadata_for("a") == {"other": 2, "tahoe": {"linkcrtime": 100.0, "linkmotime": 300.0}}
    assert await node.get_metadata_for("bare") == {}  # untouched, so still without any
    with pytest.raises(NoSuchChildError):
        await node.set_metadata_for("none", {})


async def test_delete() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode({"a": (LIT, {}), "b": (LIT, {})})
    await node.delete("a")
    assert await caps(elsewhere(broker, node)) == {"b": LIT}
    with pytest.raises(NoSuchChildError):
        await node.delete("a")


async def test_what_no_one_understands_is_kept_byte_for_byte() -> None:
    """Odd metadata formatting, an unknown cap, a child without caps: another client's, copied as they are."""
    broker = MemoryBroker(10)
    keys = grid.keys()

    def entry(name: bytes, ro: bytes, metadata: bytes) -> bytes:
        slot = encrypt_rwcap(keys.writekey, b"")
        return netstring(netstring(name) + netstring(ro) + netstring(slot) + netstring(metadata))

    odd = [
        entry(b"a", b"lafs://future", b'{"k" :  1.50,"tahoe":{}}'),
        entry(b"c", b"", b"{}"),
        entry(b"d", str(LIT).encode(), '{"é":"ü"}'.encode()),
    ]
    file = await grid.created(broker, b"".join(odd))
    node = maker(broker).create_from_cap(DirectoryCap(file.cap))
    await node.set_uri("b", str(LIT))
    contents = await grid.new_node(broker).download_to_data()
    assert contents.startswith(odd[0]) and contents.endswith(odd[1] + odd[2])
    assert isinstance((await node.read()).entries["a"].cap, UnknownCap)


async def test_unknown_caps_move_untouched_but_half_ones_are_refused() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    unknown = child_cap("lafs://write", "lafs://read", deep_immutable=False)
    one, two = await nodes.create_dirnode({"x": (unknown, {})}), await nodes.create_dirnode()
    await one.move_child_to("x", two)
    assert await caps(elsewhere(broker, two)) == {"x": unknown}
    with pytest.raises(BadCapError):
        await two.modify({"y": link("y", UnknownCap("lafs://write"))})
    with pytest.raises(BadCapError):
        await two.set_uri("y", "URI:garbled")
    assert await caps(elsewhere(broker, two)) == {"x": unknown}


async def test_move() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    one = await nodes.create_dirnode({"x": (LIT, {"user": 1, "tahoe": {"linkcrtime": 7.0}}), "y": (CHK, {})})
    two = await nodes.create_dirnode({"z": (CHK, {})})
    await one.move_child_to("x", two, "z")
    assert await caps(one) == {"y": CHK} and await caps(two) == {"z": LIT}
    metadata = await two.get_metadata_for("z")
    assert metadata["user"] == 1 and metadata["tahoe"]["linkcrtime"] > 7
    calls(broker)
    await one.move_child_to("y", one, "new")
    assert calls(broker)["slot_writev"] == 10
    assert await caps(one) == {"new": CHK}
    await one.move_child_to("new", one)
    await one.move_child_to("new", elsewhere(broker, one), "a")
    assert await caps(elsewhere(broker, one)) == {"a": CHK}
    with pytest.raises(NoSuchChildError):
        await one.move_child_to("none", two)
    with pytest.raises(NoSuchChildError):
        await one.move_child_to("none", one, "x")


async def test_subdirectories_and_paths() -> None:
    broker = MemoryBroker(10)
    root = await maker(broker).create_dirnode({"file": (LIT, {})})
    sub = await root.create_empty_directory("sub")
    await sub.add_file("deep", DataUploadable(b"contents of the deep file" * 10, b"secret"))
    found = await elsewhere(broker, root).get_child_at_path("sub/deep")
    assert await found.download_to_data() == b"contents of the deep file" * 10
    assert await root.get_child_at_path(["sub"]) is sub
    assert await root.get_child_at_path("") is root
    with pytest.raises(WrongKindError):
        await root.get_child_at_path("file/deep")
    with pytest.raises(NoSuchChildError):
        await root.get_child_at_path("sub/none")


async def test_a_change_that_raises_gives_the_whole_up() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode({"a": (LIT, {})})
    calls(broker)

    def refuse(old: DirEntry | None) -> DirEntry | None:
        raise NoSuchChildError("x")

    with pytest.raises(NoSuchChildError):
        await node.modify({"a": lambda old: None, "x": refuse})
    assert calls(broker) == {"slot_readv": 10}  # not by memory alone
    assert await caps(node) == {"a": LIT}


async def test_no_change_is_seen_on_the_newest_version() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode()
    await elsewhere(broker, node).set_uri("x", str(LIT))
    await node.delete("x")  # which the node does not know of yet
    assert await caps(elsewhere(broker, node)) == {}


# --- other writers


@pytest.mark.parametrize("seed", range(4))
async def test_racing_writers_lose_no_name(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    random.seed(seed)
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode()
    for server in broker.servers:
        server.latency_s = random.random() / 10
    writers = [node, elsewhere(broker, node), elsewhere(broker, node)]

    async def write(writer: DirectoryNode, prefix: str) -> None:
        for count in range(4):
            await writer.modify({f"{prefix}{count}{i}": link(f"{prefix}{count}{i}", LIT) for i in "xy"})
            await writer.modify({f"{prefix}{count}x": lambda old: None})
            await trio.sleep(random.random())

    async with trio.open_nursery() as nursery:
        for writer, prefix in zip(writers, "abc", strict=True):
            nursery.start_soon(write, writer, prefix)
    names = set((await elsewhere(broker, node).read()).entries)
    assert names == {f"{prefix}{count}y" for prefix in "abc" for count in range(4)}


async def test_changes_are_applied_to_what_the_other_writer_left() -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode({"x": (LIT, {})})
    await elsewhere(broker, node).set_uri("x", str(CHK))
    seen: list[Cap | None] = []

    def change(old: DirEntry | None) -> DirEntry:
        seen.append(old.cap if old else None)
        return DirEntry("x", FILE, {})

    await node.modify({"x": change})
    assert seen == [LIT, CHK]


async def test_giving_up_is_an_error(autojump_clock: trio.testing.MockClock) -> None:
    broker = MemoryBroker(10)
    node = await maker(broker).create_dirnode()
    for server in grid.permuted(broker)[:1]:

        async def always_surprised(*_: object) -> tuple[bool, dict[int, list[bytes]]]:
            return False, {}

        server.slot_testv_and_readv_and_writev = always_surprised  # type: ignore[method-assign,assignment]
    with pytest.raises(UncoordinatedWriteError):
        await node.set_uri("x", str(LIT))


# --- nodes


async def test_nodes_are_shared_by_cap() -> None:
    broker = MemoryBroker(10)
    nodes = maker(broker)
    assert nodes.create_from_cap(FILE) is not nodes.create_from_cap(FILE.readonly)
    held = nodes.create_from_cap(DirectoryCap(FILE))
    assert nodes.create_from_cap(str(DirectoryCap(FILE))) is held
    assert nodes.create_from_cap(FILE) is held.file
    made_here = await nodes.create_dirnode()
    assert nodes.create_from_cap(made_here.cap) is made_here


async def test_nodes_are_kept_for_a_while_and_not_for_ever() -> None:
    nodes = maker(MemoryBroker(1))
    first = weakref.ref(nodes.create_from_cap(DirectoryCap(FILE)))
    gc.collect()
    assert first() is nodes.create_from_cap(DirectoryCap(FILE))
    for number in range(NODES_KEPT):
        nodes.create_from_cap(SDMFReadCap(number.to_bytes(16, "big"), bytes(32)))
    gc.collect()
    assert first() is None


async def test_mdmf_directories_and_files() -> None:
    nodes = maker(MemoryBroker(10))
    directory = await nodes.create_dirnode({"lit": (LIT, {})}, format="mdmf")
    assert directory.cap.kind == "dir-mdmf"
    file = await nodes.create_mutable_file(b"contents", format="mdmf")
    await directory.set_uri("file", file.get_uri(), None)
    await file.append(b" and more")
    children = await maker(nodes._broker).create_from_cap(directory.cap).list()
    assert set(children) == {"lit", "file"}
    assert await children["file"][0].download_to_data() == b"contents and more"


async def test_verify_and_unknown_caps_give_a_node_that_does_nothing() -> None:
    nodes = maker(MemoryBroker(1))
    for cap in (FILE.verifier, DirectoryCap(FILE).verifier, CHK.verifier, UnknownCap(None, "ro.lafs://x")):
        assert isinstance(nodes.create_from_cap(cap), UnknownNode)


def test_repr_shows_no_cap() -> None:
    nodes = maker(MemoryBroker(1))
    for cap in (FILE, DirectoryCap(FILE), UnknownCap("lafs://x", None)):
        assert repr(nodes.create_from_cap(cap)).count(":") == 0


async def test_many_new_entries_are_made_in_a_worker_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes tens of microseconds: thousands of them would hold up everything else."""
    node = await maker(MemoryBroker(10)).create_dirnode()
    threads: set[threading.Thread] = set()

    def watched(*args: Any, **options: Any) -> bytes:
        threads.add(threading.current_thread())
        return pack_directory(*args, **options)

    monkeypatch.setattr(dirnode_module, "pack_directory", watched)
    await node.modify({f"{number}": lambda _, n=number: DirEntry(f"{n}", LIT, {}) for number in range(50)})  # type: ignore[misc]
    assert threads and threading.main_thread() not in threads
    contents = await node.modify({"none": lambda old: old})
    assert len(contents.entries) == 50 and all(entry.raw for entry in contents.entries.values())
