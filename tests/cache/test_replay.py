"""What a killed process left in the journal is done by the next one: all that was persisted, once, and nothing else."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from cache import Directory, PendingFile, Workspace, WorkspaceOptions, journal, open_disk, open_workspace
from cache.sealed import DamagedFileError
from grid.errors import GridError, NodeDirectoryError
from grid.formats.caps import DirectoryCap, LiteralCap, UnknownCap
from tests.cache.memory_client import QUICK, MemoryClient, get, memory_client, put
from tests.cache.test_workspace_model import STEPS, Tree, Twin, disturb, on_the_grid

DATA = bytes(range(256)) * 16  # 4 KiB: in the journal itself
LONG = random.Random(0).randbytes(100_000)  # in a spool file
SEEDS = int(os.environ.get("TAHOEFS_KILL_ROUNDS", "6"))
LIVES = 4
SLOW = evolve(QUICK, publish_quiet_s=3600.0, publish_latest_s=3600.0, new_directory_latest_s=3600.0)


class Machine:
    """A disk, a grid, and processes that come and go."""

    def __init__(self, path: Path, client: MemoryClient, root: DirectoryCap) -> None:
        self.client = client
        self.root = root
        self._path = path
        self._lives = 0

    @property
    def state_dir(self) -> Path:
        return self._path / str(self._lives)

    @property
    def slot(self) -> Path:
        (slot,) = (self.state_dir / "journal").glob("*/0")
        return slot

    @asynccontextmanager
    async def process(self, options: WorkspaceOptions = QUICK, *, offline: bool = False) -> AsyncIterator[Workspace]:
        self.client.mend()
        self.client.resume()
        if offline:
            for server in self.client.servers:
                server.fail_on.add("slot_readv")
        where: Any = {"state_dir": self.state_dir, "options": options}
        async with (
            open_disk(self.state_dir / "cache", 16 << 20) as disk,
            open_workspace(self.client, self.root, disk=disk, **where) as workspace,
        ):
            await workspace.load(workspace.root)
            yield workspace

    async def kill(self, workspace: Workspace) -> None:
        """As by SIGKILL: what the process does from now on reaches neither the disk nor the grid."""
        store: Any = workspace._journal._store
        while store._turn.locked():  # a copy of a file that is being written would be torn as no kill tears it
            await trio.lowlevel.checkpoint()
        shutil.copytree(self.state_dir, self._path / str(self._lives + 1))
        self._lives += 1
        for server in self.client.servers:
            server.fail_on.add("*")


@asynccontextmanager
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    async with memory_client() as (client, root):
        yield Machine(tmp_path, client, root)


async def local_view(workspace: Workspace, directory: Directory) -> Tree:
    await workspace.load(directory)
    found: Tree = {}
    for name, entry in directory.entries().items():
        if isinstance(entry.target, Directory | DirectoryCap):
            found[name] = await local_view(workspace, workspace.directory(entry.target))
        else:
            found[name] = await get(workspace, entry.target)
    return found


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_killed_again_and_again(tmp_path: Path, seed: int) -> None:
    """At any moment of uploads and publishes, and of the replay before it."""
    rng = random.Random(seed)
    quick = evolve(QUICK, publish_quiet_s=0.001, publish_latest_s=0.01, new_directory_latest_s=0.02)
    model: Tree = {}
    made = 0
    async with machine(tmp_path) as here:
        for _ in range(LIVES):
            async with here.process(rng.choice([quick, SLOW])) as workspace:
                assert await local_view(workspace, workspace.root) == model
                twin = Twin(workspace, rng)
                twin.model, twin.made = model, made
                async with trio.open_nursery() as nursery:
                    if seed % 2:
                        nursery.start_soon(disturb, here.client, rng)
                    for _ in range(rng.randrange(STEPS // 3)):
                        try:
                            await twin.step()
                        except GridError:
                            continue  # a listing that could not be had; nothing was done
                        await workspace.persist()
                        if rng.random() < 0.1:
                            await trio.sleep(rng.random() * 0.02)
                    nursery.cancel_scope.cancel()
                made = twin.made
                await here.kill(workspace)
        async with here.process(quick) as workspace:
            assert await local_view(workspace, workspace.root) == model
            await workspace.wait()
            assert await on_the_grid(here.client, here.root) == model
            assert workspace.status()["conflicts"] == 0 and workspace.status()["errors"] == []
        assert not (here.slot / "journal.db").exists() and list((here.slot / "files").iterdir()) == []


async def test_what_was_not_sent_is_shown_at_once_and_sent_later(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        async with here.process(SLOW) as workspace:
            here.client.pause()
            made = await workspace.make_directory(workspace.root, "new", {"mode": 7})
            await put(workspace, made, "short", DATA, {"x": 1})
            await put(workspace, made, "long", LONG)
            await put(workspace, workspace.root, "literal", b"short")
            await workspace.link(workspace.root, "future", UnknownCap("x-future:rw", "x-future:ro", None), {})
            await workspace.persist()
            await here.kill(workspace)
        async with here.process() as workspace:
            assert workspace.replaying
            entry = workspace.root.get("new")
            assert entry is not None and isinstance(entry.target, Directory) and entry.metadata["mode"] == 7
            short, long = entry.target.get("short"), entry.target.get("long")
            assert short is not None and long is not None and short.metadata["x"] == 1
            assert isinstance(long.target, PendingFile) and await get(workspace, long.target) == LONG
            assert await get(workspace, short.target) == DATA
            await workspace.wait()
            assert not workspace.replaying
            tree = await here.client.listing(here.root)
            assert set(tree) == {"new", "literal", "future"} and tree["future"].rw == "x-future:rw"
            inside = await here.client.listing(tree["new"])
            assert await here.client.fetch(inside["long"]) == LONG and await here.client.fetch(inside["short"]) == DATA


async def test_what_was_published_without_being_noted_is_no_conflict(tmp_path: Path) -> None:
    """Killed after the grid had it, before the journal knew; and the name changes again afterwards."""
    async with machine(tmp_path) as here:
        async with here.process() as workspace:
            here.client.pause()
            _, target = await put(workspace, workspace.root, "name", DATA)
            await workspace.persist()
            store: Any = workspace._journal._store
            here.client.resume()
            while not any(change.sent for change in workspace.root.changes.values()):
                await trio.lowlevel.checkpoint()
            await store._turn.acquire()  # from here on nothing gets to the disk, and everything to the grid
            if not target.cap or "name" not in await here.client.listing(here.root):
                store._turn.release()
                await workspace.persist()
                await store._turn.acquire()
            while "name" not in await here.client.listing(here.root):
                await trio.lowlevel.checkpoint()
            store._turn.release()
            await here.kill(workspace)
        async with here.process(SLOW) as workspace:
            await put(workspace, workspace.root, "name", DATA * 2)
            await workspace.wait()
            ((name, cap),) = (await here.client.listing(here.root)).items()
            assert name == "name" and await here.client.fetch(cap) == DATA * 2
            assert workspace.status()["conflicts"] == 0


async def test_an_old_listing_is_not_taken_for_the_doing_of_others(tmp_path: Path) -> None:
    """The grid cannot be read at the start: the listing on the disk has at least what this mount published itself."""
    async with machine(tmp_path) as here:
        async with here.process() as workspace:
            await put(workspace, workspace.root, "name", b"first")
            await put(workspace, workspace.root, "stays", b"first")
            await workspace.wait()
            await workspace.unlink(workspace.root, "name")
            await put(workspace, workspace.root, "stays", b"second")
            await workspace.wait()
            await workspace.persist()
            await here.kill(workspace)
        async with here.process(SLOW, offline=True) as workspace:
            assert await local_view(workspace, workspace.root) == {"stays": b"second"}
            await put(workspace, workspace.root, "name", b"third")
            await workspace.unlink(workspace.root, "stays")
            await workspace.persist()
            await here.kill(workspace)
        async with here.process() as workspace:
            assert await local_view(workspace, workspace.root) == {"name": b"third"}
            await workspace.wait()
            assert await on_the_grid(here.client, here.root) == {"name": b"third"}
            assert workspace.status()["conflicts"] == 0


@pytest.mark.parametrize("what", ["stored", "replaced", "removed"])
async def test_killed_before_the_journal_has_it_that_a_file_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """As long as the journal speaks of a file it is there."""
    monkeypatch.setattr(journal, "FLUSH_S", 3600.0)
    async with machine(tmp_path) as here:
        async with here.process(evolve(SLOW, keep_bytes=0)) as workspace:
            if what != "stored":
                here.client.pause()
            _, target = await put(workspace, workspace.root, "file", LONG)
            await workspace.persist()
            if what == "replaced":
                await put(workspace, workspace.root, "file", LONG[::-1])
            elif what == "removed":
                await workspace.unlink(workspace.root, "file")
            else:
                while target.cap is None:
                    await trio.lowlevel.checkpoint()
            await here.kill(workspace)
        async with here.process() as workspace:
            assert workspace.status()["errors"] == []
            entry = workspace.root.get("file")
            assert entry is not None and await get(workspace, entry.target) == LONG
            await workspace.wait()
            (cap,) = (await here.client.listing(here.root)).values()
            assert await here.client.fetch(cap) == LONG
        assert list((here.slot / "files").iterdir()) == []


async def test_killed_again_before_the_journal_has_it_that_files_were_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One laid over the other, removed while it was open: nothing is lost by it, and so nothing is said."""
    async with machine(tmp_path) as here:
        async with here.process(evolve(SLOW, keep_bytes=0)) as workspace:
            here.client.pause()
            _, target = await put(workspace, workspace.root, "file", LONG)
            contents = await workspace.new_contents(target)
            await contents.write(50_000, LONG[:20_000])
            _, target, _ = await workspace.store(workspace.root, "file", contents, {}, over=target)
            reader = await workspace.open_contents(target)
            await workspace.unlink(workspace.root, "file")
            await workspace.persist()
            await here.kill(workspace)
            reader.close()
        assert len(list((here.slot / "files").iterdir())) == 2
        monkeypatch.setattr(journal, "FLUSH_S", 3600.0)
        async with here.process() as workspace:
            assert workspace.status()["errors"] == []
            await here.kill(workspace)
        assert list((here.slot / "files").iterdir()) == []
        async with here.process() as workspace:
            assert workspace.status()["errors"] == []
            assert workspace.root.entries() == {}


async def test_a_change_inside_a_stored_file_needs_only_what_was_written(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        async with here.process() as workspace:
            _, target = await put(workspace, workspace.root, "file", LONG)
            await workspace.wait()
            here.client.pause()
            for patch in (b"one", b"two"):  # the second over the first, which is on its way
                contents = await workspace.new_contents(target)
                await contents.write(50_000 + len(patch) * (patch == b"two"), patch)
                _, target, _ = await workspace.store(workspace.root, "file", contents, {}, over=target)
            await workspace.persist(flush=True)
            await here.kill(workspace)
        async with here.process() as workspace:
            expected = LONG[:50_000] + b"onetwo" + LONG[50_006:]
            entry = workspace.root.get("file")
            assert entry is not None and await get(workspace, entry.target) == expected
            await workspace.wait()
            (cap,) = (await here.client.listing(here.root)).values()
            assert await here.client.fetch(cap) == expected


async def test_new_contents_of_a_mutable_file(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        text = await here.client.create_mutable_file(b"old")
        async with here.process() as workspace:
            cap = here.client.create_node_from_uri(text).cap
            here.client.pause()
            contents = await workspace.new_contents()
            await contents.write(0, b"new contents")
            await workspace.replace(cap, contents, name="by name")
            await workspace.persist()
            await here.kill(workspace)
        async with here.process(evolve(QUICK, settle_s=1.0)) as workspace:
            assert [upload["name"] for upload in workspace.status()["uploads"]] == ["by name"]
            assert await get(workspace, cap) == b"new contents"
            await workspace.wait()
            assert await here.client.fetch(cap) == b"new contents"


async def test_two_killed_mounts_and_one_that_goes_on(tmp_path: Path) -> None:
    """What the other left is done as another writer's would be: nothing is lost."""
    async with machine(tmp_path) as here:
        async with here.process(SLOW) as one, here.process(SLOW) as two:
            here.client.pause()
            for number, workspace in enumerate((one, two)):
                await put(workspace, workspace.root, "same.txt", b"%d" % number + LONG)
                await put(workspace, workspace.root, f"own {number}", b"%d" % number + DATA)
                made = await workspace.make_directory(workspace.root, f"dir {number}", {})
                await put(workspace, made, "inner", b"%d" % number + DATA)
                await workspace.persist()
            await here.kill(two)
        async with here.process() as workspace:
            await workspace.wait()
            tree = await on_the_grid(here.client, here.root)
            conflict = next(name for name in tree if "conflict" in name)
            assert conflict.endswith(".txt")
            assert {tree.pop("same.txt"), tree.pop(conflict)} == {b"0" + LONG, b"1" + LONG}
            assert tree == {f"own {n}": b"%d" % n + DATA for n in (0, 1)} | {
                f"dir {n}": {"inner": b"%d" % n + DATA} for n in (0, 1)
            }
        assert not list((here.state_dir / "journal").glob("*/*/journal.db"))


async def test_a_damaged_file_is_said_to_be_and_keeps_nobody_else_back(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        async with here.process(SLOW) as workspace:
            here.client.pause()
            await put(workspace, workspace.root, "damaged", LONG)
            await put(workspace, workspace.root, "whole", LONG[::-1])
            await workspace.persist(flush=True)
            await here.kill(workspace)
        path = here.slot / "files" / "1"
        data = bytearray(path.read_bytes())
        data[77_777] ^= 1
        path.write_bytes(data)
        async with here.process() as workspace:
            entry = workspace.root.get("damaged")
            assert entry is not None
            with pytest.raises(DamagedFileError):
                await get(workspace, entry.target)
            with pytest.raises(DamagedFileError):
                await workspace.wait()
            with trio.fail_after(60):
                while set(await here.client.listing(here.root)) != {"whole"}:
                    await trio.lowlevel.checkpoint()
            await workspace.unlink(workspace.root, "damaged")
            await workspace.wait()


async def test_a_file_that_somebody_removed_keeps_nobody_else_back(tmp_path: Path) -> None:
    async with machine(tmp_path) as here, here.process(SLOW) as workspace:
        here.client.pause()
        await put(workspace, workspace.root, "removed", DATA)
        (here.slot / "files" / "1").unlink()  # before its row was written
        await put(workspace, workspace.root, "kept", DATA[::-1])
        await workspace.persist()
        await here.kill(workspace)
        async with here.process() as after:
            assert set(after.root.entries()) == {"removed", "kept"}
            entry = after.root.get("kept")
            assert entry is not None and await get(after, entry.target) == DATA[::-1]


async def test_damaged_rows_cost_only_themselves(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        async with here.process(SLOW) as workspace:
            here.client.pause()
            for number in range(6):
                made = await workspace.make_directory(workspace.root, f"dir {number}", {})
                await put(workspace, made, "file", b"%d" % number + DATA)
            await workspace.persist(flush=True)
            await here.kill(workspace)
        with sqlite3.connect(here.slot / "journal.db") as database:
            rows = database.execute("SELECT id, sealed FROM rows ORDER BY id").fetchall()
            for number, sealed in (rows[0], rows[-1]):
                damaged = sealed[:-1] + bytes([sealed[-1] ^ 1])
                database.execute("UPDATE rows SET sealed = ? WHERE id = ?", (damaged, number))
            database.execute("UPDATE rows SET sealed = ? WHERE id = ?", (rows[6][1], rows[8][0]))  # another's place
        database.close()
        async with here.process() as workspace:
            errors = workspace.status()["errors"]
            assert errors and all(error["path"] == "the journal" for error in errors)
            await workspace.wait()
            tree = await on_the_grid(here.client, here.root)
            whole = [number for number in range(6) if tree.get(f"dir {number}") == {"file": b"%d" % number + DATA}]
            assert len(whole) == 3


async def test_a_damaged_end_of_the_journal_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite leaves it out without a word. What is before it is there."""
    async with machine(tmp_path) as here:
        async with here.process(SLOW) as workspace:
            here.client.pause()
            await put(workspace, workspace.root, "first", DATA)
            await workspace.persist(flush=True)
            await put(workspace, workspace.root, "second", DATA)
            await workspace.persist()
            await here.kill(workspace)
        wal = here.slot / "journal.db-wal"
        data = bytearray(wal.read_bytes())
        data[-5] ^= 1
        wal.write_bytes(data)
        async with here.process() as workspace:
            assert "first" in workspace.root.entries() and "second" not in workspace.root.entries()
            (error,) = workspace.status()["errors"]
            assert error["path"] == "the journal" and "the journal's end is damaged" in error["message"]
            assert "the journal's end is damaged" in caplog.text
            await workspace.wait()
            assert set(await here.client.listing(here.root)) == {"first"}


async def test_what_is_no_journal_of_ours_is_refused(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        async with here.process(SLOW) as workspace:
            here.client.pause()
            await put(workspace, workspace.root, "file", DATA)
            await workspace.persist()
            await here.kill(workspace)
        database = here.slot / "journal.db"
        whole = database.read_bytes()
        for damage in ("format", "garbage"):
            if damage == "format":
                with sqlite3.connect(database) as connection:
                    connection.execute("UPDATE meta SET value = '2' WHERE name = 'format'")
                connection.close()
            else:
                database.write_bytes(b"garbage" * 1000)
            with pytest.raises(NodeDirectoryError, match="journal"):
                async with here.process():
                    pass
        assert whole


async def test_who_may_only_read_has_no_journal(tmp_path: Path) -> None:
    async with machine(tmp_path) as here:
        async with here.process() as workspace:
            await put(workspace, workspace.root, "file", DATA)
            await workspace.wait()
        here.root = here.root.readonly
        async with here.process() as workspace:
            assert not workspace.durable and workspace.readonly
            entry = workspace.root.get("file")
            assert entry is not None and await get(workspace, entry.target) == DATA


async def test_nothing_in_the_journal_can_be_read_without_the_cap(tmp_path: Path) -> None:
    async with machine(tmp_path) as here, here.process(SLOW) as workspace:
        here.client.pause()
        await put(workspace, workspace.root, "marked name", b"marked contents" * 10, {"marked": "metadata"})
        await put(workspace, workspace.root, "other", b"marked contents" * 10_000)
        await workspace.link(workspace.root, "cap", LiteralCap(b"marked literal"), {})
        await workspace.persist(flush=True)
        files = [path for path in here.state_dir.rglob("*") if path.is_file() and "journal" in path.parts]
        assert len(files) >= 3
        for path in files:
            data = path.read_bytes()
            assert b"marked" not in data and b"URI:" not in data and b"NVQXE23FMQ" not in data.upper()
            assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


async def test_a_full_disk_is_told_and_what_was_done_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with machine(tmp_path) as here, here.process(SLOW) as workspace:
        store: Any = workspace._journal._store
        store._database.execute("PRAGMA max_page_count = 1")  # no larger than it is: SQLite says so as for a full disk
        here.client.pause()  # what is sent makes room
        await put(workspace, workspace.root, "file", DATA * 7)
        with pytest.raises(GridError, match="full"):
            await workspace.persist()
        with pytest.raises(GridError, match="full"):
            await put(workspace, workspace.root, "another", DATA)
        here.client.resume()
        await workspace.wait()  # it is on the grid all the same
        assert set(await here.client.listing(here.root)) == {"file"}
        store._database.execute("PRAGMA max_page_count = 1000000")
        await put(workspace, workspace.root, "another", DATA)
        await workspace.persist()
