"""Two writers of one directory: what is changed here and elsewhere at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from cache import Workspace
from grid.formats.caps import LiteralCap
from grid.formats.directory import DirEntry
from tests.cache.memory_client import QUICK, MemoryClient, get, mounted, put

DATA = bytes(range(256)) * 16  # 4 KiB
SLOW = evolve(QUICK, publish_quiet_s=3600.0, publish_latest_s=3600.0, new_directory_latest_s=3600.0)


async def listing(client: MemoryClient, workspace: Workspace) -> dict[str, object]:
    return await client.listing(workspace.root.cap)


async def elsewhere(client: MemoryClient, workspace: Workspace, name: str, data: bytes) -> None:
    """Another client links a file in the root."""
    node = client.create_node_from_uri(workspace.root.cap)
    await node.modify({name: lambda old: DirEntry(name, LiteralCap(data), {})})


async def test_the_same_name_changed_elsewhere_keeps_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with mounted(tmp_path, SLOW) as (client, workspace):
        _, ours = await put(workspace, workspace.root, "name.txt", b"ours")
        await elsewhere(client, workspace, "name.txt", b"theirs")
        await workspace.wait()
        found = await listing(client, workspace)
        assert found.pop("name.txt") == LiteralCap(b"theirs")
        [(name, cap)] = found.items()
        assert cap == ours and name.startswith("name (conflict 2") and name.endswith(" tester).txt")
        assert set(workspace.root.entries()) == {"name.txt", name}
        assert workspace.status()["conflicts"] == 1
        assert "changed elsewhere too" in caplog.text


async def test_a_conflict_is_seen_when_the_directory_is_read_again(tmp_path: Path) -> None:
    async with mounted(tmp_path, SLOW) as (client, workspace):
        made = await workspace.make_directory(workspace.root, "v1.0", {})
        client_root = workspace.root
        await elsewhere(client, workspace, "v1.0", b"theirs")
        await workspace.load(client_root, 0)
        assert len(client_root.entries()) == 2
        await workspace.wait()
        found = await listing(client, workspace)
        assert found.pop("v1.0") == LiteralCap(b"theirs")
        [(name, cap)] = found.items()
        assert cap == made.cap and name.startswith("v1.0 (conflict")


async def test_replacing_or_removing_what_was_changed_elsewhere(tmp_path: Path) -> None:
    async with mounted(tmp_path, SLOW) as (client, workspace):
        for name in ("removed", "replaced", "described"):
            await put(workspace, workspace.root, name, b"old")
        await workspace.wait()
        await workspace.unlink(workspace.root, "removed")
        await put(workspace, workspace.root, "replaced", b"ours")
        await workspace.set_metadata(workspace.root, "described", {"mtime": 1})
        for name in ("removed", "replaced", "described"):
            await elsewhere(client, workspace, name, b"theirs")
        await workspace.wait()
        found = await listing(client, workspace)
        assert [found.pop(name) for name in ("removed", "replaced", "described")] == [LiteralCap(b"theirs")] * 3
        assert list(found.values()) == [LiteralCap(b"ours")]
        entry = workspace.root.get("described")
        assert entry is not None and "mtime" not in entry.metadata


async def test_what_was_begun_before_another_client_took_the_name_is_kept_beside_it(tmp_path: Path) -> None:
    """Both ways: a file that was new here, and one that was changed here."""
    async with mounted(tmp_path) as (client, workspace):
        _, old = await put(workspace, workspace.root, "changed", DATA)
        await workspace.wait()
        for name, over in (("new.txt", None), ("changed", old)):
            contents = await workspace.new_contents(over)
            await contents.write(0, b"ours")
            await elsewhere(client, workspace, name, b"theirs")
            await workspace.load(workspace.root, 0)
            _, _, stored_as = await workspace.store(workspace.root, name, contents, {}, over=over)
            assert stored_as.startswith(f"{name.removesuffix('.txt')} (conflict ")
            await workspace.wait()
            found = await listing(client, workspace)
            assert found[name] == LiteralCap(b"theirs")
            entry = workspace.root.get(stored_as)
            assert entry is not None and (await get(workspace, entry.target))[:4] == b"ours"
            await put(workspace, workspace.root, name, b"ours too")  # what is theirs is known by now
            await workspace.wait()
        assert len(await listing(client, workspace)) == 4
        assert workspace.status()["conflicts"] == 2
