"""Between the kernel and the VFS: translates values, and guards every call. Decides nothing.

    /dev/fuse → pyfuse3 → TahoeOperations (here) → VFS

Each handler has a deadline, since a caller whose request is never answered cannot even be killed; each error becomes an
errno by the one table; and an exception that is a bug is logged, counted and answered EIO, since one that escaped would
end the mount for everybody.

Limits of the binding: one mount a process; reads arrive in at most 128 KiB; `syncfs` never arrives.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from grid import stats
from tahoefs.errnos import errno_of, is_expected
from tahoefs.failures import leaf_error
from tahoefs.options import MountOptions
from tahoefs.vfs import VFS, Changes, Stat
from tahoefs.vfs_attributes import IO_BYTES, STAT_BLOCK_BYTES
from tahoefs.vfs_core import GRID_WAIT_TIMEOUT_S

log = logging.getLogger(__name__)

DATA_TIMEOUT_S: Final = 30.0
METADATA_TIMEOUT_S: Final = 10.0
ANSWER_TIMEOUT_S: Final = 10.0  # for the kernel's first answer about a new mount
CLOSING_TIMEOUT_S: Final = 60.0  # for storing what is open when the mount ends
TASKS_MAX: Final = 512  # requests in work at once: a burst of slow reads must not keep a stat waiting
FILESYSTEM: Final = "tahoefs"

SECONDS: Final = stats.histograms("fuse_seconds", "Seconds a request of the kernel took us.", label="request")
ERRORS: Final = stats.counters("fuse_errors", "Requests of the kernel that ended with an error.", label="errno")
READ_BYTES: Final = stats.counter("fuse_read_bytes", "Bytes programs read from files of the mount.")
WRITTEN_BYTES: Final = stats.counter("fuse_written_bytes", "Bytes programs wrote to files of the mount.")

P = ParamSpec("P")
R = TypeVar("R")
Handler = Callable[Concatenate["TahoeOperations", P], Coroutine[Any, Any, R]]


class Deadlines:
    """Seconds each class of request may take."""

    def __init__(self, options: MountOptions) -> None:
        on_grid = GRID_WAIT_TIMEOUT_S if options.durability == "grid" else 0.0
        self.data = options.timeout_s or DATA_TIMEOUT_S
        self.metadata = options.timeout_s or METADATA_TIMEOUT_S
        self.store = self.data + on_grid  # what contents are handed over in
        self.change = self.metadata + on_grid  # what changes names


def guarded(deadline: str) -> Callable[[Handler[P, R]], Handler[P, R]]:
    """A handler with its deadline, whose every exception becomes an errno."""

    def decorate(method: Handler[P, R]) -> Handler[P, R]:
        name = getattr(method, "__name__", "handler")
        seconds = SECONDS.of(name)

        @functools.wraps(method)
        async def handler(self: TahoeOperations, /, *args: P.args, **kwargs: P.kwargs) -> R:
            began = trio.current_time()
            try:
                with trio.fail_after(getattr(self.deadlines, deadline)):
                    return await method(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 one that escaped would end the mount
                raise self.failure(name, error) from None
            finally:
                seconds.observe(trio.current_time() - began)

        return handler

    return decorate


class TahoeOperations(pyfuse3.Operations):
    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, vfs: VFS, options: MountOptions) -> None:
        super().__init__()
        self.vfs = vfs
        self.deadlines = Deadlines(options)

    def failure(self, name: str, error: Exception) -> FUSEError:
        """The answer to a call that raised."""
        if isinstance(error, FUSEError):
            return error
        leaf = leaf_error(error)
        if not is_expected(leaf):
            self.vfs.faults += 1
            log.error("fault in %s, answered with EIO", name, exc_info=error)
        elif isinstance(leaf, trio.TooSlowError):
            self.vfs.timeouts += 1
            log.warning("%s missed its deadline", name)
        elif not hasattr(leaf, "errno"):
            log.warning("%s: %s", name, leaf)
        number = errno_of(leaf)
        ERRORS.of(errno.errorcode.get(number, "other")).add()
        return FUSEError(number)

    # --- names -----------------------------------------------------------------------------------------------

    @guarded("metadata")
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> EntryAttributes:
        return attributes(await self.vfs.lookup(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        self.vfs.forget(list(inode_list))

    @guarded("change")
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> EntryAttributes:
        return attributes(await self.vfs.mknod(parent_inode, name, mode, ctx))

    @guarded("change")
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> EntryAttributes:
        return attributes(await self.vfs.mkdir(parent_inode, name, mode, ctx))

    @guarded("change")
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> EntryAttributes:
        return attributes(await self.vfs.symlink(parent_inode, name, target, ctx))

    @guarded("data")
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return await self.vfs.readlink(inode)

    @guarded("change")
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self.vfs.unlink(parent_inode, name)

    @guarded("change")
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        await self.vfs.rmdir(parent_inode, name)

    @guarded("change")
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        await self.vfs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)

    @guarded("metadata")
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> EntryAttributes:
        return attributes(await self.vfs.hard_link(inode, new_parent_inode, new_name))

    # --- attributes ------------------------------------------------------------------------------------------

    @guarded("metadata")
    async def getattr(self, inode: int, ctx: Any) -> EntryAttributes:
        return attributes(await self.vfs.getattr(inode))

    @guarded("store")
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: Any, fh: int | None, ctx: Any
    ) -> EntryAttributes:
        return attributes(await self.vfs.setattr(inode, wanted_changes(attr, fields), fh, ctx))

    @guarded("metadata")
    async def access(self, inode: int, mode: int, ctx: Any) -> bool:
        groups = frozenset(pyfuse3.get_sup_groups(ctx.pid)) if ctx.uid else frozenset()
        return await self.vfs.access(inode, mode, ctx, groups)

    @guarded("metadata")
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        space = self.vfs.statfs()
        result = pyfuse3.StatvfsData()
        result.f_bsize = result.f_frsize = space.block_bytes
        result.f_blocks = space.blocks
        result.f_bfree = result.f_bavail = space.blocks_free
        result.f_files = result.f_ffree = result.f_favail = space.inodes
        result.f_namemax = space.name_bytes_max
        return result

    @guarded("metadata")
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        return await self.vfs.getxattr(inode, name, ctx)

    @guarded("metadata")
    async def listxattr(self, inode: int, ctx: Any) -> Sequence[bytes]:
        return await self.vfs.listxattr(inode)

    @guarded("change")
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: Any) -> None:
        await self.vfs.setxattr(inode, name, value)

    @guarded("change")
    async def removexattr(self, inode: int, name: bytes, ctx: Any) -> None:
        await self.vfs.removexattr(inode, name)

    # --- files -----------------------------------------------------------------------------------------------

    @guarded("data")
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[FileInfo, EntryAttributes]:
        handle, keeps_pages, found = await self.vfs.create(parent_inode, name, mode, flags, ctx)
        return FileInfo(fh=handle, keep_cache=keeps_pages), attributes(found)

    @guarded("data")
    async def open(self, inode: int, flags: int, ctx: Any) -> FileInfo:
        handle, keeps_pages = await self.vfs.open(inode, flags, ctx)
        return FileInfo(fh=handle, keep_cache=keeps_pages)

    @guarded("data")
    async def read(self, fh: int, off: int, size: int) -> bytes:
        data = await self.vfs.read(fh, off, size)
        READ_BYTES.add(len(data))
        return data

    @guarded("data")
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        count = await self.vfs.write(fh, off, buf)
        WRITTEN_BYTES.add(count)
        return count

    @guarded("store")
    async def flush(self, fh: int) -> None:
        await self.vfs.flush(fh)

    @guarded("store")
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self.vfs.fsync(fh)

    @guarded("store")
    async def release(self, fh: int) -> None:
        await self.vfs.release(fh)

    # --- directories -----------------------------------------------------------------------------------------

    @guarded("metadata")
    async def opendir(self, inode: int, ctx: Any) -> int:
        return await self.vfs.opendir(inode)

    @guarded("metadata")
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for name, found, next_id, child in await self.vfs.readdir(fh, start_id):
            if not pyfuse3.readdir_reply(token, name, attributes(found), next_id):
                break
            if child is not None:
                child.lookups += 1

    @guarded("metadata")
    async def releasedir(self, fh: int) -> None:
        await self.vfs.releasedir(fh)

    @guarded("store")
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self.vfs.fsyncdir(fh)


def attributes(found: Stat) -> EntryAttributes:
    result = EntryAttributes()
    result.st_ino = found.number
    result.entry_timeout = found.entry_timeout_s
    result.attr_timeout = found.attr_timeout_s
    result.st_mode = found.mode
    result.st_nlink = found.nlink
    result.st_uid = found.uid
    result.st_gid = found.gid
    result.st_size = found.size
    result.st_blksize = IO_BYTES
    result.st_blocks = -(-found.size // STAT_BLOCK_BYTES)
    result.st_atime_ns = found.atime_ns
    result.st_mtime_ns = found.mtime_ns
    result.st_ctime_ns = found.ctime_ns
    return result


def wanted_changes(attr: EntryAttributes, fields: Any) -> Changes:
    return Changes(
        size=attr.st_size if fields.update_size else None,
        mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        atime_ns=attr.st_atime_ns if fields.update_atime else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
    )


def fuse_arguments(options: MountOptions, label: str, *, read_only: bool) -> set[str]:
    """What libfuse is told. `label` is shown as the source of the mount; it never holds a cap.

    The kernel judges by mode bits, as on any file system, unless `uid=` or `gid=` show owners that nobody
    here need be.
    """
    arguments = {*options.fuse, f"fsname={label.replace(chr(92), chr(92) * 2).replace(',', chr(92) + ',')}"}
    arguments.add(f"subtype={FILESYSTEM}")
    if read_only:
        arguments.add("ro")
    if options.uid is None and options.gid is None:
        arguments.add("default_permissions")
    return arguments


async def serve(
    vfs: VFS,
    mountpoint: Path | str,
    options: MountOptions,
    label: str = FILESYSTEM,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Mount, and answer the kernel until somebody unmounts; cancelled, it unmounts itself.

    `started()` once the kernel answers. What is still open for writing at the end is stored. Raises RuntimeError
    when the mount is refused (libfuse has then said why on standard error).
    """
    operations = TahoeOperations(vfs, options)
    pyfuse3.init(operations, str(mountpoint), fuse_arguments(options, label, read_only=vfs.read_only))
    answering = trio.CancelScope(shield=True)  # so that requests are answered until no thread is at the kernel's pages
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_tell_kernel, vfs)

            async def push() -> None:
                try:
                    await vfs.pusher.run(_store_pages)
                finally:
                    answering.cancel()

            async def answer() -> None:
                with answering:
                    await pyfuse3.main(max_tasks=TASKS_MAX)
                nursery.cancel_scope.cancel()

            nursery.start_soon(push)
            nursery.start_soon(answer)
            with trio.fail_after(ANSWER_TIMEOUT_S):
                await trio.to_thread.run_sync(os.stat, mountpoint, abandon_on_cancel=True)
            task_status.started()
    finally:
        pyfuse3.close(unmount=True)
        with trio.move_on_after(CLOSING_TIMEOUT_S, shield=True):
            await vfs.store_all()


def _store_pages(number: int, offset: int, data: memoryview) -> None:
    """In a worker thread. Raises OSError: ENOENT when the kernel has forgotten the inode."""
    pyfuse3.notify_store(number, offset, data)  # type: ignore[arg-type]  # any buffer will do


async def _tell_kernel(vfs: VFS) -> None:
    """Pass on what the kernel should no longer believe: from a thread, as it may wait for answers of ours."""
    async for invalidation in vfs.invalidations:
        with contextlib.suppress(OSError):  # ENOENT: the kernel had nothing of it
            if invalidation.name is None:
                await trio.to_thread.run_sync(pyfuse3.invalidate_inode, invalidation.number, abandon_on_cancel=True)
            else:
                pyfuse3.invalidate_entry_async(invalidation.number, invalidation.name, ignore_enoent=True)
