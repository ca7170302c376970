"""A Workspace in memory: the twin the VFS is tested on, and what the cost of FUSE alone is measured with.

Keeps the promises of `cache.Workspace` as far as the VFS can see them, at once and without a grid. `faults` makes the
next call of a method raise (or wait); `foreign_*` change things as another client would.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import trio
from attrs import define, field, frozen

from grid.errors import GridError, NoSuchChildError
from grid.formats.caps import Cap, DirectoryCap, LiteralCap

PAGE_BYTES = 1 << 16
Fault = Exception | Callable[[], Awaitable[None]]


@frozen
class MemoryEntry:
    name: str
    target: Any
    metadata: dict[str, Any]


@define(eq=False)
class MemoryDirectory:
    cap: Cap | None = None
    readonly: bool = False
    immutable: bool = False
    generation: int = 0
    loaded_at: float | None = None
    names: dict[str, MemoryEntry] = field(factory=dict)

    def get(self, name: str) -> MemoryEntry | None:
        return self.names.get(name)

    def entries(self) -> Mapping[str, MemoryEntry]:
        return MappingProxyType(dict(self.names))

    def put(self, name: str, target: Any, metadata: dict[str, Any] | None = None) -> None:
        self.names[name] = MemoryEntry(name, target, dict(metadata or {}))
        self.generation += 1

    def drop(self, name: str) -> None:
        del self.names[name]
        self.generation += 1


@define(eq=False)
class Pages:
    """Sparse bytes: immutable pages, so that copies share them."""

    size: int = 0
    pages: dict[int, bytes] = field(factory=dict)

    def read(self, offset: int, length: int) -> bytes:
        stop = min(offset + length, self.size)
        parts = []
        while offset < stop:
            number, start = divmod(offset, PAGE_BYTES)
            end = min(PAGE_BYTES, start + stop - offset)
            parts.append(self.pages.get(number, b"")[start:end].ljust(end - start, b"\0"))
            offset += end - start
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        self.size = max(self.size, offset + len(data))
        while view:
            number, start = divmod(offset, PAGE_BYTES)
            piece = view[: PAGE_BYTES - start]
            if len(piece) == PAGE_BYTES:
                self.pages[number] = bytes(piece)
            else:
                page = bytearray(self.pages.get(number, b"").ljust(PAGE_BYTES, b"\0"))
                page[start : start + len(piece)] = piece
                self.pages[number] = bytes(page)
            offset += len(piece)
            view = view[len(piece) :]

    def truncate(self, size: int) -> None:
        if size < self.size:
            last, start = divmod(size, PAGE_BYTES)
            self.pages = {number: page for number, page in self.pages.items() if number <= last}
            if last in self.pages:
                self.pages[last] = self.pages[last][:start].ljust(PAGE_BYTES, b"\0")
        self.size = size

    def copy(self) -> Pages:
        return Pages(self.size, dict(self.pages))


@define(eq=False)
class MemoryFile:
    """Stored contents: what a PendingFile is to the real workspace."""

    contents: Pages | None
    size: int
    state: str = "pending"
    cap: Cap | None = None
    mutable: str = "none"


@define(eq=False)
class MemoryContents:
    pages: Pages
    dirty: bool = False
    closed: bool = False

    @property
    def size(self) -> int:
        return self.pages.size

    async def read(self, offset: int, length: int, /) -> bytes:
        self.check()
        return self.pages.read(offset, length)

    async def write(self, offset: int, data: bytes, /) -> None:
        self.check()
        self.pages.write(offset, data)
        self.dirty = True

    async def truncate(self, size: int, /) -> None:
        self.check()
        self.pages.truncate(size)
        self.dirty = True

    def check(self) -> None:
        if self.closed:
            raise ValueError("these contents are sealed or closed")

    def close(self) -> None:
        self.closed = True


class MemoryWorkspace:
    def __init__(self, root: MemoryDirectory | None = None, *, readonly: bool = False) -> None:
        self.root = root or MemoryDirectory()
        self.readonly = readonly
        self.files: dict[Cap, Pages] = {}  # what is behind caps that stand in directories
        self.directories: dict[Cap, MemoryDirectory] = {}
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, Fault] = {}
        self.errors: list[str] = []
        self._positions = itertools.count(1)

    async def _called(self, method: str) -> int:
        self.calls[method] += 1
        fault = self.faults.pop(method, None)
        if isinstance(fault, Exception):
            raise fault
        if fault is not None:
            await fault()
        return next(self._positions)

    def directory(self, target: Any, /) -> MemoryDirectory:
        return self.directories[target] if isinstance(target, DirectoryCap) else target

    async def load(self, directory: MemoryDirectory, max_age_s: float | None, /) -> None:
        await self._called("load")
        if directory.loaded_at is None or max_age_s is not None:
            directory.loaded_at = trio.current_time()

    async def make_directory(self, parent: MemoryDirectory, name: str, metadata: dict[str, Any], /) -> MemoryDirectory:
        await self._called("make_directory")
        made = MemoryDirectory()
        parent.put(name, made, metadata)
        return made

    async def link(self, directory: MemoryDirectory, name: str, target: Any, metadata: dict[str, Any], /) -> int:
        position = await self._called("link")
        directory.put(name, target, metadata)
        return position

    async def unlink(self, directory: MemoryDirectory, name: str, /) -> int:
        position = await self._called("unlink")
        self._discard(directory.names[name].target)
        directory.drop(name)
        return position

    async def rename(
        self,
        src: MemoryDirectory,
        src_name: str,
        dst: MemoryDirectory,
        dst_name: str,
        metadata: dict[str, Any],
        /,
    ) -> int:
        position = await self._called("rename")
        if dst_name in dst.names:
            self._discard(dst.names[dst_name].target)
        dst.put(dst_name, src.names[src_name].target, metadata)
        src.drop(src_name)
        return position

    async def exchange(self, a: MemoryDirectory, a_name: str, b: MemoryDirectory, b_name: str, /) -> int:
        position = await self._called("exchange")
        one, other = a.names[a_name], b.names[b_name]
        a.put(a_name, other.target, other.metadata)
        b.put(b_name, one.target, one.metadata)
        return position

    async def set_metadata(self, directory: MemoryDirectory, name: str, metadata: dict[str, Any], /) -> int:
        assert "tahoe" not in metadata, "the user part only"
        position = await self._called("set_metadata")
        entry = directory.names[name]
        kept = {"tahoe": entry.metadata["tahoe"]} if "tahoe" in entry.metadata else {}
        directory.put(name, entry.target, {**metadata, **kept})
        return position

    async def new_contents(self, base: Any = None, /, *, keep: int | None = None) -> MemoryContents:
        await self._called("new_contents")
        pages = Pages() if base is None else self._pages(base).copy()
        if keep is not None and keep < pages.size:
            pages.truncate(keep)
        return MemoryContents(pages)

    async def open_contents(self, target: Any, /) -> MemoryContents:
        await self._called("open_contents")
        return MemoryContents(self._pages(target))

    def is_prefetchable(self, target: Any, /) -> bool:
        return False  # it is all here

    def prefetch(self, targets: Iterable[Any], /) -> None:
        assert not list(targets)

    async def store(
        self,
        directory: MemoryDirectory,
        name: str,
        contents: MemoryContents,
        metadata: dict[str, Any],
        /,
        *,
        over: Any,
        mutable: str | None = None,
    ) -> tuple[int, Any, str]:
        position = await self._called("store")
        contents.close()
        if name in directory.names and directory.names[name].target not in (over, getattr(over, "cap", None)):
            name += " (conflict)"
        if name in directory.names:
            self._discard(directory.names[name].target)
        stored = MemoryFile(contents.pages, contents.size)
        directory.put(name, stored, metadata)
        return position, stored, name

    async def replace(self, cap: Cap, contents: MemoryContents, /, *, name: str) -> int:
        position = await self._called("replace")
        contents.close()
        self.files[cap] = contents.pages
        return position

    async def size_of(self, target: Any, /) -> int:
        await self._called("size_of")
        return self._pages(target).size

    async def persist(self, *, flush: bool = False) -> None:
        await self._called("persist")

    async def wait(self, position: int | None = None, /, *, timeout_s: float | None = None) -> None:
        await self._called("wait")

    def note_error(self, path: str, error: Exception, /) -> None:
        self.errors.append(path)

    @staticmethod
    def _discard(target: Any) -> None:
        """What no name refers to and is on its way is never sent: its bytes are gone for who comes later."""
        if isinstance(target, MemoryFile) and target.cap is None:
            target.contents = None

    def _pages(self, target: Any) -> Pages:
        if isinstance(target, MemoryFile):
            if target.contents is None:
                raise NoSuchChildError("discarded")
            return target.contents
        if isinstance(target, LiteralCap):
            return pages_of(target.data)
        if target not in self.files:
            raise GridError("no shares of this file were found")
        return self.files[target]


def pages_of(data: bytes) -> Pages:
    pages = Pages()
    pages.write(0, data)
    return pages


async def hang() -> None:
    """A fault: never answer."""
    await trio.sleep_forever()
