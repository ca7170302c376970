"""A VFS over the twin in memory, and the calls of a program on it."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from attrs import frozen

from tahoefs.errnos import FSError
from tahoefs.options import MountOptions
from tahoefs.vfs import VFS
from tests.tahoefs.memory_mount import scenario
from tests.tahoefs.memory_workspace import MemoryWorkspace

ROOT = 1
OPTIONS = MountOptions(uid=0, gid=0, umask=0o022)


@frozen
class Person:
    uid: int = 0
    gid: int = 0
    pid: int = 1
    umask: int = 0o022


ME = Person()
OTHER = Person(uid=4242, gid=4242)


def make_vfs(workspace: MemoryWorkspace | None = None, **options: object) -> VFS:
    return VFS(workspace or scenario(), options=MountOptions(**{"uid": 0, "gid": 0, "umask": 0o022, **options}))


def workspace_of(vfs: VFS) -> MemoryWorkspace:
    assert isinstance(vfs.workspace, MemoryWorkspace)
    return vfs.workspace


@asynccontextmanager
async def refused(number: int) -> AsyncIterator[None]:
    with pytest.raises(FSError) as caught:
        yield
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]


async def create(vfs: VFS, name: bytes, data: bytes = b"", *, flags: int = os.O_RDWR) -> tuple[int, int]:
    handle, _, found = await vfs.create(ROOT, name, 0o644, flags, ME)
    if data:
        await vfs.write(handle, 0, data)
    return handle, found.number


async def close(vfs: VFS, handle: int) -> None:
    await vfs.flush(handle)
    await vfs.release(handle)


async def names(vfs: VFS, number: int = ROOT) -> set[bytes]:
    handle = await vfs.opendir(number)
    listed = {name for name, *_ in await vfs.readdir(handle, 0)}
    await vfs.releasedir(handle)
    return listed - {b".", b".."}


async def contents(vfs: VFS, name: bytes) -> bytes:
    found = await vfs.lookup(ROOT, name)
    handle, _ = await vfs.open(found.number, os.O_RDONLY, ME)
    data = await vfs.read(handle, 0, 1 << 20)
    await vfs.release(handle)
    return data
