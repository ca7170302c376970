"""A hint that a file will be read costs the reader its wait, and nobody anything when it cannot be followed."""

from __future__ import annotations

from pathlib import Path

from cache.prefetch import FILE_BYTES_MAX, QUEUE_MAX
from grid.formats.caps import LiteralCap
from tests.cache.memory_client import get, mounted, stored

DATA = bytes(range(256)) * 16  # 4 KiB


async def test_a_prefetched_file_is_read_without_the_grid(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        cap = await stored(client, DATA)
        workspace.prefetch([cap])
        assert await get(workspace, cap) == DATA  # joins the fetch, or finds it done
        asked = client.calls("get_buckets")
        workspace.prefetch([cap])
        with client.broken():
            assert await get(workspace, cap) == DATA
        assert client.calls("get_buckets") == asked > 0


async def test_only_small_files_that_are_on_the_grid_are_prefetched(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        small, large = await stored(client, DATA), await stored(client, bytes(FILE_BYTES_MAX + 1))
        assert workspace.is_prefetchable(small)
        others = (large, LiteralCap(b"x"), workspace.root, workspace.root.cap)
        assert not any(workspace.is_prefetchable(each) for each in others)


async def test_hints_that_cannot_be_followed_are_forgotten(tmp_path: Path) -> None:
    async with mounted(tmp_path) as (client, workspace):
        caps = [await stored(client, b"%4d" % number * 1000) for number in range(QUEUE_MAX + 20)]
        with client.broken():
            workspace.prefetch(caps)
        for cap in (caps[0], caps[-1]):
            assert len(await get(workspace, cap)) == 4000
