"""Open files, names and other clients, over the twin in memory: no kernel, no grid."""

import errno
import os
import stat

import pytest
import trio
import trio.testing

from grid.errors import ConnectionLostError, GridError
from grid.formats.caps import CHKReadCap, LiteralCap
from tahoefs.vfs import Changes
from tahoefs.vfs_core import REFRESH_PAUSE_S
from tests.tahoefs.memory_mount import MUTABLE_FILE, scenario
from tests.tahoefs.memory_workspace import MemoryDirectory, MemoryFile, MemoryWorkspace, hang, pages_of
from tests.tahoefs.vfs_helpers import (
    ME,
    ROOT,
    close,
    contents,
    create,
    make_vfs,
    names,
    refused,
    workspace_of,
)

# --- open files


async def test_a_new_file_is_seen_at_once_and_stored_once_by_the_last_close() -> None:
    vfs = make_vfs()
    first, number = await create(vfs, b"new", b"12345")
    assert b"new" in await names(vfs)
    assert (await vfs.lookup(ROOT, b"new")).size == 5
    assert workspace_of(vfs).root.get("new") is None
    second, _ = await vfs.open(number, os.O_WRONLY, ME)
    await close(vfs, first)
    assert workspace_of(vfs).calls["store"] == 0, "another handle still writes"
    await vfs.write(second, 5, b"678")
    await close(vfs, second)
    assert workspace_of(vfs).calls["store"] == 1
    assert (await vfs.getattr(number)).size == 8
    assert await contents(vfs, b"new") == b"12345678"


async def test_a_reading_handle_sees_what_another_writes_and_then_what_was_stored() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    reader, _ = await vfs.open(number, os.O_RDONLY, ME)
    assert await vfs.read(reader, 0, 100) == b"literal\n"
    writer, _ = await vfs.open(number, os.O_WRONLY, ME)
    await vfs.write(writer, 0, b"LITE")
    assert await vfs.read(reader, 0, 100) == b"LITEral\n"
    await close(vfs, writer)
    assert await vfs.read(reader, 0, 100) == b"LITEral\n"


async def test_a_read_while_the_file_is_being_stored_waits_and_succeeds() -> None:
    vfs = make_vfs()
    handle, _ = await create(vfs, b"new", b"data")
    under_way, go_on = trio.Event(), trio.Event()

    async def slow_store() -> None:
        under_way.set()
        await go_on.wait()

    workspace_of(vfs).faults["store"] = slow_store
    read: list[bytes] = []

    async def reader() -> None:
        read.append(await vfs.read(handle, 0, 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(vfs.flush, handle)
        await under_way.wait()
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
    assert read == [b"data"]


async def test_appends_of_two_handles_never_overlap() -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, b"log", flags=os.O_WRONLY | os.O_APPEND)
    other, _ = await vfs.open(number, os.O_WRONLY | os.O_APPEND, ME)
    async with trio.open_nursery() as nursery:
        for which in (handle, other) * 20:
            nursery.start_soon(vfs.write, which, 0, b"line\n")
    await close(vfs, handle)
    await close(vfs, other)
    assert await contents(vfs, b"log") == b"line\n" * 40


async def test_open_with_truncate_stores_even_if_nothing_is_written() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    handle, _ = await vfs.open(number, os.O_WRONLY | os.O_TRUNC, ME)
    await close(vfs, handle)
    assert (await vfs.getattr(number)).size == 0
    assert workspace_of(vfs).calls["open_contents"] == 0, "what is cut away is not fetched"


async def test_only_kept_bytes_of_the_base_count_when_a_path_is_truncated() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    found = await vfs.setattr(number, Changes(size=3), None, ME)
    assert found.size == 3
    await vfs.setattr(number, Changes(size=5), None, ME)
    assert await contents(vfs, b"literal.txt") == b"lit\0\0"
    assert workspace_of(vfs).calls["store"] == 2


async def test_a_size_beyond_what_can_be_is_refused() -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, b"big")
    await vfs.setattr(number, Changes(size=1 << 49), handle, ME)
    async with refused(errno.EFBIG):
        await vfs.setattr(number, Changes(size=(1 << 50) + 1), handle, ME)
    async with refused(errno.EFBIG):
        await vfs.write(handle, (1 << 50) - 1, b"xx")


async def test_a_mutable_file_is_replaced_in_place_and_its_time_noted() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"mutable.txt")).number
    handle, _ = await vfs.open(number, os.O_WRONLY | os.O_APPEND, ME)
    await vfs.write(handle, 0, b"second\n")
    await close(vfs, handle)
    entry = workspace_of(vfs).root.get("mutable.txt")
    assert entry is not None and entry.target == MUTABLE_FILE
    assert entry.metadata["foreign"] == [1, 2]
    assert entry.metadata["tahoefs"]["mtime_ns"] > 0
    assert await contents(vfs, b"mutable.txt") == b"first\nsecond\n"


async def test_when_storing_fails_the_close_says_so_and_the_data_is_kept_for_the_next_try() -> None:
    vfs = make_vfs()
    handle, _ = await create(vfs, b"new", b"precious")
    workspace_of(vfs).faults["store"] = GridError("no room")
    with pytest.raises(GridError):
        await vfs.flush(handle)
    assert await vfs.read(handle, 0, 100) == b"precious"
    await vfs.fsync(handle)
    await close(vfs, handle)
    assert await contents(vfs, b"new") == b"precious"


async def test_a_new_file_that_could_never_be_stored_is_gone_after_its_last_close() -> None:
    vfs = make_vfs()
    handle, _ = await create(vfs, b"new", b"lost")
    for _ in range(2):
        workspace_of(vfs).faults["store"] = GridError("no room")
        with pytest.raises(GridError):
            await (vfs.flush(handle) if handle in vfs.handles and _ == 0 else vfs.release(handle))
    assert b"new" not in await names(vfs)
    assert not vfs.handles


async def test_a_failed_upload_is_reported_by_the_next_fsync() -> None:
    vfs = make_vfs()
    handle, _ = await create(vfs, b"new", b"data")
    await vfs.flush(handle)
    entry = workspace_of(vfs).root.get("new")
    assert entry is not None and isinstance(entry.target, MemoryFile)
    entry.target.state = "failed"
    async with refused(errno.EIO):
        await vfs.fsync(handle)
    entry.target.state = "stored"
    await vfs.fsync(handle)


async def test_a_file_that_cannot_be_read_is_named() -> None:
    vfs = make_vfs()
    directory = (await vfs.mkdir(ROOT, b"dir", 0o755, ME)).number
    workspace_of(vfs).root.names["dir"].target.put("lost", CHKReadCap(bytes(16), bytes(32), 3, 10, 4))
    handle, _ = await vfs.open((await vfs.lookup(directory, b"lost")).number, os.O_RDONLY, ME)
    with pytest.raises(GridError):
        await vfs.read(handle, 0, 4)
    assert workspace_of(vfs).errors == ["/dir/lost"]


async def test_a_file_made_mutable_is_replaced_in_place_once_it_has_its_cap() -> None:
    vfs = make_vfs()
    handle, _ = await create(vfs, b"new", b"data")
    await vfs.flush(handle)
    workspace_of(vfs).root.names["new"].target.cap = MUTABLE_FILE
    await vfs.write(handle, 4, b" more")
    await close(vfs, handle)
    assert (workspace_of(vfs).calls["store"], workspace_of(vfs).calls["replace"]) == (1, 1)


async def test_durability_grid_waits_and_journal_does_not() -> None:
    for durability, waits in (("journal", 0), ("grid", 4)):
        vfs = make_vfs(durability=durability)
        handle, _ = await create(vfs, b"new", b"data")
        await vfs.flush(handle)  # one
        await vfs.fsync(handle)  # two
        await vfs.release(handle)
        await vfs.mkdir(ROOT, b"dir", 0o755, ME)  # three
        await vfs.rename(ROOT, b"new", ROOT, b"newer")  # four
        assert workspace_of(vfs).calls["wait"] == waits


async def test_what_is_still_open_when_the_mount_ends_is_stored() -> None:
    vfs = make_vfs()
    await create(vfs, b"new", b"data")
    await vfs.store_all()
    assert workspace_of(vfs).root.get("new") is not None


# --- names


async def test_unlinked_while_open_lives_on_and_is_stored_nowhere() -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, b"temporary", b"data")
    await vfs.unlink(ROOT, b"temporary")
    await vfs.write(handle, 4, b" more")
    assert (await vfs.getattr(number)).nlink == 0
    assert await vfs.read(handle, 0, 100) == b"data more"
    await close(vfs, handle)
    assert workspace_of(vfs).calls["store"] == 0
    assert b"temporary" not in await names(vfs)


@pytest.mark.parametrize("over", [False, True])
async def test_what_was_not_sent_yet_can_be_read_and_written_by_who_has_it_open_when_its_name_goes(over: bool) -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, b"file", b"data")
    await close(vfs, handle)
    handle, _ = await vfs.open(number, os.O_RDWR, ME)
    if over:
        other, _ = await create(vfs, b"other", b"other")
        await close(vfs, other)
        await vfs.rename(ROOT, b"other", ROOT, b"file")
    else:
        await vfs.unlink(ROOT, b"file")
    assert await vfs.read(handle, 0, 10) == b"data"
    await vfs.write(handle, 4, b" more")
    assert await vfs.read(handle, 0, 10) == b"data more"
    await close(vfs, handle)


async def test_renamed_while_open_is_stored_under_its_new_name() -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, b"old", b"data")
    await vfs.rename(ROOT, b"old", ROOT, b"new")
    await vfs.write(handle, 4, b" more")
    await close(vfs, handle)
    assert await names(vfs) & {b"old", b"new"} == {b"new"}
    assert await contents(vfs, b"new") == b"data more"
    assert (await vfs.lookup(ROOT, b"new")).number == number


async def test_a_file_closed_while_it_is_unlinked_does_not_come_back() -> None:
    vfs = make_vfs()
    handle, _ = await create(vfs, b"racing", b"data")
    await vfs.fsync(handle)
    await vfs.write(handle, 0, b"DATA")
    under_way = trio.Event()

    async def slow_unlink() -> None:
        under_way.set()
        await trio.testing.wait_all_tasks_blocked()

    workspace_of(vfs).faults["unlink"] = slow_unlink
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vfs.unlink, ROOT, b"racing")
        await under_way.wait()
        nursery.start_soon(vfs.flush, handle)
    assert workspace_of(vfs).root.get("racing") is None


async def test_rename_over_keeps_the_replaced_file_for_who_has_it_open() -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, b"target", b"old")
    await vfs.fsync(handle)
    other, _ = await create(vfs, b"source", b"new")
    await close(vfs, other)
    await vfs.rename(ROOT, b"source", ROOT, b"target")
    assert await vfs.read(handle, 0, 10) == b"old"
    assert (await vfs.getattr(number)).nlink == 0
    assert await contents(vfs, b"target") == b"new"


async def test_exchange_swaps_and_numbers_follow() -> None:
    vfs = make_vfs()
    for name in (b"a", b"b"):
        handle, _ = await create(vfs, name, name)
        await close(vfs, handle)
    a, b = [(await vfs.lookup(ROOT, name)).number for name in (b"a", b"b")]
    await vfs.rename(ROOT, b"a", ROOT, b"b", 2)
    assert [(await vfs.lookup(ROOT, name)).number for name in (b"a", b"b")] == [b, a]
    assert await contents(vfs, b"a") == b"b"
    async with refused(errno.ENOENT):
        await vfs.rename(ROOT, b"a", ROOT, b"none", 2)


async def test_a_directory_cannot_come_to_stand_below_itself() -> None:
    vfs = make_vfs()
    above = (await vfs.mkdir(ROOT, b"above", 0o755, ME)).number
    below = (await vfs.mkdir(above, b"below", 0o755, ME)).number
    async with refused(errno.EINVAL):
        await vfs.rename(ROOT, b"above", below, b"x")


async def test_a_directory_that_contains_itself_is_shown_not_entered_and_can_be_removed() -> None:
    vfs = make_vfs()
    above = (await vfs.mkdir(ROOT, b"above", 0o755, ME)).number
    directory = workspace_of(vfs).root.names["above"].target
    directory.put("loop", directory)
    found = await vfs.lookup(above, b"loop")
    assert stat.S_ISDIR(found.mode) and found.number != above
    async with refused(errno.ELOOP):
        await vfs.opendir(found.number)
    await vfs.rmdir(above, b"loop")
    await vfs.rmdir(ROOT, b"above")


async def test_names_are_nfc_and_bounded() -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, "e\u0301".encode())
    await close(vfs, handle)
    assert workspace_of(vfs).root.get("\u00e9") is not None
    found = await vfs.lookup(ROOT, "e\u0301".encode())
    assert (found.number, found.entry_timeout_s) == (number, 0.0)
    async with refused(errno.ENAMETOOLONG):
        await vfs.lookup(ROOT, b"x" * 256)
    async with refused(errno.ENAMETOOLONG):
        await vfs.create(ROOT, "\u0344".encode() * 100, 0o644, os.O_RDWR, ME)  # fits only before it is normalised
    async with refused(errno.ENOENT):
        await vfs.lookup(ROOT, b"\xff")
    async with refused(errno.EILSEQ):
        await vfs.mkdir(ROOT, b"\xff", 0o755, ME)


async def test_names_no_program_can_hold_are_left_out_but_keep_a_directory_from_being_empty() -> None:
    vfs = make_vfs()
    number = (await vfs.mkdir(ROOT, b"dir", 0o755, ME)).number
    directory = workspace_of(vfs).root.names["dir"].target
    for name in ("a/b", "..", "", "x" * 256):
        directory.put(name, LiteralCap(b""))
    assert await names(vfs, number) == set()
    async with refused(errno.ENOTEMPTY):
        await vfs.rmdir(ROOT, b"dir")


async def test_listing_is_stable_while_names_come_and_go() -> None:
    vfs = make_vfs()
    number = (await vfs.mkdir(ROOT, b"dir", 0o755, ME)).number
    directory = workspace_of(vfs).root.names["dir"].target
    for index in range(10):
        directory.put(f"{index}", LiteralCap(b""))
    handle = await vfs.opendir(number)
    first = list(await vfs.readdir(handle, 0))[:6]
    taken, offset = [name for name, *_ in first], first[-1][2]
    await vfs.unlink(number, b"1")  # before the place we are at
    await vfs.unlink(number, b"7")  # after it
    directory.put("55", LiteralCap(b""))
    taken += [name for name, *_ in await vfs.readdir(handle, offset)]
    assert taken == [b".", b"..", b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"8", b"9"]
    rewound = [name for name, *_ in await vfs.readdir(handle, 0)]
    assert rewound == [b".", b"..", b"0", b"2", b"3", b"4", b"5", b"55", b"6", b"8", b"9"]


async def test_forgotten_inodes_are_freed_and_come_back_with_their_number() -> None:
    vfs = make_vfs()
    directory = (await vfs.mkdir(ROOT, b"dir", 0o755, ME)).number
    child = (await vfs.mkdir(directory, b"child", 0o755, ME)).number
    for _ in range(3):
        await vfs.lookup(directory, b"child")
    vfs.forget([(directory, 1)])
    assert vfs.table.find(directory) is not None, "the child needs it"
    vfs.forget([(child, 3)])
    assert vfs.table.find(child) is not None
    vfs.forget([(child, 1)])
    assert len(vfs.table) == 1
    assert (await vfs.lookup(ROOT, b"dir")).number == directory


# --- other clients


async def test_a_listing_that_cannot_be_refreshed_answers_from_the_one_there_is(autojump_clock: object) -> None:
    workspace = scenario()
    root = MemoryDirectory(cap=MUTABLE_FILE, names=workspace.root.names)
    workspace.root = root
    vfs = make_vfs(workspace)
    assert (await vfs.lookup(ROOT, b"literal.txt")).number
    for fault in (ConnectionLostError("gone"), hang):
        workspace.faults["load"] = fault
        assert (await vfs.lookup(ROOT, b"literal.txt")).number
        asked = workspace.calls["load"]
        for _ in range(3):  # who copies many files in must not wait for each of them
            assert (await vfs.lookup(ROOT, b"literal.txt")).number
        assert workspace.calls["load"] == asked
        await trio.sleep(REFRESH_PAUSE_S)
        assert (await vfs.lookup(ROOT, b"literal.txt")).number
        assert workspace.calls["load"] == asked + 1


async def test_without_any_listing_the_error_shows(autojump_clock: object) -> None:
    vfs = make_vfs(MemoryWorkspace(MemoryDirectory(cap=MUTABLE_FILE)))
    workspace_of(vfs).faults["load"] = ConnectionLostError("gone")
    with pytest.raises(ConnectionLostError):
        await vfs.opendir(ROOT)
    workspace_of(vfs).faults["load"] = hang
    with pytest.raises(trio.TooSlowError):
        await vfs.opendir(ROOT)


@pytest.mark.parametrize("new", [True, False])
async def test_what_is_written_after_another_client_took_the_name_is_stored_beside_it(new: bool) -> None:
    """And again under that name, as long as it is open; whoever looks the name up finds theirs."""
    vfs = make_vfs()
    root = workspace_of(vfs).root
    if new:
        handle, number = await create(vfs, b"file", b"ours")
    else:
        root.put("file", LiteralCap(b"old"))
        number = (await vfs.lookup(ROOT, b"file")).number
        handle, _ = await vfs.open(number, os.O_RDWR, ME)
    root.put("file", LiteralCap(b"theirs"))
    if not new:
        assert (await vfs.lookup(ROOT, b"file")).number != number
        await vfs.write(handle, 0, b"ours")
    await vfs.fsync(handle)
    assert await contents(vfs, b"file (conflict)") == b"ours"
    await vfs.write(handle, 4, b", and more")
    await close(vfs, handle)
    assert await contents(vfs, b"file (conflict)") == b"ours, and more"
    assert await contents(vfs, b"file") == b"theirs"
    assert {b"file", b"file (conflict)"} <= set(await names(vfs))


async def test_a_file_removed_elsewhere_is_stored_again_when_it_is_written() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    handle, _ = await vfs.open(number, os.O_WRONLY, ME)
    workspace_of(vfs).root.drop("literal.txt")
    assert b"literal.txt" not in await names(vfs)
    async with refused(errno.ENOENT):
        assert (await vfs.lookup(ROOT, b"literal.txt")).number or True
        await vfs.unlink(ROOT, b"literal.txt")
    await vfs.write(handle, 0, b"LIT")
    await close(vfs, handle)
    assert await contents(vfs, b"literal.txt") == b"LITeral\n"


async def test_a_file_replaced_elsewhere_while_open_stays_what_it_was() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    handle, _ = await vfs.open(number, os.O_RDONLY, ME)
    workspace_of(vfs).root.put("literal.txt", LiteralCap(b"theirs"))
    assert await vfs.read(handle, 0, 100) == b"literal\n"
    assert (await vfs.lookup(ROOT, b"literal.txt")).number != number
    assert (await vfs.getattr(number)).nlink == 0
    assert await contents(vfs, b"literal.txt") == b"theirs"


async def test_a_file_replaced_elsewhere_keeps_its_number_but_not_the_kernels_pages() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    for expected in (True, True, False, True):
        if not expected:
            workspace_of(vfs).root.put("literal.txt", LiteralCap(b"theirs"))
        handle, keeps_pages = await vfs.open(number, os.O_RDONLY, ME)
        await vfs.release(handle)
        assert keeps_pages is expected
    assert (await vfs.lookup(ROOT, b"literal.txt")).number == number


async def test_pages_are_kept_over_our_own_close_and_upload() -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, b"new", b"data")
    await close(vfs, handle)
    stored = workspace_of(vfs).root.names["new"]
    cap = CHKReadCap(bytes(16), bytes(32), 3, 10, 4)
    stored.target.cap = cap
    workspace_of(vfs).root.put("new", cap, stored.metadata)
    workspace_of(vfs).files[cap] = pages_of(b"data")
    handle, keeps_pages = await vfs.open(number, os.O_RDONLY, ME)
    assert keeps_pages
    assert await vfs.read(handle, 0, 10) == b"data"


async def test_a_name_removed_elsewhere_is_stale() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    workspace_of(vfs).root.drop("literal.txt")
    async with refused(errno.ESTALE):
        await vfs.getattr(number)
    assert (await vfs.lookup(ROOT, b"literal.txt")).number == 0


async def test_changes_elsewhere_are_told_to_the_kernel() -> None:
    workspace = scenario()
    workspace.root = MemoryDirectory(cap=MUTABLE_FILE, names=workspace.root.names)
    vfs = make_vfs(workspace)
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    await vfs.lookup(ROOT, b"unknown")

    async def theirs() -> None:
        workspace.root.put("literal.txt", LiteralCap(b"theirs"))
        workspace.root.drop("unknown")

    workspace.faults["load"] = theirs
    await vfs.lookup(ROOT, b"mutable.txt")
    told = [vfs.invalidations.receive_nowait() for _ in range(2)]
    assert {(each.number, each.name) for each in told} == {(number, None), (ROOT, b"unknown")}
