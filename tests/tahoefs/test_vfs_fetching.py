"""Writing inside a stored file fetches of it only what is not overwritten, counted in segments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from attrs import evolve

from grid.formats.segments import MAX_SEGMENT_BYTES
from tahoefs.options import MountOptions
from tahoefs.vfs import VFS
from tests.cache.memory_client import QUICK, mounted, put
from tests.tahoefs.vfs_helpers import ME, ROOT, close

SEGMENTS = 6
DATA = os.urandom(SEGMENTS * MAX_SEGMENT_BYTES)


@pytest.mark.parametrize(
    ("offset", "length", "fetched"),
    [
        (0, len(DATA), 0),
        (MAX_SEGMENT_BYTES, 3 * MAX_SEGMENT_BYTES, 3),
        (0, 5 * MAX_SEGMENT_BYTES, 1),
        (100, len(DATA) - 200, 2),
        (len(DATA), 1000, SEGMENTS),
    ],
    ids=["all", "the middle", "the start", "all but the ends", "appended"],
)
async def test_only_what_is_not_overwritten_is_fetched(tmp_path: Path, offset: int, length: int, fetched: int) -> None:
    async with mounted(tmp_path, evolve(QUICK, keep_bytes=0)) as (client, workspace):
        position, _ = await put(workspace, workspace.root, "file", DATA)
        await workspace.wait(position)
        before = workspace.status()["cache"]["bytes"]  # read-ahead counts as well
        vfs = VFS(workspace, options=MountOptions(uid=0, gid=0, umask=0o022))
        found = await vfs.lookup(ROOT, b"file")
        handle, _ = await vfs.open(found.number, os.O_WRONLY, ME)
        await vfs.write(handle, offset, b"n" * length)
        await close(vfs, handle)
        await workspace.wait()
        assert (workspace.status()["cache"]["bytes"] - before) // MAX_SEGMENT_BYTES == fetched
        (cap,) = (await client.listing(workspace.root.cap)).values()
        assert await client.fetch(cap) == DATA[:offset] + b"n" * length + DATA[offset + length :]
