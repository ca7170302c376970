"""A directory: named children, kept in a mutable or an immutable file.

    read()    {name: entry} of the newest version; an unchanged one is neither downloaded nor parsed again
    modify()  changes to several names as one publish, applied again to what is there if another writer was faster

Entries nobody touched are written back byte for byte, whatever is in them. The methods with the older names
(list, get, set_uri, …) are these two with something around them.

Source: Tahoe-LAFS 1.20's directories.
"""

from __future__ import annotations

import builtins
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, Self

from attrs import evolve, frozen

from grid.errors import NoSuchChildError, NotWriteableError, WrongKindError
from grid.formats.caps import Cap, DirectoryCap, parse_known_cap
from grid.formats.directory import (
    DirEntry,
    normalize_name,
    pack_directory,
    unpack_directory,
    update_metadata,
)
from grid.interfaces import IFileNode, IUploadable
from grid.nodes.mutable import MutableFileNode
from grid.nodes.traversal import walk
from grid.operations.check_results import CheckResults
from grid.operations.retrieve import MutableVersion
from grid.operations.worker import run_cpu_work

if TYPE_CHECKING:
    from grid.nodes.nodemaker import NodeMaker

log = logging.getLogger(__name__)

PARSE_COST: Final = 8  # a byte of directory takes about as long to parse as so many bytes to hash
SEAL_COST: Final = 8000  # so does a new entry

Change = Callable[[DirEntry | None], DirEntry | None]


@frozen
class DirectoryContents:
    """One version of a directory. `version` is seqnum and root hash; empty for an immutable one."""

    version: bytes
    entries: Mapping[str, DirEntry]  # treat as constant: it is shared
    size: int = 0  # bytes of its table


class DirectoryNode:
    """IDirectoryNode over the node of its backing file. One node per directory and cap: see `nodemaker`."""

    def __init__(
        self, nodemaker: NodeMaker, cap: DirectoryCap, file: Any, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._nodemaker = nodemaker
        self._cap = cap
        self._file = file  # MutableFileNode, or an immutable or literal file's node
        self._clock = clock  # for link times
        self._contents: DirectoryContents | None = None  # latest version read or written

    def __repr__(self) -> str:
        return f"<DirectoryNode {self._cap.kind}>"

    @property
    def cap(self) -> DirectoryCap:
        return self._cap

    @property
    def file(self) -> Any:
        """The node of the backing file."""
        return self._file

    def get_uri(self) -> str:
        return self._cap.to_string()

    def get_readonly_uri(self) -> str:
        return self._cap.readonly.to_string()

    def get_verifier(self) -> DirectoryCap | None:
        return self._cap.verifier

    def get_storage_index(self) -> bytes | None:
        return self._cap.storage_index

    def is_readonly(self) -> bool:
        return self._cap.is_readonly

    def is_mutable(self) -> bool:
        return self._cap.is_mutable

    # --- the two that all others use

    async def read(self) -> DirectoryContents:
        """The newest recoverable version. Raises NotEnoughSharesError, FormatError."""
        if isinstance(self._file, MutableFileNode):
            return await self._file.use_best_version(self._contents_of)
        if self._contents is None:
            data = await self._file.download_to_data()
            entries = await run_cpu_work(
                lambda: unpack_directory(data, mutable=False, writekey=None), len(data) * PARSE_COST
            )
            self._contents = DirectoryContents(b"", entries, len(data))
        return self._contents

    def forget(self) -> None:
        """Let go of the listing: who walks a whole tree must not hold all of it."""
        self._contents = None

    async def modify(self, changes: Mapping[str, Change]) -> DirectoryContents:
        """Publish all `changes` at once; returns what the directory then holds.

        Each change gets the entry of its name as it is in the newest version (None if there is none) and returns
        the new one (None to remove it, the same object to leave it alone). It is called again when another
        writer was faster, so it must not keep count; it may raise to give the whole thing up. `tahoe` link times
        are kept here, whatever a new entry's metadata says of them.

        Raises UncoordinatedWriteError after many tries, NotWriteableError, NotEnoughServersError, BadCapError
        (a child that must not be stored), and what read() raises.
        """
        writekey = self._writekey()
        wanted = {normalize_name(name): change for name, change in changes.items()}
        made: dict[str, DirEntry] = {}

        async def make(version: MutableVersion, must: bool) -> bytes | None:
            nonlocal made
            old = (await self._contents_of(version)).entries
            changed = self._apply(old, wanted)
            if not must and not changed:
                made = dict(old)
                return None
            made = {name: entry for name, entry in {**old, **changed}.items() if entry is not None}
            size = sum(len(entry.raw or b"") for entry in made.values()) + len(changed) * SEAL_COST
            return await run_cpu_work(lambda: _pack_sealed(made, changed, writekey), size)

        version = await self._file.update(make)
        self._contents = DirectoryContents(version.version, made, version.size)
        return self._contents

    def _writekey(self) -> bytes:
        if not isinstance(self._file, MutableFileNode):
            raise NotWriteableError("an immutable directory cannot be changed")
        self._file.check_writeable()
        writekey = self._file.get_writekey()
        assert writekey is not None
        return writekey

    async def _contents_of(self, version: MutableVersion) -> DirectoryContents:
        known = self._contents
        if known is not None and known.version == version.version:
            return known
        data = await version.read_all()
        writekey = self._file.get_writekey()
        entries = await run_cpu_work(
            lambda: unpack_directory(data, mutable=True, writekey=writekey), len(data) * PARSE_COST
        )
        self._contents = DirectoryContents(version.version, entries, len(data))
        return self._contents

    def _apply(self, old: Mapping[str, DirEntry], changes: Mapping[str, Change]) -> dict[str, DirEntry | None]:
        """What becomes of the names that do not stay as they are: the new entry, or None to remove it."""
        now = self._clock()
        changed: dict[str, DirEntry | None] = {}
        for name, change in changes.items():
            before = old.get(name)
            after = change(before)
            if after is not before:
                changed[name] = after and _timed(name, after, before, now)
        return changed

    # --- looking

    async def list(self) -> dict[str, tuple[Any, dict[str, Any]]]:
        contents = await self.read()
        return {
            name: (self._nodemaker.create_from_cap(entry.cap), entry.metadata)
            for name, entry in contents.entries.items()
        }

    async def has_child(self, name: str) -> bool:
        return normalize_name(name) in (await self.read()).entries

    async def _entry(self, name: str) -> DirEntry:
        entry = (await self.read()).entries.get(normalize_name(name))
        if entry is None:
            raise NoSuchChildError(name)
        return entry

    async def get(self, name: str) -> Any:
        """The child's node. Raises NoSuchChildError."""
        return self._nodemaker.create_from_cap((await self._entry(name)).cap)

    async def get_metadata_for(self, name: str) -> dict[str, Any]:
        return (await self._entry(name)).metadata

    async def get_child_at_path(self, path: str | Sequence[str]) -> Any:
        """Walk down; the empty path is this directory. Raises NoSuchChildError, WrongKindError."""
        steps = path.split("/") if isinstance(path, str) else path
        node: Any = self
        for step in steps:
            if not step:
                continue
            if not isinstance(node, DirectoryNode):
                raise WrongKindError("the path goes through something that is no directory")
            node = await node.get(step)
        return node

    async def build_manifest(self) -> frozenset[str]:
        """Verify caps of all that can be reached from here, this directory's too, as texts. What cannot be read is in
        it, what is below that is not. For large trees use `traversal.walk`.
        """
        async with aclosing(walk(self._nodemaker, self._cap)) as visits:
            return frozenset([str(visit.cap.verifier) async for visit in visits if visit.cap.verifier is not None])

    async def check(self) -> CheckResults:
        """As IChecker.check."""
        results: CheckResults = await self._file.check()
        return results

    async def repair(self, damaged: Collection[tuple[str, int]] = ()) -> int:
        """Make the newest version's missing shares again. If writers raced, none of what they added is lost: children
        of the other newest versions are kept, under another name where two want the same one.

        Returns how many versions were merged. `damaged`, and what it raises: see MutableFileNode.repair.
        """
        writekey = self._writekey()

        def merge(tables: Sequence[bytes]) -> bytes:
            heads = [unpack_directory(table, mutable=True, writekey=writekey) for table in tables]
            return pack_directory(merge_entries(heads).values(), writekey=writekey)

        merged: int = await self._file.repair(merge, damaged)
        self.forget()
        return merged

    # --- changing

    async def set_metadata_for(self, name: str, metadata: dict[str, Any]) -> Self:
        def change(old: DirEntry | None) -> DirEntry:
            if old is None:
                raise NoSuchChildError(name)
            return old.changed(metadata=metadata)

        await self.modify({name: change})
        return self

    async def set_uri(self, name: str, child_uri: str, metadata: dict[str, Any] | None = None) -> None:
        """Add or replace. Raises BadCapError for a text that is no known cap."""
        await self.set_uris([(name, child_uri, metadata)])

    async def set_uris(self, entries: Iterable[tuple[str, str, dict[str, Any] | None]]) -> None:
        await self.set_caps([(name, parse_known_cap(uri), metadata) for name, uri, metadata in entries])

    async def set_node(self, name: str, child: Any, metadata: dict[str, Any] | None = None) -> Any:
        await self.set_nodes([(name, child, metadata)])
        return child

    async def set_nodes(self, entries: Iterable[tuple[str, Any, dict[str, Any] | None]]) -> None:
        await self.set_caps([(name, child.cap, metadata) for name, child, metadata in entries])

    async def set_caps(self, entries: Iterable[tuple[str, Cap, dict[str, Any] | None]]) -> None:
        """Add or replace children in one publish. Metadata None keeps what the name had."""
        await self.modify({name: _link(name, cap, metadata) for name, cap, metadata in entries})

    async def add_file(self, name: str, uploadable: IUploadable, metadata: dict[str, Any] | None = None) -> IFileNode:
        """Upload, then link."""
        self._writekey()
        results = await self._nodemaker.uploader.upload(uploadable)
        node: IFileNode = self._nodemaker.create_from_cap(parse_known_cap(results.uri))
        await self.set_node(name, node, metadata)
        return node

    async def delete(self, name: str) -> None:
        """Raises NoSuchChildError."""

        def change(old: DirEntry | None) -> None:
            if old is None:
                raise NoSuchChildError(name)

        await self.modify({name: change})

    async def create_empty_directory(self, name: str) -> DirectoryNode:
        self._writekey()
        child = await self._nodemaker.create_dirnode({})
        await self.set_node(name, child)
        return child

    async def move_child_to(self, current_child_name: str, new_parent: Any, new_child_name: str | None = None) -> None:
        """Link the child there, then unlink it here; within one directory both at once. Replaces what is there.

        Its metadata goes along, its link times start anew. Raises NoSuchChildError.
        """
        new_name = current_child_name if new_child_name is None else new_child_name
        here = new_parent.get_storage_index() == self.get_storage_index()
        if here and normalize_name(new_name) == normalize_name(current_child_name):
            return
        self._writekey()
        if here:
            await self._rename(current_child_name, new_name)
            return
        moved = await self._entry(current_child_name)
        await new_parent.modify({new_name: _link(new_name, moved.cap, moved.metadata)})
        # another writer may have put something else here meanwhile: that stays
        await self.modify({current_child_name: lambda old: old if old is None or old.cap != moved.cap else None})

    async def _rename(self, old_name: str, new_name: str) -> None:
        moved: builtins.list[DirEntry] = []

        def take(old: DirEntry | None) -> None:
            if old is None:
                raise NoSuchChildError(old_name)
            moved[:] = [old]

        def put(old: DirEntry | None) -> DirEntry:
            return DirEntry(new_name, moved[0].cap, moved[0].metadata)

        await self.modify({old_name: take, new_name: put})  # applied in this order


def merge_entries(heads: Sequence[Mapping[str, DirEntry]]) -> dict[str, DirEntry]:
    """The first of these, and what only others have; where two differ in a name, both, the later under a name made
    from its version's place in the row.
    """
    merged = dict(heads[0])
    for number, other in enumerate(heads[1:], start=2):
        for name, entry in other.items():
            if name not in merged:
                merged[name] = entry
            elif merged[name].cap != entry.cap:
                stem, dot, suffix = name.rpartition(".") if "." in name.lstrip(".") else (name, "", "")
                new_name = f"{stem} (version {number}){dot}{suffix}"
                merged[new_name] = entry.changed(name=new_name)
    return merged


def _link(name: str, cap: Cap, metadata: dict[str, Any] | None) -> Change:
    def change(old: DirEntry | None) -> DirEntry:
        kept = old.metadata if old is not None and metadata is None else metadata
        return DirEntry(name, cap, kept or {})

    return change


def _timed(name: str, entry: DirEntry, before: DirEntry | None, now: float) -> DirEntry:
    """The entry as it will be read back."""
    cap = entry.cap.readonly if entry.metadata.get("no-write") else entry.cap
    return DirEntry(name, cap, update_metadata(before.metadata if before is not None else None, entry.metadata, now))


def _pack_sealed(entries: dict[str, DirEntry], changed: Iterable[str], writekey: bytes) -> bytes:
    """The directory's plaintext. What is `changed` gets its own bytes, as if it had been read from there."""
    for name in changed:
        if (entry := entries.get(name)) is not None:
            entries[name] = evolve(entry, raw=pack_directory([entry], writekey=writekey), writekey=writekey)
    return pack_directory(entries.values(), writekey=writekey)
