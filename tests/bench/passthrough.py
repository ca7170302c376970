"""The least a file system on pyfuse3 can do: one file, served from another one on the local disk. For comparison.

python -m tests.bench.passthrough FILE MOUNTPOINT       shows FILE as MOUNTPOINT/file; says `ready`
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import Any

import pyfuse3
import trio

FILE_INODE = pyfuse3.ROOT_INODE + 1


class PassThrough(pyfuse3.Operations):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._fd).st_size

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        result = pyfuse3.EntryAttributes()
        result.st_ino = inode
        result.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        result.st_size = 0 if inode == pyfuse3.ROOT_INODE else self._size
        result.entry_timeout = result.attr_timeout = 3600
        return result

    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if name != b"file":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE_INODE)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=1, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return os.pread(self._fd, size, off)


async def serve(path: str, mountpoint: str) -> None:
    pyfuse3.init(PassThrough(path), mountpoint, {"fsname=passthrough"})
    try:
        print("ready", flush=True)
        await pyfuse3.main()
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    trio.run(serve, *sys.argv[1:3])
