"""A directory as this mount sees it: the last listing from the grid, with pending changes laid over.

Pure: no I/O, never awaits; so every method is atomic, and no lock guards this state. (`Directory.grid_lock` guards
the conversation with the grid; only `cache/tree.py` and `cache/committer.py` hold it, see there.)

    base       name -> DirEntry      what was last read, or published by us
    changes    name -> Change        one per name, the latest: add or replace, remove, or set metadata
    view       the two together      what `get` and `entries` show

A Change knows its *ancestors*: the caps (None for "no such name") that may stand under its name on the grid without
anybody else having touched it: what was there when it was made, and whatever of ours was sent for that name since. If
something else stands there, somebody else changed the name:

    add or replace   both stay: ours moves to "NAME (conflict DATE NICKNAME).EXT"
    remove, set      theirs stays, ours is dropped

It knows as well which keys of the metadata were changed here: the others are left as they are on the grid by then.

A Change may have to wait for others (`after`): a name that was moved away goes only once it is linked in its new place.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import trio
from attrs import define, field, frozen

from cache.cap_json import cap_to_json
from cache.pending import PendingFile
from cache.sealed import SealedFile
from grid.formats.caps import Cap, DirectoryCap
from grid.formats.directory import DirEntry, update_metadata

Target: TypeAlias = "Cap | PendingFile | Directory"


@frozen
class Entry:
    """One name in the view. `metadata` has Tahoe's own part (`tahoe`) too; treat it as constant."""

    name: str
    target: Target
    metadata: dict[str, Any]


class Kind(enum.Enum):
    LINK = "link"  # add the name, or replace what it refers to
    REMOVE = "remove"
    METADATA = "metadata"  # set the metadata of what is there, whatever its cap


@define(eq=False)
class Change:
    """What is to be done to one name. An effect in the journal, with a row there; compared by identity."""

    directory: Directory
    name: str
    kind: Kind
    position: int  # of the oldest operation it stands for
    when: float  # POSIX seconds
    ancestors: tuple[Cap | None, ...] = field(repr=False)
    target: Target | None = field(default=None, repr=False)  # of a LINK
    metadata: dict[str, Any] | None = None  # of a LINK or METADATA: the whole new metadata
    keys: frozenset[str] | None = frozenset()  # of it, those that we set or removed; None: not known, so all of them
    after: set[Change] = field(factory=set, repr=False)  # those that must be on the grid before this one is sent
    before: set[Change] = field(factory=set, repr=False)  # the reverse: those that have this one in `after`
    waiting: set[Change] = field(factory=set, repr=False)  # those found waiting for this one
    sent: bool = False  # it may be on the grid already
    done: bool = False  # settled, one way or the other
    id: int = 0  # in the journal

    def wait_for(self, others: Iterable[Change]) -> None:
        for other in others:
            self.after.add(other)
            other.before.add(self)

    def wait_for_nothing(self) -> None:
        for other in self.after:
            other.before.discard(self)
        self.after.clear()

    def hand_on(self, successor: Change | None) -> list[Change]:
        """Those that waited for this one wait for `successor` instead, or for nothing. Returns them."""
        waited = [change for change in self.before if not change.done]
        for change in waited:
            change.after.discard(self)
            if successor is not None and change is not successor:
                change.wait_for([successor])
        self.before.clear()
        return waited

    def move(self, directory: Directory, name: str, position: int) -> None:
        """From another journal into this one's directory."""
        self.directory.take_away(self)
        self.directory, self.name, self.position = directory, name, position
        directory.restore(self)

    # --- in the journal

    @property
    def parts(self) -> Iterable[SealedFile]:
        sealed = self.target.sealed if isinstance(self.target, PendingFile) else None
        return () if sealed is None else (sealed,)

    def row(self, number_of: Callable[[Any], int]) -> dict[str, Any] | None:
        """See `cache/replay.py` for the way back."""
        if self.done:
            return None
        target: dict[str, Any] | None = None
        if (cap := self.cap) is not None:
            target = {"cap": cap_to_json(cap)}
            if isinstance(self.target, Directory) and not self.target.linked:
                target["unlinked"] = True
        elif isinstance(self.target, Directory):
            target = {"new": number_of(self.target)}
        elif isinstance(self.target, PendingFile) and self.target.sealed is not None:
            file = self.target
            target = {"file": number_of(file.sealed), "name": file.name, "mutable": file.mutable}
        home = self.directory
        return {
            "is": "change",
            "in": {"new": number_of(home)} if home.cap is None else {"cap": cap_to_json(home.cap)},
            "path": home.path,
            "name": self.name,
            "kind": self.kind.value,
            "position": self.position,
            "when": self.when,
            "ancestors": [None if each is None else cap_to_json(each) for each in self.ancestors],
            "target": target,
            "metadata": self.metadata,
            "keys": None if self.keys is None else sorted(self.keys),
            "after": [number_of(each) for each in self.after if not each.done],
            "sent": self.sent,
        }

    @property
    def cap(self) -> Cap | None:
        """What a LINK's target is on the grid; None as long as it is not there."""
        return None if self.target is None else cap_of(self.target)

    @property
    def ready(self) -> bool:
        """Whether it could be sent as far as its own target goes."""
        return self.kind is not Kind.LINK or self.cap is not None

    def accepts(self, there: Cap | None) -> bool:
        """Whether what is on the grid under the name is what we knew, or what we want: nobody else's doing."""
        wanted = self.cap
        return any(same_thing(there, cap) for cap in self.ancestors) or (
            wanted is not None and same_thing(there, wanted)
        )

    def apply(self, old: DirEntry | None) -> tuple[DirEntry | None, bool]:
        """(what should stand under the name, whether this is our doing), given what stands there now."""
        there = None if old is None else old.cap
        if self.kind is Kind.REMOVE:
            return (None, True) if there is None or self.accepts(there) else (old, False)
        if self.kind is Kind.METADATA:
            if old is None or not self.accepts(there):
                return old, False
            return old.changed(metadata=self.metadata_over(old.metadata)), True
        wanted = self.cap
        assert wanted is not None, "only ready changes are sent"
        if old is not None and not self.accepts(there):
            return old, False
        return DirEntry(self.name, wanted, self.metadata_over(None if old is None else old.metadata)), True

    def metadata_over(self, old: Mapping[str, Any] | None) -> dict[str, Any]:
        """Of a LINK or METADATA: what the name has then, given what it has now (None: there is no such name)."""
        ours = self.metadata
        if old is not None and ours is not None and self.keys is not None:
            theirs = {key: value for key, value in old.items() if key not in self.keys}
            ours = theirs | {key: value for key, value in ours.items() if key in self.keys}
        return update_metadata(old, ours, self.when)


class Directory:
    """One directory of this mount; shared by all who look at it. New ones have no cap until they are published."""

    def __init__(self, cap: Cap | None, *, path: str | None = None) -> None:
        self.id = 0  # in the journal, while it is new
        self._cap = cap
        self.path = path  # where it was last seen in the mount, for messages only; anybody may set it
        self.immutable = cap is not None and not cap.is_mutable
        self.readonly = cap is not None and cap.is_readonly
        self.linked = cap is not None  # on the grid, as far as we know; new ones become so
        self.abandoned = False  # new, and unlinked before it was ever on the grid
        self.hold_s = 0.0  # how long the committer holds changes back while it is busy (0: the usual)
        self.generation = 0
        self.loaded_at: float | None = None if cap is not None else 0.0  # trio's clock
        self.version: bytes | None = None
        self.base: Mapping[str, DirEntry] = {}
        self.changes: dict[str, Change] = {}
        self.links: set[Change] = set()  # pending LINKs to this directory, while it is new
        self.unready: set[Change] = set()  # of `changes`: those whose target is on its way, and not failing
        self.failing: set[Change] = set()  # of `changes`: those whose target fails again and again
        self.grid_lock = trio.Lock()
        self._entries: dict[str, Entry] = {}  # made from base, lazily
        self._view: dict[str, Entry] | None = None  # the last snapshot, …
        self._stale: set[str] = set()  # … and the names that have changed since

    def __repr__(self) -> str:
        return f"<Directory {self.path!r}, {len(self.changes)} changes pending>"

    @property
    def cap(self) -> Cap | None:
        return self._cap

    @property
    def is_new(self) -> bool:
        return self._cap is None

    @property
    def loaded(self) -> bool:
        return self.loaded_at is not None

    # --- looking

    def get(self, name: str) -> Entry | None:
        """The name's entry, or None. O(1); no grid, no await."""
        if (change := self.changes.get(name)) is not None:
            return self._entry_of_change(change)
        return self._entry_of_base(name)

    def entries(self) -> Mapping[str, Entry]:
        """All of it, as it is now: a snapshot that stays as it is."""
        if self._view is None:
            view = {name: entry for name in self.base if (entry := self._entry_of_base(name)) is not None}
            self._stale = set(self.changes)
        elif self._stale:
            view = self._view.copy()  # those who have the old one keep it
        else:
            return MappingProxyType(self._view)
        for name in self._stale:
            entry = self.get(name)
            if entry is None:
                view.pop(name, None)
            else:
                view[name] = entry
        self._stale = set()
        self._view = view
        return MappingProxyType(view)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def is_empty(self) -> bool:
        return not self.entries()

    def _entry_of_base(self, name: str) -> Entry | None:
        if (entry := self._entries.get(name)) is None and (child := self.base.get(name)) is not None:
            entry = self._entries[name] = Entry(name, child.cap, child.metadata)
        return entry

    def _entry_of_change(self, change: Change) -> Entry | None:
        if change.kind is Kind.REMOVE:
            return None
        below = self._entry_of_base(change.name)
        if change.kind is Kind.LINK:
            assert change.target is not None
            old = None if below is None else below.metadata
            return Entry(change.name, change.target, change.metadata_over(old))
        if below is None:
            return None
        return Entry(change.name, below.target, change.metadata_over(below.metadata))

    # --- changing; each returns (the new change or None if nothing is left to do, the one it takes the place of)

    def put(
        self,
        name: str,
        target: Target,
        metadata: dict[str, Any],
        position: int,
        when: float,
        *,
        after: set[Change] | None = None,
    ) -> tuple[Change, Change | None]:
        change = self._successor(name, Kind.LINK, position, when)
        change.target = target
        self._note(change, metadata)
        change.wait_for(after or ())
        if all(ancestor is None for ancestor in change.ancestors):
            change.wait_for_nothing()  # nothing on the grid is lost by it
        return change, self._lay(change)

    def drop(
        self, name: str, position: int, when: float, *, after: set[Change] | None = None
    ) -> tuple[Change | None, Change | None]:
        change = self._successor(name, Kind.REMOVE, position, when)
        if all(ancestor is None for ancestor in change.ancestors):  # the grid never heard of it
            change.wait_for_nothing()
            old = self.changes.pop(name, None)
            self._touch(name)
            return None, old
        change.wait_for(after or ())
        return change, self._lay(change)

    def describe(self, name: str, metadata: dict[str, Any], position: int, when: float) -> tuple[Change, Change | None]:
        old = self.changes.get(name)
        linked = old is not None and old.kind is Kind.LINK
        change = self._successor(name, Kind.LINK if linked else Kind.METADATA, position, when)
        change.target = old.target if old is not None and linked else None
        self._note(change, metadata)
        return change, self._lay(change)

    def _note(self, change: Change, metadata: dict[str, Any]) -> None:
        """Keys that are as we last saw them on the grid are not ours, unless an earlier change of ours had them."""
        change.metadata = metadata
        if change.keys is not None:
            below = self._entry_of_base(change.name)
            seen = {} if below is None else below.metadata
            differ = {key for key in seen.keys() | metadata.keys() if not _same(seen, metadata, key)}
            change.keys |= differ - {"tahoe"}  # that part is never ours

    def _successor(self, name: str, kind: Kind, position: int, when: float) -> Change:
        old = self.changes.get(name)
        if old is None:
            child = self.base.get(name)
            return Change(self, name, kind, position, when, (None if child is None else child.cap,))
        ancestors = old.ancestors
        if old.sent and old.kind is not Kind.METADATA:
            ancestors = (*ancestors, old.cap)
        change = Change(self, name, kind, min(position, old.position), when, ancestors, keys=old.keys)
        change.wait_for(old.after)
        return change

    def restore(self, change: Change) -> None:
        """From the journal of a process before this one."""
        self._lay(change)

    def _lay(self, change: Change) -> Change | None:
        old = self.changes.pop(change.name, None)
        self.changes[change.name] = change
        self._touch(change.name)
        return old

    def take_away(self, change: Change) -> None:
        """The change is settled, or wanted no more: it no longer lies over the base."""
        if self.changes.get(change.name) is change:
            del self.changes[change.name]
            self._touch(change.name)

    # --- what comes from the grid

    def rebase(
        self, cap: Cap | None, version: bytes | None, base: Mapping[str, DirEntry], now: float
    ) -> list[tuple[Change, bool]]:
        """A newer listing takes the place of the base. Returns the changes that make no sense over it any more, each
        with whether it is a conflict (something of ours needs another name) or just void.
        """
        self.loaded_at = now
        self._cap = cap
        if version is not None and version == self.version:
            return []
        self.version = version
        self.base = base
        self._entries = {}
        self._touch()
        odd = []
        for change in self.changes.values():
            child = base.get(change.name)
            if change.kind is Kind.LINK and not change.ready:
                ours = child is None or change.accepts(child.cap)
            else:
                ours = change.apply(child)[1]
            if not ours:
                odd.append((change, change.kind is Kind.LINK))
            elif change.kind is Kind.REMOVE and child is None and not change.sent:
                odd.append((change, False))
        return odd

    def was_changed_elsewhere(self, name: str, over: Target | None) -> bool:
        """Whether somebody else put something under the name since it referred to `over` (None: to nothing)."""
        change, child = self.changes.get(name), self.base.get(name)
        if child is None or (change is not None and change.kind is not Kind.METADATA):
            return False  # it is free; or the change that waits knows its ancestors
        return not same_thing(child.cap, None if over is None else cap_of(over))

    def free_name(self, name: str, suffix: str) -> str:
        """`name` with ` (suffix)` before its extension, and a number if need be: one that nobody has."""
        change = self.changes.get(name)
        is_directory = change is not None and change.target is not None and target_is_directory(change.target)
        number = 1
        while True:
            candidate = name_with(name, suffix if number == 1 else f"{suffix} {number}", split=not is_directory)
            if candidate not in self.base and candidate not in self.changes:
                return candidate
            number += 1

    def _touch(self, name: str | None = None) -> None:
        """A name has changed, or (None) anything may have."""
        self.generation += 1
        if name is None:
            self._view = None
        else:
            self._stale.add(name)


def cap_of(target: Target) -> Cap | None:
    """A target's cap, None as long as it is not on the grid."""
    return target.cap if isinstance(target, PendingFile | Directory) else target


def target_is_directory(target: Target) -> bool:
    return isinstance(target, Directory | DirectoryCap)


def _same(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    return (key in one) == (key in other) and one.get(key) == other.get(key)


def same_thing(a: Cap | None, b: Cap | None) -> bool:
    """Whether two caps are of one thing on the grid, whatever rights they give."""
    if a is None or b is None:
        return a is b
    if a == b:
        return True
    return a.storage_index is not None and a.storage_index == b.storage_index and a.is_directory == b.is_directory


NAME_BYTES_MAX = 255


def name_with(name: str, suffix: str, *, split: bool) -> str:
    """`stem (suffix).ext`, the stem cut so that it still fits in a name. `split` false: no extension is looked for."""
    stem, dot, extension = name.rpartition(".") if split else (name, "", "")
    if not stem.strip(".") or len(extension.encode()) > 32:
        stem, dot, extension = name, "", ""
    tail = f" ({suffix}){dot}{extension}"
    room = NAME_BYTES_MAX - len(tail.encode())
    return stem.encode()[:room].decode(errors="ignore") + tail
