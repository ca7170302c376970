"""An immutable snapshot of a tree: one DIR2-CHK cap, for which only directories are uploaded.

    immutable files and directories   as they are, by their caps
    directories                       anew, as immutable ones, what is below first
    mutable files                     their contents now, uploaded: the one thing that moves bytes of files

Names and metadata are kept. What cannot be in an immutable directory is left out and said: caps of unknown kinds that
do not promise to be immutable, verify caps of mutable things, a directory inside itself. A tree that changes meanwhile
is frozen directory by directory. Memory: the directories on the way down, a cap for each that was frozen, a few
segments of a mutable file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from attrs import define, field

from grid.errors import WrongKindError
from grid.formats.caps import IMM, Cap, UnknownCap
from grid.nodes.mutable import MutableFileNode
from grid.nodes.nodemaker import NodeMaker
from grid.nodes.traversal import Path, visit_key
from grid.operations.retrieve import MutableVersion
from grid.operations.version_uploadable import VersionUploadable

DEPTH_MAX: Final = 200  # directories inside each other


@define
class FreezeResults:
    """What a snapshot took. Bytes are those of tables and contents, not of their shares."""

    directories: int = 0  # made anew
    directory_bytes: int = 0
    kept: int = 0  # children that were immutable already
    copied: list[Path] = field(factory=list)  # mutable files
    copied_bytes: int = 0
    left_out: list[tuple[Path, str]] = field(factory=list)  # and why


@define(eq=False)
class Freezer:
    """Freezes one tree; `note` is told of every directory that is done."""

    _nodemaker: NodeMaker
    _convergence: bytes | None = field(repr=False)
    _note: Callable[[FreezeResults], None] = lambda results: None
    results: FreezeResults = field(factory=FreezeResults)
    _done: dict[bytes, Cap] = field(factory=dict)  # {visit key: what it became}
    _entered: set[bytes] = field(factory=set)  # directories on the way from the root to here

    async def freeze(self, root: Cap) -> Cap:
        """The snapshot's cap: a DIR2-CHK, or DIR2-LIT if it is small. An immutable directory is its own snapshot.

        Raises WrongKindError for what is no directory, and what reading and uploading raise: a directory that cannot be
        read ends it.
        """
        if not root.is_directory or root.is_verifier:
            raise WrongKindError("only a directory that can be read can be frozen")
        return await self._directory(root, ())

    async def _directory(self, cap: Cap, path: Path) -> Cap:
        if not cap.is_mutable:
            self.results.kept += 1
            return cap
        key = visit_key(cap)
        assert key is not None, "mutable directories have verify caps"
        if key in self._done:
            return self._done[key]
        if len(path) > DEPTH_MAX:
            raise WrongKindError(f"more than {DEPTH_MAX} directories inside each other")
        self._entered.add(key)
        node = self._nodemaker.create_from_cap(cap, keep=False)
        entries = dict((await node.read()).entries)
        node.forget()
        del node
        children: dict[str, tuple[Cap, dict[str, Any]]] = {}
        for name in sorted(entries):
            entry = entries.pop(name)
            frozen = await self._child(entry.cap, (*path, name))
            if frozen is not None:
                children[name] = (frozen, entry.metadata)
        made = await self._nodemaker.create_immutable_dirnode(children)
        self._entered.discard(key)
        self._done[key] = made.cap
        self.results.directories += 1
        self.results.directory_bytes += made.cap.size or 0
        self._note(self.results)
        return made.cap

    async def _child(self, cap: Cap, path: Path) -> Cap | None:
        """What stands for it in the snapshot; None to leave it out."""
        if isinstance(cap, UnknownCap):
            if cap.rw is None and (cap.ro or "").startswith(IMM):
                self.results.kept += 1
                return cap
            self._leave_out(path, "of an unknown kind")
            return None
        if cap.is_verifier and cap.kind not in ("chk", "dir-chk"):
            self._leave_out(path, "a verify cap")
            return None
        if cap.is_directory and not cap.is_verifier:
            if cap.is_mutable and visit_key(cap) in self._entered:
                self._leave_out(path, "a directory inside itself")
                return None
            return await self._directory(cap, path)
        if not cap.is_mutable:
            self.results.kept += 1
            return cap
        return await self._copy(cap, path)

    async def _copy(self, cap: Cap, path: Path) -> Cap:
        key = visit_key(cap)
        assert key is not None, "mutable files have verify caps"
        if key not in self._done:
            node: MutableFileNode = self._nodemaker.create_from_cap(cap)
            self._done[key], size = await node.use_best_version(self._upload)
            self.results.copied_bytes += size
        self.results.copied.append(path)
        return self._done[key]

    async def _upload(self, version: MutableVersion) -> tuple[Cap, int]:
        uploadable = VersionUploadable(version, self._convergence)
        return (await self._nodemaker.uploader.upload(uploadable)).cap, version.size

    def _leave_out(self, path: Path, why: str) -> None:
        self.results.left_out.append((path, why))
