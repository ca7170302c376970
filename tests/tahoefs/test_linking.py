"""ln and clone, over the real workspace and servers in memory: what is shared, what is copied, and what is refused."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve

from cache import FileTooLargeError, Workspace, open_workspace, uploads
from grid.errors import GridError, NoSuchChildError, WrongKindError
from grid.formats.caps import LiteralCap, UnknownCap
from tahoefs import linking as linking_module
from tahoefs.errnos import FSError
from tahoefs.link_requests import LinkingError, LinkRequests
from tahoefs.linking import Found, Linking
from tahoefs.options import MountOptions
from tahoefs.targets import Kind, cap_of
from tahoefs.vfs import VFS
from tests.cache.memory_client import QUICK, MemoryClient, get, memory_client, mounted, put
from tests.tahoefs.vfs_helpers import ME, ROOT

DATA = bytes(range(256)) * 16


@define
class Tree:
    client: MemoryClient
    workspace: Workspace
    vfs: VFS
    linking: Linking

    async def put(self, path: str, data: bytes = DATA, metadata: Any = None) -> Any:
        *parents, name = path.split("/")
        directory = self.workspace.root
        for part in parents:
            entry = directory.get(part)
            directory = (
                await self.workspace.make_directory(directory, part, {})
                if entry is None
                else self.workspace.directory(entry.target)
            )
        return (await put(self.workspace, directory, name, data, metadata))[1]

    async def clone(self, src: str, dst: str, mutable: str | None = None) -> int:
        return await self.linking.clone(await self.linking.find(src.split("/")), dst.split("/"), mutable=mutable)

    async def link(self, found: Found, dst: str) -> None:
        await self.linking.link(found, dst.split("/"))

    async def read(self, path: str) -> bytes:
        return await get(self.workspace, (await self.linking.find(path.split("/"))).target)

    async def names(self, path: str = "") -> dict[str, Any]:
        """{name: target} at `path`, on the grid and pending."""
        found = await self.linking.find([part for part in path.split("/") if part])
        directory = self.workspace.directory(found.target)
        await self.workspace.load(directory)
        return {name: entry.target for name, entry in directory.entries().items()}


@pytest.fixture
async def tree(tmp_path: Path) -> AsyncIterator[Tree]:
    async with mounted(tmp_path) as (client, workspace):
        vfs = VFS(workspace, options=MountOptions())
        yield Tree(client, workspace, vfs, Linking(vfs))


async def test_a_cloned_file_is_the_same_one(tree: Tree) -> None:
    target = await tree.put("file", metadata={"tahoefs": {"mode": 0o600, "mtime_ns": 17}, "foreign": [1]})
    await tree.workspace.wait()
    assert await tree.clone("file", "copy") == 1
    await tree.workspace.wait()
    assert tree.client.uploads == 1
    contents = await tree.client.create_node_from_uri(tree.workspace.root.cap).read()
    assert contents.entries["copy"].cap == target.cap
    metadata = contents.entries["copy"].metadata
    assert metadata["foreign"] == [1] and metadata["tahoefs"].items() >= {"mode": 0o600, "mtime_ns": 17}.items()


async def test_a_file_on_its_way_is_cloned_and_sent_once(tree: Tree) -> None:
    tree.client.pause()
    target = await tree.put("file")
    await tree.clone("file", "copy")
    await tree.workspace.unlink(tree.workspace.root, "file")
    tree.client.resume()
    await tree.workspace.wait()
    assert tree.client.uploads == 1 and await tree.client.listing(tree.workspace.root.cap) == {"copy": target.cap}


async def test_a_clone_of_a_tree_stays_as_it_is(tree: Tree) -> None:
    first = await tree.put("src/a")
    await tree.put("src/below/b", b"short")
    await tree.put("src/below/c", DATA * 2)
    await tree.workspace.wait()
    await tree.put("src/below/d", DATA * 3)  # not sent yet
    uploads = tree.client.uploads
    assert await tree.clone("src", "dst") == 6
    await tree.put("src/a", b"changed")
    await tree.put("src/below/new")
    await tree.put("dst/below/own")
    await tree.workspace.wait()
    assert await tree.read("dst/a") == DATA and await tree.read("dst/below/b") == b"short"
    assert (await tree.names("dst"))["a"] == first.cap
    assert set(await tree.names("dst/below")) == {"b", "c", "d", "own"}
    assert set(await tree.names("src/below")) == {"b", "c", "d", "new"}
    assert tree.client.uploads == uploads + 3  # d, new and own: nothing that was cloned
    caps = {(await tree.linking.find(path.split("/"))).target for path in ("src", "dst", "src/below", "dst/below")}
    assert len(caps) == 4


async def test_mutable_files_are_copied(tree: Tree) -> None:
    node = await tree.client.nodemaker.create_mutable_file(b"first")
    await tree.workspace.link(tree.workspace.root, "mutable", node.cap, {"tahoefs": {"mode": 0o640}})
    await tree.workspace.wait()
    assert await tree.clone("mutable", "copy") == 1
    await tree.put("src/x")
    await tree.linking.link(await tree.linking.find(["mutable"]), ["src"])  # into it, under its name
    await tree.clone("src", "dst")
    await node.replace(b"second, and longer")
    await tree.workspace.wait()
    for path in ("copy", "dst/mutable"):
        assert await tree.read(path) == b"first"
    assert await tree.read("src/mutable") == b"second, and longer"
    copy = await tree.linking.find(["copy"])
    assert not copy.target.is_mutable and copy.metadata["tahoefs"]["mode"] == 0o640
    assert copy.metadata["tahoefs"]["size"] == 5


@pytest.mark.parametrize("kind", ["sdmf", "mdmf"])
async def test_converting_files_to_mutable_ones_and_back(tree: Tree, kind: str) -> None:
    other = "mdmf" if kind == "sdmf" else "sdmf"
    stored = await tree.put("src/stored", metadata={"no-write": True, "foreign": 1, "tahoefs": {"size": 4096}})
    await tree.put("src/below/short", b"short")
    await tree.put("src/empty", b"")
    node = await tree.client.nodemaker.create_mutable_file(b"mutable", other)
    source = tree.workspace.directory((await tree.linking.find(["src"])).target)
    await tree.workspace.link(source, "mutable", node.cap, {})
    await tree.workspace.wait()
    await tree.put("src/pending", DATA * 3)
    await tree.vfs.symlink((await tree.vfs.lookup(ROOT, b"src")).number, b"link", b"else/where" * 9, ME)
    contents = {"stored": DATA, "below/short": b"short", "empty": b"", "mutable": b"mutable", "pending": DATA * 3}

    assert await tree.clone("src", "dst", kind) == 8
    await tree.workspace.wait()
    caps = {path: cap_of((await tree.linking.find(["dst", *path.split("/")])).target) for path in contents}
    assert {cap.kind for cap in caps.values()} == {kind} and len(set(caps.values())) == len(contents)
    for path, data in contents.items():
        assert await tree.client.fetch(caps[path]) == data, path
    metadata = (await tree.linking.find(["dst", "stored"])).metadata
    assert metadata["foreign"] == 1 and metadata["tahoefs"]["mode"] & 0o222 == 0
    assert "no-write" not in metadata and "size" not in metadata["tahoefs"]  # the one costs others the write cap
    assert (await tree.names("src"))["stored"] == stored.cap
    link = await tree.vfs.lookup((await tree.vfs.lookup(ROOT, b"dst")).number, b"link")
    assert await tree.vfs.readlink(link.number) == b"else/where" * 9

    await tree.clone("dst", "back", "none")
    await tree.clone("src/stored", "same", "none")
    await node.replace(b"changed")
    await tree.workspace.wait()
    for path, data in contents.items():
        target = (await tree.linking.find(["back", *path.split("/")])).target
        assert not cap_of(target).is_mutable and await tree.read(f"back/{path}") == data
    assert (await tree.names())["same"] == stored.cap


async def test_what_is_too_large_for_a_format_is_not_converted(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uploads._BYTES_MAX, "sdmf", 100)
    await tree.put("src/fits", b"x" * 100)
    await tree.put("src/large", b"x" * 101)
    with pytest.raises(FileTooLargeError):
        await tree.clone("src", "dst", "sdmf")
    assert set(await tree.names()) == {"src"}


async def test_mutable_files_on_their_way_are_copied(tmp_path: Path) -> None:
    """A file is of the kind it was stored as, whoever sends it in the end; its clone is another one."""
    async with memory_client() as (client, root):
        async with open_workspace(client, root, state_dir=tmp_path, options=evolve(QUICK, mutable="mdmf")) as workspace:
            await workspace.load(workspace.root)
            client.pause()
            tree = Tree(client, workspace, vfs := VFS(workspace, options=MountOptions()), Linking(vfs))
            await tree.put("file")
            await tree.clone("file", "copy")
            await tree.clone("file", "converted", "sdmf")
            await tree.clone("file", "immutable", "none")
            await tree.vfs.symlink(ROOT, b"link", b"else/where" * 9, ME)
        client.resume()
        async with open_workspace(client, root, state_dir=tmp_path, options=QUICK) as workspace:
            tree = Tree(client, workspace, vfs := VFS(workspace, options=MountOptions()), Linking(vfs))
            await workspace.wait()
            caps = {name: cap_of(target) for name, target in (await tree.names()).items()}
            assert {name: cap.kind for name, cap in caps.items()} == {
                "file": "mdmf",
                "copy": "mdmf",
                "converted": "sdmf",
                "immutable": "chk",
                "link": "chk",
            }
            await client.create_node_from_uri(caps["file"]).replace(b"changed")
            for name in ("copy", "converted", "immutable"):
                assert await client.fetch(caps[name]) == DATA


async def test_links_are_of_the_same_thing(tree: Tree) -> None:
    await tree.put("dir/file", b"x")
    await tree.workspace.wait()
    await tree.link(await tree.linking.find(["dir"]), "other")
    await tree.put("dir/later", b"y")
    assert set(await tree.names("other")) == {"file", "later"}
    found = await tree.linking.find_below(tree.workspace.root.cap, ["dir", "file"])  # type: ignore[arg-type]
    await tree.link(found, "there")
    assert await tree.read("there") == b"x"


async def test_immutable_directories_become_writable_ones(tree: Tree) -> None:
    packed = await tree.client.create_dirnode({"deep": (LiteralCap(b"deep"), {})})
    children = {"a": (LiteralCap(b"a"), {}), "ro": (packed.cap.readonly, {})}
    readonly = (await tree.client.create_dirnode(children)).cap.readonly
    await tree.linking.clone(Found(readonly, {}, None), ["dst"])
    await tree.put("dst/ro/own", b"z")
    await tree.workspace.wait()
    assert set(await tree.names("dst/ro")) == {"deep", "own"}


async def test_special_files_stay_special(tree: Tree) -> None:
    await tree.vfs.symlink(ROOT, b"link", b"else/where", ME)
    await tree.put("dir/x")
    await tree.clone("link", "dir")
    await tree.clone("dir", "copy")
    found = await tree.vfs.lookup(ROOT, b"copy")
    found = await tree.vfs.lookup(found.number, b"link")
    assert tree.vfs.inode(found.number).kind is Kind.SYMLINK
    assert await tree.vfs.readlink(found.number) == b"else/where"


async def test_what_is_open_is_cloned_as_it_is_now(tree: Tree) -> None:
    handle, _, _ = await tree.vfs.create(ROOT, b"open", 0o644, 2, ME)
    await tree.vfs.write(handle, 0, b"so far")
    await tree.clone("open", "copy")
    await tree.vfs.write(handle, 6, b", and more")
    await tree.vfs.flush(handle)
    await tree.vfs.release(handle)
    assert await tree.read("copy") == b"so far" and await tree.read("open") == b"so far, and more"


async def test_the_kernel_is_told_of_new_names(tree: Tree) -> None:
    await tree.put("dir/x")
    directory = await tree.vfs.lookup(ROOT, b"dir")
    assert (await tree.vfs.lookup(directory.number, b"new")).number == 0
    await tree.clone("dir/x", "dir/new")
    waiting = tree.vfs.invalidations.statistics().current_buffer_used
    told = [tree.vfs.invalidations.receive_nowait() for _ in range(waiting)]
    assert (directory.number, b"new") in {(each.number, each.name) for each in told}
    assert (await tree.vfs.lookup(directory.number, b"new")).number != 0


@pytest.mark.parametrize(
    ("src", "dst", "number"),
    [
        ("dir", "file", errno.EEXIST),
        ("file", "file", errno.EEXIST),
        ("dir", "dir/below", errno.EINVAL),
        ("dir", "dir", errno.EINVAL),
        ("file", "x" * 256, errno.ENAMETOOLONG),
        ("file", "..", errno.EINVAL),
    ],
)
async def test_what_a_file_system_refuses(tree: Tree, src: str, dst: str, number: int) -> None:
    await tree.put("file")
    await tree.put("dir/sub/x")
    with pytest.raises(FSError) as caught:
        await tree.clone(src, dst)
    assert errno.errorcode[caught.value.errno] == errno.errorcode[number]
    assert set(await tree.names()) == {"file", "dir"}


async def test_names_that_are_not_there(tree: Tree) -> None:
    await tree.put("file")
    for src, dst, error in (
        ("missing", "x", NoSuchChildError),
        ("file", "missing/x", NoSuchChildError),
        ("file", "file/x", WrongKindError),
        ("file/x", "y", WrongKindError),
    ):
        with pytest.raises(error):
            await tree.clone(src, dst)
    with pytest.raises(FSError):
        await tree.linking.link(Found(LiteralCap(b"x"), {}, None), [])  # into the root, but under which name?


async def test_a_directory_that_contains_itself(tree: Tree) -> None:
    await tree.put("loop/x")
    await tree.workspace.wait()
    found = await tree.linking.find(["loop"])
    await tree.link(found, "loop/again")
    with pytest.raises(FSError) as caught:
        await tree.clone("loop", "copy")
    assert caught.value.errno == errno.ELOOP and set(await tree.names()) == {"loop"}


async def test_what_may_change_without_our_knowing_is_not_cloned(tree: Tree) -> None:
    unknown = UnknownCap("x-future:rw", "ro.x-future:ro", None)
    await tree.put("dir/x")
    await tree.workspace.link(tree.workspace.directory((await tree.linking.find(["dir"])).target), "odd", unknown, {})
    with pytest.raises(WrongKindError, match="odd is of an unknown kind"):
        await tree.clone("dir", "copy")
    assert set(await tree.names()) == {"dir"}
    await tree.link(await tree.linking.find(["dir", "odd"]), "odd")  # a link is just that


async def test_a_clone_that_fails_leaves_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await tree.client.nodemaker.create_mutable_file(b"unreadable")
    for number in range(5):
        await tree.put(f"dir/{number}")
    directory = tree.workspace.directory((await tree.linking.find(["dir"])).target)
    await tree.workspace.link(directory, "mutable", node.cap, {})
    await tree.workspace.wait()
    for server in tree.client.servers:
        server.fail_on.add("slot_readv")
    with pytest.raises(GridError):
        await tree.clone("dir", "copy")
    assert set(await tree.names()) == {"dir"}
    tree.client.mend()
    await tree.workspace.wait()
    assert set(await tree.client.listing(tree.workspace.root.cap)) == {"dir"}
    monkeypatch.setattr(linking_module, "CLONE_NAMES_MAX", 3)
    with pytest.raises(FSError) as caught:
        await tree.clone("dir", "copy")
    assert caught.value.errno == errno.E2BIG


async def test_files_replaced_while_a_tree_is_cloned(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was on its way when it was looked through may be dropped before it is linked: what took its place counts."""
    tree.client.pause()
    await tree.put("dir/a")
    await tree.put("dir/b")
    survey = tree.linking._survey

    async def survey_and_change(*arguments: Any) -> Any:
        found = await survey(*arguments)
        await tree.put("dir/a", DATA * 2)
        await tree.workspace.unlink(tree.workspace.directory((await tree.linking.find(["dir"])).target), "b")
        return found

    monkeypatch.setattr(tree.linking, "_survey", survey_and_change)
    await tree.clone("dir", "copy")
    tree.client.resume()
    assert await tree.read("copy/a") == DATA * 2 and set(await tree.names("copy")) == {"a"}


async def test_clones_of_files_on_their_way_survive_the_daemon(tmp_path: Path) -> None:
    async with memory_client() as (client, root):
        async with open_workspace(client, root, state_dir=tmp_path, options=QUICK) as workspace:
            await workspace.load(workspace.root)
            client.pause()
            tree = Tree(client, workspace, vfs := VFS(workspace, options=MountOptions()), Linking(vfs))
            await tree.put("src/file")
            await tree.put("src/below/short", b"short")
            await tree.clone("src", "dst")
            await tree.workspace.unlink(tree.workspace.root, "src")
        client.resume()
        async with open_workspace(client, root, state_dir=tmp_path, options=QUICK) as workspace:
            tree = Tree(client, workspace, vfs := VFS(workspace, options=MountOptions()), Linking(vfs))
            assert await tree.read("dst/file") == DATA and await tree.read("dst/below/short") == b"short"
            await workspace.wait()
            assert set(await tree.names()) == {"dst"} and client.uploads <= 2


async def test_read_only_places(tmp_path: Path) -> None:
    async with mounted(tmp_path, evolve(QUICK, read_only=True)) as (_, workspace):
        requests = LinkRequests(VFS(workspace, options=MountOptions(read_only=True)))
        source = {"label": "x:", "cap": str(LiteralCap(b"hello")), "path": []}
        with pytest.raises(LinkingError, match=r"mnt/new: Read-only file system") as caught:
            await requests.link(source, {"label": "mnt/new", "path": ["new"]})
        assert caught.value.exit_code == 4


async def test_requests_name_the_place_that_is_wrong(tree: Tree) -> None:
    requests = LinkRequests(tree.vfs)
    to = {"label": "mnt/new", "path": ["new"]}
    verify = (await tree.client.create_dirnode({})).cap.verifier
    for source, text, code in (
        ({"label": "home:x", "cap": "URI:CHK:secret", "path": []}, "home:x: the cap is garbled", 4),
        ({"label": "home:v", "cap": str(verify), "path": []}, "home:v: a verify cap", 4),
        ({"label": "mnt/old", "path": ["old"]}, "mnt/old: no child named 'old'", 1),
        ({"label": "home:lit/x", "cap": str(LiteralCap(b"x")), "path": ["x"]}, "home:lit/x: a part of the path", 4),
    ):
        with pytest.raises(LinkingError, match=text) as caught:
            await requests.clone(source, to)
        assert caught.value.exit_code == code and "secret" not in str(caught.value)
    source = {"label": "home:l", "cap": str(LiteralCap(b"l")), "path": []}
    with pytest.raises(LinkingError, match="mnt/new: no such kind of file"):
        await requests.clone(source, to, mutable="odd")
    entry = {"label": "home:x", "cap": str(LiteralCap(b"x")), "path": [], "metadata": {"foreign": 1}, "name": "x"}
    await requests.link(entry, {"label": "mnt", "path": []})
    found = await tree.linking.find(["x"])
    assert found.metadata["foreign"] == 1 and found.target == LiteralCap(b"x")
