"""Pins of a workspace: complete, current, there without the grid, within their bound, and gone when unpinned."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve

from cache import Pin, Pins, Workspace, kept_directory, open_disk, open_workspace
from cache.block_packs import list_packs
from cache.pin_store import FORMAT
from cache.pin_tree import RETRY_FIRST_S
from grid.errors import GridError, NoSuchChildError
from grid.formats.caps import Cap, DirectoryCap, LiteralCap
from grid.formats.segments import LITERAL_BYTES_MAX
from grid.operations.uploadables import DataUploadable
from tests.cache.memory_client import HAPPY, QUICK, K, MemoryClient, N, get, memory_client, put
from tests.grid.peers.loopback import until

OPTIONS = evolve(QUICK, cache_bytes=6 << 20, memory_bytes=1 << 20)
CACHE_BYTES = 6 << 20
DIRECTORIES, NAMES = (100, 1000) if os.environ.get("TAHOEFS_SOAK") == "1" else (5, 200)


def content(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@asynccontextmanager
async def mount(
    client: MemoryClient, root: Cap, state: Path, size: int = CACHE_BYTES, above: Sequence[DirectoryCap] = ()
) -> AsyncIterator[Workspace]:
    options = evolve(OPTIONS, cache_bytes=size)
    async with (
        open_disk(state / "cache", size) as disk,
        open_workspace(client, root, state_dir=state, options=options, disk=disk, above=above) as workspace,
    ):
        await workspace.load(workspace.root)
        yield workspace


def pins_of(workspace: Workspace) -> Pins:
    assert workspace.pins is not None
    return workspace.pins


async def nobody(pin: Pin) -> None:
    pass


async def pin(workspace: Workspace, *path: str) -> Pin:
    """Pin it, and return when it was looked through."""
    await pins_of(workspace).add(path)
    with trio.fail_after(60):
        return await pins_of(workspace).settled(path, nobody)


async def state_of(workspace: Workspace, *path: str) -> dict[str, Any]:
    found = pins_of(workspace).find(path)
    assert found is not None
    return found.status()


def away(client: MemoryClient) -> None:
    for server in client.servers:
        server.connected = False


def back(client: MemoryClient) -> None:
    for server in client.servers:
        server.connected = True


TREE = {
    ("tiny",): b"t",
    ("small",): content(3000, 1),
    ("a", "large"): content(300_000, 2),
    ("a", "b", "c", "deep"): content(5000, 3),
    ("a", "b", "empty"): b"",
}


async def make_tree(client: MemoryClient) -> DirectoryCap:
    """On the grid, by somebody else: TREE, with a mutable file of each format, and a name of an unknown kind."""
    top = await client.create_dirnode({})
    folders: dict[tuple[str, ...], Any] = {(): top}
    for path, data in TREE.items():
        for length in range(1, len(path)):
            if path[:length] not in folders:
                folders[path[:length]] = made = await client.create_dirnode({})
                await folders[path[: length - 1]].set_uri(path[length - 1], made.get_uri(), {})
        await folders[path[:-1]].set_uri(path[-1], await store(client, data), {})
    for kind in ("sdmf", "mdmf"):
        node = await client.nodemaker.create_mutable_file(content(4000, 9), kind)
        await folders["a", "b"].set_uri(kind, node.get_uri(), {})
    cap: DirectoryCap = top.cap
    return cap


async def store(client: MemoryClient, data: bytes) -> str:
    """An immutable file of another client's; returns its cap."""
    if len(data) <= LITERAL_BYTES_MAX:
        return str(LiteralCap(data))
    uploadable = DataUploadable(data, client.node.convergence)
    uploadable.set_default_encoding_parameters({"k": K, "happy": HAPPY, "n": N})
    return str((await client.upload(uploadable)).cap)


async def read(workspace: Workspace, *path: str) -> bytes:
    """A file by its path, as the mount would."""
    target: Any = workspace.root
    for part in path:
        directory = workspace.directory(target)
        await workspace.load(directory)
        entry = directory.get(part)
        if entry is None:
            raise NoSuchChildError(part)
        target = entry.target
    return await get(workspace, target)


async def reads_all(workspace: Workspace, *above: str) -> None:
    for path, data in TREE.items():
        assert await read(workspace, *above, *path) == data, path
    for kind in ("sdmf", "mdmf"):
        assert await read(workspace, *above, "a", "b", kind) == content(4000, 9)


async def press(workspace: Workspace, client: MemoryClient, count: int = 16) -> None:
    """Read so much besides that nothing stays in the cache but what is pinned."""
    for number in range(count):
        cap = client.create_node_from_uri(await store(client, content(600_000, 1000 + number))).cap
        assert await get(workspace, cap) == content(600_000, 1000 + number)


async def test_a_pinned_tree_is_there_without_the_grid(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        top = await make_tree(client)
        await client.create_node_from_uri(root).set_uri("top", str(top), {})
        other = await make_tree(client)
        await client.create_node_from_uri(root).set_uri("other", str(other), {})
        async with mount(client, root, tmp_path) as workspace:
            found = await pin(workspace, "top")
            size = sum(map(len, TREE.values())) + 8000
            assert found.status() == {
                "path": "/top",
                "state": "complete",
                "files": len(TREE) + 2,
                "files_held": len(TREE) + 2,
                "bytes": size,
                "bytes_held": size,
                "message": None,
            }
            assert pins_of(workspace).status() == workspace.status()["pinned"] == [found.status()]
            assert await read(workspace, "other", "small") == TREE["small",]
            await press(workspace, client)
            assert workspace.status()["cache"]["bytes"] <= CACHE_BYTES
            assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.pack")) <= CACHE_BYTES
        away(client)
        async with mount(client, root.readonly, tmp_path) as workspace:
            await until(lambda: workspace.offline)
            await reads_all(workspace, "top")
            assert (await state_of(workspace, "top"))["state"] == "complete"
            with pytest.raises(GridError):
                await read(workspace, "other", "a", "large")


async def test_nothing_is_fetched_twice_and_a_remount_fetches_nothing(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        await client.create_node_from_uri(root).set_uri("top", str(await make_tree(client)), {})
        async with mount(client, root, tmp_path) as workspace:
            assert (await pin(workspace, "top")).state == "complete"
        reads = client.calls("read")
        assert reads > 0
        async with mount(client, root, tmp_path) as workspace:
            assert (await pin(workspace, "top")).state == "complete"
            assert (await pin(workspace, "top", "a")).state == "complete"
            assert (await pin(workspace, "top", "a", "large")).state == "complete"
        assert client.calls("read") == reads


async def test_changes_of_others_and_of_ours_arrive(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        top = await make_tree(client)
        await client.create_node_from_uri(root).set_uri("top", str(top), {})
        node = client.create_node_from_uri(top)
        below = await node.get_child_at_path("a/b")
        async with mount(client, root, tmp_path) as workspace:
            await pin(workspace, "top")
            await pin(workspace, "top", "small")
            await node.set_uri("small", await store(client, content(4000, 20)), {})
            made = await client.create_dirnode({})
            await made.set_uri("inside", await store(client, content(2000, 21)), {})
            await below.set_uri("new folder", made.get_uri(), {})
            await below.delete("empty")
            await (await below.get("sdmf")).replace(content(4500, 22))
            entry = workspace.root.get("top")
            assert entry is not None
            directory = workspace.directory(entry.target)
            await workspace.load(directory)
            await put(workspace, directory, "ours", content(3000, 23))
            await workspace.drain()
            wanted = sum(map(len, TREE.values())) + 1000 + 2000 + 4500 + 4000 + 3000
            await until(lambda: pins_of(workspace).status()[0]["bytes_held"] == wanted, timeout_s=30)
            await until(lambda: pins_of(workspace).status()[1]["bytes_held"] == 4000, timeout_s=30)
            await press(workspace, client)
        away(client)
        async with mount(client, root, tmp_path) as workspace:
            await until(lambda: workspace.offline)
            assert await read(workspace, "top", "small") == content(4000, 20)
            assert await read(workspace, "top", "a", "b", "new folder", "inside") == content(2000, 21)
            assert await read(workspace, "top", "a", "b", "sdmf") == content(4500, 22)
            assert await read(workspace, "top", "ours") == content(3000, 23)
            with pytest.raises(NoSuchChildError):
                await read(workspace, "top", "a", "b", "empty")


async def test_a_pin_follows_its_path_and_its_directory(tmp_path: Path) -> None:
    """It is taken along with a directory that is renamed here; a path that is gone holds nothing until it is back."""
    async with memory_client() as (client, root):
        top = await make_tree(client)
        node = client.create_node_from_uri(root)
        await node.set_uri("top", str(top), {})
        async with mount(client, root, tmp_path) as workspace:
            await pin(workspace, "top", "a")
            await node.delete("top")
            await node.set_uri("new name", str(top), {})
            await until(lambda: pins_of(workspace).status()[0]["state"] == "missing", timeout_s=30)
            await pins_of(workspace).moved([(("other",), ("elsewhere",)), (("top",), ("new name",))])
            await until(lambda: pins_of(workspace).status()[0]["state"] == "complete", timeout_s=30)
            assert pins_of(workspace).status()[0]["path"] == "/new name/a"
            assert pins_of(workspace).around(("new name", "a", "b")) is not None
        async with mount(client, root, tmp_path) as workspace:
            assert pins_of(workspace).status()[0]["path"] == "/new name/a"


async def test_what_is_unpinned_is_ordinary_cache(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        await client.create_node_from_uri(root).set_uri("top", str(await make_tree(client)), {})
        async with mount(client, root, tmp_path) as workspace:
            await pin(workspace, "top")
            assert await pins_of(workspace).remove(("top",)) and not await pins_of(workspace).remove(("top",))
            assert workspace.status()["pinned"] == []
            await until(lambda: not list((tmp_path / "cache" / "pinned-1").glob("*.pack")), timeout_s=30)
        away(client)
        async with mount(client, root, tmp_path) as workspace:  # it is still there …
            await until(lambda: workspace.offline)
            await reads_all(workspace, "top")
        back(client)
        async with mount(client, root, tmp_path) as workspace:  # … and goes as other things come
            await press(workspace, client)
        away(client)
        with pytest.raises(GridError):
            async with mount(client, root, tmp_path) as workspace:
                await read(workspace, "top", "a", "large")


async def test_what_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        node = client.create_node_from_uri(root)
        await node.set_uri("large", await store(client, content(5 << 20, 1)), {})
        small = await store(client, content(1 << 20, 2))
        await node.set_uri("small", small, {})
        cap = client.create_node_from_uri(small).cap
        copies = await client.create_dirnode({f"copy{number}": (cap, {}) for number in range(6)})
        await node.set_uri("copies", copies.get_uri(), {})
        async with mount(client, root, tmp_path, 6 << 20) as workspace:
            found = await pin(workspace, "large")
            assert found.state == "full" and found.bytes_held == 0
            assert found.message is not None and "takes 5.0 MiB more" in found.message
            assert "may take 4.5 MiB of the cache" in found.message and "cache_size=" in found.message
            assert (await pin(workspace, "copies")).state == "complete"  # what is linked often counts once
            assert sum(list_packs(tmp_path / "cache" / FORMAT).values()) < 3 << 19  # and is fetched once
            assert (await pin(workspace, "small")).state == "complete"
            await pins_of(workspace).remove(("large",))
        async with mount(client, root, tmp_path, 60 << 20) as workspace:
            found = await pin(workspace, "large")
            assert (found.state, found.message) == ("complete", None)
        async with mount(client, root, tmp_path, 6 << 20) as workspace:  # nothing that is pinned goes; it is said
            found = await pin(workspace, "large")
            assert found.state == "complete" and found.message is not None
            assert found.message.startswith("pins hold 6.") and "may take 4.5 MiB of this cache" in found.message


async def test_offline_it_waits_and_goes_on(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        await client.create_node_from_uri(root).set_uri("top", str(await make_tree(client)), {})
        async with mount(client, root, tmp_path) as workspace:
            await read(workspace, "top", "small")
            away(client)
            await until(lambda: workspace.offline)
            found = await pin(workspace, "top")
            assert found.state == "waiting" and found.message is not None and "/top/a: " in found.message
            for _ in range(2):
                assert (await pin(workspace, "top", "small")).state == "complete"
            back(client)
            await until(lambda: pins_of(workspace).status()[0]["state"] == "complete", timeout_s=30)
            with pytest.raises(NoSuchChildError):
                await pins_of(workspace).settled(("not pinned",), nobody)


async def test_what_cannot_be_had_is_named_and_tried_again(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        await client.create_node_from_uri(root).set_uri("top", str(await make_tree(client)), {})
        async with mount(client, root, tmp_path) as workspace:
            entry = (await client.create_node_from_uri(root).read()).entries["top"]
            large = await client.create_node_from_uri(entry.cap).get_child_at_path("a/large")
            index = large.get_storage_index()
            kept = [server.immutable.pop(index, None) for server in client.servers]
            found = await pin(workspace, "top")
            assert (found.state, found.files_held) == ("incomplete", found.files - 1)
            assert found.message is not None and found.message.startswith("/top/a/large: ")
            for server, shares in zip(client.servers, kept, strict=True):
                if shares is not None:
                    server.immutable[index] = shares
            assert (await pin(workspace, "top")).state == "complete"  # at once, as somebody asked
            assert RETRY_FIRST_S > 1


async def test_damage_is_mended(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        await client.create_node_from_uri(root).set_uri("top", str(await make_tree(client)), {})
        async with mount(client, root, tmp_path) as workspace:
            await pin(workspace, "top")
        for pack in (tmp_path / "cache" / "pinned-1").glob("*.pack"):
            data = bytearray(pack.read_bytes())
            for place in range(500, len(data), 50_000):
                data[place] ^= 0x40
            pack.write_bytes(data)
        async with mount(client, root, tmp_path) as workspace:
            await reads_all(workspace, "top")  # finds it out
            await until(lambda: pins_of(workspace).status()[0]["state"] == "complete", timeout_s=30)
            assert (await pin(workspace, "top")).state == "complete"
        away(client)
        async with mount(client, root, tmp_path) as workspace:
            await until(lambda: workspace.offline)
            await reads_all(workspace, "top")


async def test_nobody_else_can_read_the_list(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        await client.create_node_from_uri(root).set_uri("a secret name", str(await make_tree(client)), {})
        async with mount(client, root, tmp_path) as workspace:
            await pin(workspace, "a secret name")
        for path in [*(tmp_path / "pins").rglob("*"), *(tmp_path / "cache" / "pinned-1").iterdir()]:
            data = path.read_bytes()
            assert b"secret" not in data and b"URI:" not in data and b"deep" not in data, path
            assert path.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "pins").stat().st_mode & 0o777 == 0o700
        (listed,) = (tmp_path / "pins").glob("*.pins")
        listed.write_bytes(b"?" + listed.read_bytes()[1:])
        async with mount(client, root, tmp_path) as workspace:
            assert workspace.status()["pinned"] == []
            assert listed.with_suffix(".damaged").exists()


async def test_two_mounts_of_one_root_share_its_pins(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        await client.create_node_from_uri(root).set_uri("top", str(await make_tree(client)), {})
        async with mount(client, root, tmp_path) as one, mount(client, root, tmp_path) as two:
            assert (await pin(one, "top")).state == "complete"
            assert (await pin(two, "top", "a")).state == "complete"  # kept by the first
            await until(lambda: len(one.status()["pinned"]) == len(two.status()["pinned"]) == 2, timeout_s=30)
            await pins_of(two).remove(("top",))
            await until(lambda: len(one.status()["pinned"]) == 1, timeout_s=30)


async def test_a_directory_that_contains_itself(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        node = client.create_node_from_uri(root)
        await node.set_uri("again", str(root), {})
        await node.set_uri("file", await store(client, content(1000, 1)), {})
        async with mount(client, root, tmp_path) as workspace:
            found = await pin(workspace)
            assert (found.state, found.files, found.status()["path"]) == ("complete", 1, "/")


async def test_a_tree_of_many_names(tmp_path: Path) -> None:
    """Looked through without anything growing with it but the numbers; once it is complete only versions are asked."""
    async with memory_client() as (client, root):
        files = [client.create_node_from_uri(await store(client, content(1000, seed))).cap for seed in range(20)]
        children: dict[str, Any] = {}
        for number in range(DIRECTORIES):
            names: dict[str, Any] = {f"file{name}": (files[name % 20], {}) for name in range(NAMES)}
            children[f"folder{number}"] = ((await client.create_dirnode(names)).cap, {})
        top = await client.create_dirnode(children)
        await client.create_node_from_uri(root).set_uri("top", top.get_uri(), {})
        async with mount(client, root, tmp_path, 64 << 20) as workspace:
            for _ in range(2):
                await pins_of(workspace).add(("top",))
                with trio.fail_after(600):
                    found = await pins_of(workspace).settled(("top",), nobody)
                count = DIRECTORIES * NAMES
                assert (found.state, found.files_held, found.bytes_held) == ("complete", count, 1000 * count)
            out = sum(server.slot_bytes_out for server in client.servers)
            looks = found.looks
            await until(lambda: _looks(workspace) >= looks + 2, timeout_s=600)
            asked = sum(server.slot_bytes_out for server in client.servers) - out
            assert asked < DIRECTORIES * 50_000  # not the listings, which are NAMES times as long as a cap


def _looks(workspace: Workspace) -> int:
    found = pins_of(workspace).find(("top",))
    assert found is not None
    return found.looks


async def test_what_leads_to_the_mounted_directory_is_held_too(tmp_path: Path) -> None:
    """Or a mount of alias:top would not find its directory again without the grid."""
    async with memory_client() as (client, root):
        top = await make_tree(client)
        await client.create_node_from_uri(root).set_uri("top", str(top), {})
        async with mount(client, root, tmp_path):
            pass
        async with mount(client, top, tmp_path, above=[root]) as workspace:
            assert (await pin(workspace, "small")).state == "complete"
            await press(workspace, client)
        async with open_disk(tmp_path / "cache", CACHE_BYTES) as disk:
            kept = await kept_directory(client, root, disk)
            assert kept is not None and kept.entries["top"].cap == top


async def test_the_cache_is_removed_while_it_is_mounted(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        await client.create_node_from_uri(root).set_uri("top", str(await make_tree(client)), {})
        async with mount(client, root, tmp_path) as workspace:
            await pin(workspace, "top")
            shutil.rmtree(tmp_path / "cache")
            assert (await pin(workspace, "top")).state == "complete"
            assert list((tmp_path / "cache" / "pinned-1").glob("*.pack"))
        away(client)
        async with mount(client, root, tmp_path) as workspace:
            await until(lambda: workspace.offline)
            await reads_all(workspace, "top")
