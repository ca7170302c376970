"""The workspace over real operations and servers in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from attrs import evolve

from cache import PendingFile, Workspace, open_workspace
from cache.workspace import UPLOADS_SHOWN_MAX
from grid.errors import (
    ChildExistsError,
    FormatError,
    GridError,
    NoSuchChildError,
    NotWriteableError,
    PeerTimeoutError,
    WrongKindError,
)
from grid.formats.caps import LiteralCap, UnknownCap
from tests.cache.memory_client import QUICK, MemoryClient, get, memory_client, mounted, put

DATA = bytes(range(256)) * 16  # 4 KiB
SLOW = evolve(QUICK, publish_quiet_s=3600.0, publish_latest_s=3600.0, new_directory_latest_s=3600.0)


async def listing(client: MemoryClient, workspace: Workspace) -> dict[str, object]:
    return await client.listing(workspace.root.cap)


async def test_what_is_stored_is_on_the_grid_after_wait(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        position, target = await put(workspace, workspace.root, "file", DATA, {"mtime": 5})
        assert isinstance(target, PendingFile) and target.state == "pending" and target.size == len(DATA)
        assert await get(workspace, target) == DATA  # from the spool
        await workspace.wait(position)
        assert target.state == "stored" and target.cap is not None
        assert await client.listing(workspace.root.cap) == {"file": target.cap}
        assert await client.fetch(target.cap) == DATA
        entry = workspace.root.get("file")
        assert entry is not None and entry.target == target.cap
        assert entry.metadata["mtime"] == 5 and "linkcrtime" in entry.metadata["tahoe"]
        calls = client.calls("get_buckets")
        assert await get(workspace, target.cap) == DATA  # still local
        assert client.calls("get_buckets") == calls


async def test_short_files_need_no_server(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        _, target = await put(workspace, workspace.root, "short", b"x" * 55)
        assert target == LiteralCap(b"x" * 55)
        await workspace.wait()
        assert client.uploads == 0
        assert await listing(client, workspace) == {"short": target}


async def test_a_thousand_files_cost_a_handful_of_publishes(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        for number in range(1000):
            await put(workspace, workspace.root, f"{number:04}", b"number %d" % number)
            await trio.lowlevel.checkpoint()
        await workspace.wait()
        assert len(await listing(client, workspace)) == 1000
        assert workspace.status()["publishes"] <= 5


async def test_uploads_of_many_files_are_published_together(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        for number in range(60):
            await put(workspace, workspace.root, f"{number:04}", DATA + b"%d" % number)
        await workspace.wait()
        assert len(await listing(client, workspace)) == 60
        assert client.uploads == 60
        assert workspace.status()["publishes"] <= 2


async def test_a_new_directory_that_stays_busy_is_held_back_longer_after_its_first_publish(tmp_path: Path) -> None:
    """Someone copies a big tree in over a slow line: one publish after another would send it over and over."""
    options = evolve(QUICK, publish_latest_s=0.0, new_directory_latest_s=0.05)
    async with mounted(tmp_path, options) as (_, workspace):
        made = await workspace.make_directory(workspace.root, "dir", {})
        with trio.fail_after(30):
            while made.is_new:  # always something on its way
                await put(workspace, made, "file", DATA)
                await workspace.link(made, f"{len(made.entries())}", LiteralCap(b"x"), {})
                await trio.sleep(0.001)
        assert made.hold_s == 2 * options.new_directory_latest_s


async def test_what_is_removed_before_it_was_sent_is_not_sent(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        client.pause()
        before = client.calls("slot_writev")
        _, target = await put(workspace, workspace.root, "file", DATA)
        await workspace.unlink(workspace.root, "file")
        await put(workspace, workspace.root, "other", DATA)
        _, second = await put(workspace, workspace.root, "other", DATA * 2)
        await workspace.unlink(workspace.root, "other")
        await workspace.wait()
        assert target.cap is None and second.cap is None
        assert workspace.root.entries() == {}
        assert workspace.status()["pending"] == {"files": 0, "bytes": 0, "directories": 0}
        assert workspace.status()["journal"]["bytes"] == 0 == workspace._spool.used_bytes
        client.resume()
        assert client.calls("write") == 0 and client.calls("slot_writev") == before


async def test_replacing_a_pending_file_cancels_its_upload(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        client.pause()
        _, first = await put(workspace, workspace.root, "file", DATA)
        while not client.calls("allocate_buckets"):
            await trio.lowlevel.checkpoint()
        _, second = await put(workspace, workspace.root, "file", DATA * 2)
        client.resume()
        await workspace.wait()
        assert first.cap is None
        assert await client.fetch(second.cap) == DATA * 2
        assert all(not server.incoming for server in client.servers)


async def test_a_pending_file_keeps_its_upload_when_it_is_renamed(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        client.pause()
        _, target = await put(workspace, workspace.root, "before", DATA)
        made = await workspace.make_directory(workspace.root, "sub", {})
        await workspace.rename(workspace.root, "before", made, "after", {"moved": True})
        assert workspace.root.get("before") is None
        client.resume()
        await workspace.wait()
        assert client.uploads == 1
        assert await client.listing(made.cap) == {"after": target.cap}
        assert await listing(client, workspace) == {"sub": made.cap}


async def test_a_new_tree_is_published_once_each_bottom_up(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        parent = workspace.root
        chain = []
        for depth in range(4):
            parent = await workspace.make_directory(parent, f"d{depth}", {"depth": depth})
            chain.append(parent)
            await put(workspace, parent, "file", DATA + b"%d" % depth)
        assert all(directory.cap is None for directory in chain)
        await workspace.wait()
        assert workspace.status()["publishes"] == 5
        found = await listing(client, workspace)
        for depth, directory in enumerate(chain):
            assert found[f"d{depth}"] == directory.cap
            assert directory.cap is not None and workspace.directory(directory.cap) is directory
            found = await client.listing(directory.cap)
            assert "file" in found


async def test_rename_across_directories_links_before_it_unlinks(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        a = await workspace.make_directory(workspace.root, "a", {})
        b = await workspace.make_directory(workspace.root, "b", {})
        _, target = await put(workspace, a, "file", DATA)
        await workspace.wait()
        seen: list[tuple[bool, bool]] = []
        node_a, node_b = client.create_node_from_uri(a.cap), client.create_node_from_uri(b.cap)
        await workspace.rename(a, "file", b, "file", {})
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while True:
                    in_a = "file" in (await node_a.read()).entries
                    seen.append((in_a, "file" in (await node_b.read()).entries))

            nursery.start_soon(watch)
            await workspace.wait()
            nursery.cancel_scope.cancel()
        assert await client.listing(a.cap) == {} and await client.listing(b.cap) == {"file": target.cap}
        assert (False, False) not in seen


async def test_wrapping_a_file_in_a_directory_of_its_own_name(tmp_path: Path) -> None:
    """mkdir tmp; mv a tmp/a; mv tmp a: the old link may go only when the new directory replaces it."""
    async with mounted(tmp_path) as (client, workspace):
        _, target = await put(workspace, workspace.root, "a", DATA)
        await workspace.wait()
        made = await workspace.make_directory(workspace.root, "tmp", {})
        await workspace.rename(workspace.root, "a", made, "a", {})
        await workspace.rename(workspace.root, "tmp", workspace.root, "a", {})
        await workspace.wait()
        assert await listing(client, workspace) == {"a": made.cap}
        assert await client.listing(made.cap) == {"a": target.cap}


@pytest.mark.parametrize("same", [True, False])
async def test_exchange(tmp_path: Path, same: bool) -> None:
    async with mounted(tmp_path) as (client, workspace):
        root = workspace.root
        other = root if same else await workspace.make_directory(root, "sub", {})
        _, one = await put(workspace, root, "one", b"1")
        await put(workspace, other, "two", b"2")
        await workspace.wait()
        await workspace.exchange(root, "one", other, "two")
        _, three = await put(workspace, root, "one", DATA)  # a pending one
        await workspace.exchange(other, "two", root, "one")
        await workspace.wait()
        assert (await client.listing(root.cap))["one"] == one
        assert (await client.listing(other.cap))["two"] == three.cap


async def test_swapping_by_hand_across_directories_comes_to_an_end(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        a = await workspace.make_directory(workspace.root, "a", {})
        b = await workspace.make_directory(workspace.root, "b", {})
        _, one = await put(workspace, a, "x", b"1")
        _, two = await put(workspace, b, "y", b"2")
        await workspace.wait()
        await workspace.rename(a, "x", b, "t", {})
        await workspace.rename(b, "y", a, "x", {})
        await workspace.rename(b, "t", b, "y", {})
        await workspace.wait()
        assert await client.listing(a.cap) == {"x": two} and await client.listing(b.cap) == {"y": one}


async def test_a_removed_new_directory_is_never_made(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        client.pause()
        before = client.calls("slot_writev")
        made = await workspace.make_directory(workspace.root, "d", {})
        inner = await workspace.make_directory(made, "e", {})
        await put(workspace, inner, "file", DATA)
        await workspace.unlink(workspace.root, "d")
        await workspace.wait()
        client.resume()
        assert client.calls("slot_writev") == before and client.uploads <= 1
        assert workspace.status()["pending"] == {"files": 0, "bytes": 0, "directories": 0}


async def test_what_is_not_sent_is_shown_before_what_only_waits_for_its_directory(tmp_path: Path) -> None:
    async with mounted(tmp_path, SLOW) as (client, workspace):
        stored = [(await put(workspace, workspace.root, f"{n}", DATA + b"%d" % n))[1] for n in range(UPLOADS_SHOWN_MAX)]
        while any(target.cap is None for target in stored):
            await trio.lowlevel.checkpoint()
        assert {each["stage"] for each in workspace.status()["uploads"]} == {"linking"}
        client.pause()
        for number in range(20):
            await put(workspace, workspace.root, f"late {number}", DATA[::-1] + b"%d" % number)
        await trio.testing.wait_all_tasks_blocked()
        stages = [each["stage"] for each in workspace.status()["uploads"]]
        order = sorted(stages, key={"encoding": 0, "pushing": 0, "queued": 1, "linking": 2}.__getitem__)
        assert stages == order and (len(stages), stages.count("linking")) == (UPLOADS_SHOWN_MAX, UPLOADS_SHOWN_MAX - 20)
        client.resume()
        await workspace.wait()


async def test_two_writers_of_different_names_lose_nothing(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        root = workspace.root.cap
        async with open_workspace(client, root, state_dir=tmp_path / "state", options=QUICK) as other:  # type: ignore[arg-type]
            for number in range(20):
                await put(workspace, workspace.root, f"a{number}", b"a")
                await put(other, other.root, f"b{number}", b"b")
            await workspace.wait()
            await other.wait()
            assert len(await listing(client, workspace)) == 40
            await workspace.load(workspace.root, 0)
            assert len(workspace.root.entries()) == 40


async def test_failures_are_tried_again_until_it_works(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        made = await workspace.make_directory(workspace.root, "d", {})
        with client.broken():
            _, target = await put(workspace, made, "file", DATA)
            with pytest.raises(GridError):
                await workspace.wait()
            status = workspace.status()
            assert target.state == "failed" and status["pending"]["files"] == 1
            assert {error["path"] for error in status["errors"]} >= {"file"}
            assert await get(workspace, target) == DATA
        await workspace.wait()
        assert await client.listing(made.cap) == {"file": target.cap}
        assert workspace.status()["errors"] == []


async def test_one_failing_file_does_not_block_the_others(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        for server in client.servers:
            server.full = True  # refuses files, takes directories
        _, stuck = await put(workspace, workspace.root, "stuck", DATA)
        await put(workspace, workspace.root, "short", b"short")
        while "short" not in await listing(client, workspace):
            pass
        assert stuck.cap is None
        for server in client.servers:
            server.full = False
        await workspace.wait()
        assert set(await listing(client, workspace)) == {"stuck", "short"}


async def test_wait_gives_up_when_told_to(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        position, _ = await put(workspace, workspace.root, "before", b"before")
        await workspace.wait()
        client.pause()
        await put(workspace, workspace.root, "file", DATA)
        await workspace.wait(position, timeout_s=5)  # what came later does not matter
        with pytest.raises(PeerTimeoutError):
            await workspace.wait(timeout_s=0.05)
        client.resume()
        await workspace.wait()


async def test_waiting_for_what_was_replaced_waits_for_what_replaced_it(tmp_path: Path) -> None:
    async with mounted(tmp_path, SLOW) as (client, workspace):
        first, _ = await put(workspace, workspace.root, "file", b"first")
        await put(workspace, workspace.root, "file", b"second")
        await workspace.wait(first)
        assert await listing(client, workspace) == {"file": LiteralCap(b"second")}


async def test_leaving_leaves_nothing_behind(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        client.pause()
        made = await workspace.make_directory(workspace.root, "d", {})
        await put(workspace, made, "file", DATA * 1000)
        with trio.move_on_after(0.02):
            await workspace.wait()
        await workspace.unlink(workspace.root, "d")
    left = [path for path in (tmp_path / "state" / "journal").rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["lock"]


async def test_what_cannot_be_changed(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        await put(workspace, workspace.root, "file", DATA)
        await workspace.wait()
        with pytest.raises(ChildExistsError):
            await workspace.make_directory(workspace.root, "file", {})
        with pytest.raises(NoSuchChildError):
            await workspace.unlink(workspace.root, "nothing")
        with pytest.raises(FormatError):
            await workspace.link(workspace.root, "odd", LiteralCap(b""), {"x": object()})
        with pytest.raises(FormatError):
            await workspace.link(workspace.root, "\udcff", LiteralCap(b""), {})
        with pytest.raises(WrongKindError):
            workspace.directory(LiteralCap(b""))
        with pytest.raises(WrongKindError):
            await workspace.open_contents(UnknownCap(rw=None, ro="x-future", error=None))
        await workspace.drain()
        with pytest.raises(NotWriteableError):
            await workspace.unlink(workspace.root, "file")
        assert workspace.root.cap is not None
        async with open_workspace(
            client, workspace.root.cap.readonly, state_dir=tmp_path / "ro", options=QUICK
        ) as readonly:
            await readonly.load(readonly.root)
            assert readonly.readonly and set(readonly.root.entries()) == {"file"}
            with pytest.raises(NotWriteableError):
                await readonly.unlink(readonly.root, "file")
    with pytest.raises(WrongKindError):
        async with open_workspace(client, LiteralCap(b""), state_dir=tmp_path):
            pass


async def test_names_are_one_name_however_they_are_typed(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        await put(workspace, workspace.root, "e\u0301", b"1")
        await put(workspace, workspace.root, "\u00e9", b"2")
        await workspace.wait()
        assert await listing(client, workspace) == {"\u00e9": LiteralCap(b"2")}


async def test_mutable_files_are_replaced_in_place(tmp_path: Path) -> None:
    async with mounted(tmp_path, evolve(QUICK, mutable="sdmf")) as (client, workspace):
        _, target = await put(workspace, workspace.root, "file", b"first")
        await workspace.wait()
        cap = target.cap
        assert cap.kind == "sdmf" and await workspace.size_of(cap) == 5
        for server in client.servers:
            server.fail_on.add("slot_writev")
        for text in (b" and second", b" and third"):
            contents = await workspace.new_contents(cap)
            await contents.write(contents.size, text)
            await workspace.replace(cap, contents, name="file")
        assert await get(workspace, cap) == b"first and second and third"  # before it is there
        for server in client.servers:
            server.fail_on.clear()
        await workspace.wait()
        assert await client.fetch(cap) == b"first and second and third"
        assert await workspace.size_of(cap) == 26
        assert await listing(client, workspace) == {"file": cap}
        with pytest.raises(NotWriteableError):
            await workspace.replace(cap.readonly, await workspace.new_contents())


async def test_status_shows_mutable_files_on_their_way(tmp_path: Path) -> None:
    """By name, until they are there: resting, then being sent. Of an MDMF file what was written is on its way."""
    async with mounted(tmp_path, evolve(QUICK, settle_s=60.0, settle_latest_s=60.0)) as (client, workspace):
        for kind, unsent in (("sdmf", len(DATA)), ("mdmf", 9)):
            cap = client.create_node_from_uri(await client.create_mutable_file(DATA, format=kind)).cap
            contents = await workspace.new_contents(cap)
            await contents.write(100, b"something")
            await workspace.replace(cap, contents, name=f"a {kind} file")
            shown = {"name": f"a {kind} file", "bytes": len(DATA), "unsent_bytes": unsent, "stage": "queued"}
            assert workspace.status()["uploads"] == [{**shown, "shares_placed": 0, "shares_total": 0}]
            assert workspace.status()["pending"] == {"files": 1, "bytes": unsent, "directories": 0}
            async with trio.open_nursery() as nursery:
                client.pause()
                nursery.start_soon(workspace.wait)
                with trio.fail_after(60):
                    while workspace.status()["uploads"][0]["stage"] != "pushing":
                        await trio.lowlevel.checkpoint()
                client.resume()
            assert workspace.status()["uploads"] == [] and workspace.status()["pending"]["files"] == 0


async def test_writing_over_what_is_stored(tmp_path: Path) -> None:
    """Only what is not overwritten is fetched, and the new file is whole."""
    options = evolve(QUICK, keep_bytes=0)
    data = bytes(range(251)) * 20_000  # five segments
    async with mounted(tmp_path, options) as (client, workspace):
        _, old = await put(workspace, workspace.root, "file", data)
        await workspace.wait()
        reads = client.calls("read")
        contents = await workspace.new_contents(old.cap)
        await contents.write(1000, b"patched")
        _, target, _ = await workspace.store(workspace.root, "file", contents, {}, over=old)
        assert client.calls("read") == reads  # the rest is fetched behind the caller's back
        await workspace.wait()
        expected = data[:1000] + b"patched" + data[1007:]
        assert await client.fetch(target.cap) == expected
        contents = await workspace.new_contents(target.cap, keep=0)
        await contents.write(0, b"new")
        _, target, _ = await workspace.store(workspace.root, "file", contents, {}, over=target)
        assert target == LiteralCap(b"new")


async def test_appending_to_a_file_that_is_still_on_its_way(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        client.pause()
        _, target = await put(workspace, workspace.root, "log", b"")
        expected = b""
        for number in range(12):
            line = b"line %d of many\n" % number
            contents = await workspace.new_contents(target)
            await contents.write(contents.size, line)
            _, target, _ = await workspace.store(workspace.root, "log", contents, {}, over=target)
            expected += line
            assert await get(workspace, target) == expected
        client.resume()
        await workspace.wait()
        assert await client.fetch(target.cap) == expected


async def test_the_spool_is_bounded(tmp_path: Path) -> None:
    options = evolve(QUICK, journal_bytes=100_000, keep_bytes=100_000)
    async with mounted(tmp_path, options) as (client, workspace):
        await put(workspace, workspace.root, "stored", bytes(60_000))
        await workspace.wait()  # kept to be read, gives way
        client.pause()
        await put(workspace, workspace.root, "one", bytes(80_000))
        contents = await workspace.new_contents()
        with pytest.raises(GridError, match="not on the grid yet"):
            await contents.write(0, bytes(40_000))
        client.resume()
        await workspace.wait()
        await contents.write(0, bytes(40_000))
        contents.close()


async def test_convergence_and_the_key_taken_on_the_way(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000  # 1.28 MB: over the largest segment
    async with mounted(tmp_path) as (client, workspace):
        in_order = await workspace.new_contents()
        for offset in range(0, len(data), 100_000):
            await in_order.write(offset, data[offset : offset + 100_000])
        backwards = await workspace.new_contents()
        for offset in reversed(range(0, len(data), 100_000)):
            await backwards.write(offset, data[offset : offset + 100_000])
        _, a, _ = await workspace.store(workspace.root, "a", in_order, {}, over=None)
        _, b, _ = await workspace.store(workspace.root, "b", backwards, {}, over=None)
        await workspace.wait()
        assert a.cap == b.cap and await client.fetch(a.cap) == data


async def test_offline_at_the_start_then_recovered(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        with client.broken():
            async with open_workspace(client, root, state_dir=tmp_path, options=QUICK) as workspace:
                with pytest.raises(GridError):
                    await workspace.load(workspace.root)
                client.mend()
                await workspace.load(workspace.root)
                assert workspace.root.loaded


async def test_a_cancelled_store_is_not_done_and_can_be_done_again(tmp_path: Path) -> None:
    async with mounted(tmp_path, evolve(QUICK, mutable="sdmf")) as (client, workspace):
        _, target = await put(workspace, workspace.root, "file", DATA * 100)
        await workspace.wait()
        contents = await workspace.new_contents(target.cap)
        await contents.write(0, b"new")
        client.pause()
        with trio.move_on_after(0.05) as scope:
            await workspace.replace(target.cap, contents)  # needs the rest of the old version
        assert scope.cancelled_caught and workspace.status()["pending"]["files"] == 0
        client.resume()
        await contents.write(1, b"EW")
        await workspace.replace(target.cap, contents)
        await workspace.wait()
        assert await client.fetch(target.cap) == b"nEW" + (DATA * 100)[3:]


async def test_a_directory_that_stays_busy_is_published_all_the_same(tmp_path: Path) -> None:
    """It never rests and an upload of its own never ends; what is ready goes out after a while, in few publishes."""
    options = evolve(QUICK, publish_quiet_s=3600.0, publish_latest_s=0.05)
    async with mounted(tmp_path, options) as (client, workspace):
        for server in client.servers:
            server.hang_on.add("write")
        await put(workspace, workspace.root, "stuck", DATA)
        await put(workspace, workspace.root, "short", b"x")
        while "short" not in await listing(client, workspace):
            pass
        await put(workspace, workspace.root, "second", b"x")
        while "second" not in await listing(client, workspace):
            pass
        assert workspace.status()["publishes"] == 2
        assert workspace.root.hold_s == 0.2  # longer each time
        assert [upload["stage"] for upload in workspace.status()["uploads"]] == ["pushing"]
        await workspace.unlink(workspace.root, "stuck")
        await workspace.wait()


async def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    fds = Path("/proc/self/fd")
    async with mounted(tmp_path, evolve(QUICK, keep_bytes=1 << 20)) as (client, workspace):
        await put(workspace, workspace.root, "first", DATA)
        await workspace.wait()
        before = len(_entries(fds))
        client.pause()
        targets = [(await put(workspace, workspace.root, f"{n}", DATA + b"%d" % n))[1] for n in range(40)]
        await trio.testing.wait_all_tasks_blocked()
        assert len(_entries(fds)) <= before + 8  # those being uploaded
        readers = [await workspace.open_contents(target) for target in targets]
        for number in range(20):
            await workspace.unlink(workspace.root, f"{number}")
        client.resume()
        await workspace.wait()
        assert [await reader.read(0, 9000) for reader in readers] == [DATA + b"%d" % n for n in range(40)]
        for reader in readers:
            reader.close()
        assert len(_entries(fds)) <= before


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_a_file_is_pending_until_its_directory_leads_to_it(tmp_path: Path) -> None:
    async with mounted(tmp_path, SLOW) as (_, workspace):
        _, target = await put(workspace, workspace.root, "file", DATA)
        while target.cap is None:
            await trio.lowlevel.checkpoint()
        status = workspace.status()
        assert status["pending"] == {"files": 1, "bytes": 0, "directories": 1}
        assert [each["stage"] for each in status["uploads"]] == ["linking"]
        await workspace.wait()
        assert workspace.status()["pending"] == {"files": 0, "bytes": 0, "directories": 0}


async def test_waiting_ends_when_nothing_gets_any_further(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        client.pause()
        await put(workspace, workspace.root, "file", DATA)
        with pytest.raises(PeerTimeoutError, match="nothing could be sent"):
            await workspace.wait(stall_s=0.1)
        client.resume()
        await workspace.wait(stall_s=60)
        assert "file" in await listing(client, workspace)
