"""Attributes, and who may change what, over the twin in memory: no kernel, no grid."""

import errno
import os
import stat

import pytest
import trio

from grid.formats.caps import CHKReadCap, UnknownCap
from tahoefs.vfs import VFS, Changes, grid_free_bytes
from tahoefs.vfs_core import BELIEF_S_MIN
from tests.memory_server import MemoryServer
from tests.tahoefs.memory_mount import IMMUTABLE_DIRECTORY, MUTABLE_FILE, scenario
from tests.tahoefs.vfs_helpers import (
    ME,
    OPTIONS,
    OTHER,
    ROOT,
    close,
    create,
    make_vfs,
    refused,
    workspace_of,
)


async def test_listing_and_stat_of_immutable_children_need_nothing_but_the_listing() -> None:
    workspace = scenario()
    workspace.root.put("chk", CHKReadCap(bytes(16), bytes(32), 3, 10, 123456))
    vfs = make_vfs(workspace)
    found = await vfs.lookup(ROOT, b"chk")
    assert (found.size, (await vfs.getattr(found.number)).size) == (123456, 123456)
    assert set(workspace.calls) <= {"load"}


async def test_the_size_of_a_mutable_file_is_asked_for_by_stat_only() -> None:
    vfs = make_vfs()
    found = await vfs.lookup(ROOT, b"mutable.txt")
    assert (found.attr_timeout_s, workspace_of(vfs).calls["size_of"]) == (0.0, 0)
    assert (await vfs.getattr(found.number)).size == 6


async def test_metadata_of_others_survives_chmod_and_utimens() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"mutable.txt")).number
    found = await vfs.setattr(number, Changes(mode=0o400, uid=5, mtime_ns=123456789, atime_ns=42), None, ME)
    assert (found.mode & 0o7777, found.uid, found.mtime_ns, found.atime_ns) == (0o400, 5, 123456789, 42)
    metadata = workspace_of(vfs).root.names["mutable.txt"].metadata
    assert metadata["foreign"] == [1, 2] and "no-write" not in metadata


async def test_times_set_on_an_open_file_are_what_is_stored() -> None:
    vfs = make_vfs()
    handle, number = await create(vfs, b"copy", b"data")
    await vfs.setattr(number, Changes(mtime_ns=5, mode=0o600), handle, ME)
    await close(vfs, handle)
    found = await vfs.getattr(number)
    assert (found.mtime_ns, found.mode & 0o7777) == (5, 0o600)
    assert workspace_of(vfs).calls["set_metadata"] == 0, "it went with the contents"


@pytest.mark.parametrize("name", [b"dir-immutable", b"dir-readonly"])
async def test_what_the_cap_does_not_allow_is_refused_without_write_bits(name: bytes) -> None:
    vfs = make_vfs()
    directory = await vfs.lookup(ROOT, name)
    file = await vfs.lookup(directory.number, b"file")
    assert directory.mode & 0o222 == file.mode & 0o222 == 0
    async with refused(errno.EACCES):
        await vfs.open(file.number, os.O_WRONLY, ME)
    async with refused(errno.EACCES):
        await vfs.unlink(directory.number, b"file")
    async with refused(errno.EACCES):
        await vfs.setattr(file.number, Changes(mode=0o777), None, ME)
    async with refused(errno.EACCES):
        await vfs.create(directory.number, b"new", 0o644, os.O_RDWR, ME)


async def test_a_read_only_mount_says_erofs() -> None:
    for vfs in (make_vfs(read_only=True), make_vfs(scenario(readonly=True))):
        number = (await vfs.lookup(ROOT, b"literal.txt")).number
        async with refused(errno.EROFS):
            await vfs.open(number, os.O_RDWR, ME)
        async with refused(errno.EROFS):
            await vfs.mkdir(ROOT, b"new", 0o755, ME)
        async with refused(errno.EROFS):
            await vfs.setattr(number, Changes(atime_ns=1), None, ME)


async def test_an_unknown_cap_is_shown_moved_and_removed_but_not_opened() -> None:
    vfs = make_vfs()
    found = await vfs.lookup(ROOT, b"unknown")
    assert (found.mode, found.size) == (stat.S_IFREG, 0)
    async with refused(errno.EACCES):
        await vfs.open(found.number, os.O_RDONLY, ME)
    await vfs.rename(ROOT, b"unknown", ROOT, b"future")
    assert isinstance(workspace_of(vfs).root.names["future"].target, UnknownCap)
    await vfs.unlink(ROOT, b"future")


async def test_kernel_timeouts_are_bounded_by_poll_where_others_may_write(autojump_clock: object) -> None:
    """The older the listing, the shorter: a change is seen within `poll` and a little, not within twice that."""
    vfs = make_vfs(poll_s=2.5)
    workspace_of(vfs).root.cap = MUTABLE_FILE
    assert (await vfs.lookup(ROOT, b"literal.txt")).entry_timeout_s == 2.5
    assert (await vfs.lookup(ROOT, b"none")).entry_timeout_s == 2.5
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    for wait_s, belief_s in ((1.5, 1.0), (0.9, BELIEF_S_MIN), (10, BELIEF_S_MIN)):
        await trio.sleep(wait_s)
        found = await vfs.getattr(number)
        assert (found.entry_timeout_s, found.attr_timeout_s) == pytest.approx((belief_s, belief_s))
    directory = (await vfs.lookup(ROOT, b"dir-immutable")).number
    assert (await vfs.lookup(directory, b"file")).attr_timeout_s > 60
    assert vfs.inode(directory).target == IMMUTABLE_DIRECTORY


async def test_link_count_of_directories_counts_subdirectories() -> None:
    vfs = make_vfs()
    number = (await vfs.mkdir(ROOT, b"dir", 0o755, ME)).number
    for name in (b"a", b"b"):
        await vfs.mkdir(number, name, 0o755, ME)
    assert (await vfs.getattr(number)).nlink == 4
    await vfs.rmdir(number, b"a")
    assert (await vfs.getattr(number)).nlink == 3
    await vfs.rename(number, b"b", ROOT, b"b")
    assert (await vfs.getattr(number)).nlink == 2


# --- extended attributes


async def test_caps_are_answered_to_who_mounts_and_to_root_but_not_listed() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"mutable.txt")).number
    assert await vfs.getxattr(number, b"user.tahoe.cap", ME) == MUTABLE_FILE.to_string().encode()
    assert await vfs.getxattr(number, b"user.tahoe.readcap", ME) == MUTABLE_FILE.readonly.to_string().encode()
    assert await vfs.getxattr(number, b"user.tahoe.verifycap", ME) == MUTABLE_FILE.verifier.to_string().encode()
    assert await vfs.getxattr(number, b"user.tahoe.kind", OTHER) == b"sdmf"
    assert await vfs.getxattr(number, b"user.tahoe.state", OTHER) == b"stored"
    async with refused(errno.EACCES):
        await vfs.getxattr(number, b"user.tahoe.readcap", OTHER)
    assert await vfs.listxattr(number) == []
    async with refused(errno.EPERM):
        await vfs.setxattr(number, b"user.tahoe.cap", b"x")


async def test_no_write_cap_is_shown_without_write_access() -> None:
    vfs = make_vfs(read_only=True)
    number = (await vfs.lookup(ROOT, b"mutable.txt")).number
    assert await vfs.getxattr(number, b"user.tahoe.cap", ME) == MUTABLE_FILE.readonly.to_string().encode()


async def test_users_attributes_are_kept_within_their_bound() -> None:
    vfs = make_vfs()
    number = (await vfs.lookup(ROOT, b"literal.txt")).number
    await vfs.setxattr(number, b"user.one", b"\0\xff")
    await vfs.setxattr(number, b"user.two", b"2" * 60_000)
    async with refused(errno.ENOSPC):
        await vfs.setxattr(number, b"user.three", b"3" * 6_000)
    assert await vfs.listxattr(number) == [b"user.one", b"user.two"]
    assert await vfs.getxattr(number, b"user.one", OTHER) == b"\0\xff"
    await vfs.removexattr(number, b"user.two")
    async with refused(errno.ENODATA):
        await vfs.removexattr(number, b"user.two")
    for name in (b"system.posix_acl_access", b"security.x", b"trusted.x"):
        async with refused(errno.EOPNOTSUPP):
            await vfs.setxattr(number, name, b"x")
    async with refused(errno.EOPNOTSUPP):
        await vfs.getxattr(number, b"system.posix_acl_access", ME)
    async with refused(errno.ENODATA):
        await vfs.getxattr(number, b"security.capability", ME)


async def test_symlinks_fifos_and_sockets_are_small_files_with_a_type() -> None:
    vfs = make_vfs()
    target = ("ü" * 100).encode()
    link = await vfs.symlink(ROOT, b"link", target, ME)
    assert stat.S_ISLNK(link.mode) and link.size == len(target)
    assert await vfs.readlink(link.number) == target
    assert stat.S_ISFIFO((await vfs.mknod(ROOT, b"fifo", stat.S_IFIFO | 0o600, ME)).mode)
    assert stat.S_ISSOCK((await vfs.mknod(ROOT, b"socket", stat.S_IFSOCK | 0o600, ME)).mode)
    async with refused(errno.EPERM):
        await vfs.mknod(ROOT, b"device", stat.S_IFBLK | 0o600, ME)
    async with refused(errno.EPERM):
        await vfs.hard_link(link.number, ROOT, b"second")


async def test_free_space_is_what_servers_said_and_never_nothing_known() -> None:
    assert make_vfs().statfs().name_bytes_max == 255
    assert make_vfs().statfs().blocks_free > 0
    servers = [MemoryServer(number) for number in range(3)]
    assert grid_free_bytes(servers, 3, 10) == 3 * sum(server.available_space or 0 for server in servers) // 10
    assert grid_free_bytes([], 3, 10) is None
    vfs = VFS(scenario(), options=OPTIONS, free_bytes=lambda: 1 << 30)
    assert vfs.statfs().blocks_free * vfs.statfs().block_bytes == 1 << 30
