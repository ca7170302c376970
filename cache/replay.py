"""From a journal's rows back to what they stand for: the way a mount goes on where a process before it was killed.

    {"is": "file", "number", "key", "size", "spans", "base", "base_stop", "synced", "data" | "digest"}
    {"is": "file", "cap"}                            stored since: only what is laid over it needs to know
    {"is": "change", "in", "path", "name", "kind", "position", "when", "ancestors", "target", "metadata", "keys",
     "after", "sent"}
    {"is": "replacement", "cap", "file", "position", "name"}

    base         null, {"cap"}, {"file": id}         in       {"cap"}, {"new": id}
    target       null, {"cap"}, {"cap", "unlinked": true}, {"file": id, "name", "mutable"}, {"new": id}

Rows refer to each other by id; "new" ids are of directories that are not on the grid, and have no row. A row that
was lost takes those with it that make no sense without it, and nothing else. Does no network I/O.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from attrs import define, field

from cache.cap_json import cap_from_json
from cache.convergence import FileEncoding, RunningHash
from cache.directories import Change, Directory, Kind, Target
from cache.journal_store import Row
from cache.layers import Contents, Layers, LazyContents, LiveContents
from cache.pending import PendingFile, Replacement
from cache.sealed import SealedContents, SealedFile
from cache.spans import Spans
from cache.spool import Spool
from grid.errors import FormatError
from grid.formats.caps import Cap

Opener: TypeAlias = Callable[[Cap], Awaitable[Contents]]
_MALFORMED: Final = (FormatError, KeyError, TypeError, ValueError, OSError)


@define
class Restored:
    """What a journal held. `position`: the last one given out; `lost`: what could not be made anew, in words."""

    changes: list[Change] = field(factory=list)  # in the order they were made, laid over their directories
    replacements: list[Replacement] = field(factory=list)
    directories: dict[Cap, Directory] = field(factory=dict)
    position: int = 0
    files: list[SealedFile] = field(factory=list)  # those in use
    stale: list[int] = field(factory=list)  # ids of rows that nobody needs
    last_id: int = 0
    lost: list[str] = field(factory=list)


class Replay:
    """One journal's rows, on their way back. `adopted`: the spool files lie in that directory, which is another's."""

    def __init__(
        self,
        rows: Mapping[int, Row],
        spool: Spool,
        encoding: FileEncoding,
        opener: Opener,
        *,
        same_boot: bool,
        adopted: Path | None = None,
    ) -> None:
        self._rows = rows
        self._spool = spool
        self._encoding = encoding
        self._opener = opener
        self._same_boot = same_boot
        self._adopted = adopted
        self._files: dict[int, SealedFile | Cap] = {}
        self._lost_files: dict[int, str] = {}  # and why; that matters only to who needs one
        self._pending: dict[int, PendingFile] = {}
        self._new: dict[int, Directory] = {}
        self._changes: dict[int, Change] = {}
        self._found = Restored(last_id=max(rows, default=0))

    def run(self) -> Restored:
        found = self._found
        for kind, make in (("file", self._file), ("change", self._change), ("replacement", self._replacement)):
            for number, row in self._rows.items():
                if row.get("is") == kind:
                    try:
                        make(number, row)
                    except _MALFORMED as error:
                        if kind == "file":
                            self._lost_files[number] = str(error)
                        else:
                            found.lost.append(f"{row.get('path') or kind}: {row.get('name', number)}: {error}")
                found.last_id = max(found.last_id, number)
        for number, change in self._changes.items():
            change.wait_for(
                self._changes[each] for each in self._rows[number].get("after", ()) if each in self._changes
            )
        self._drop_unreachable()
        found.changes = sorted(self._changes.values(), key=lambda change: (change.position, change.id))
        for change in found.changes:
            change.directory.restore(change)
            found.position = max(found.position, change.position)
        files = [file for file in self._files.values() if isinstance(file, SealedFile)]
        for file in files:
            file.release()  # ours; whoever needs it has an ownership of his own
        found.files = [file for file in files if not file.gone]  # not before: one may be laid over another
        used = {*self._changes, *(file.id for file in found.files), *(each.id for each in found.replacements)}
        bases = [self._rows[number].get("base") or {} for number in used]
        used.update(base["file"] for base in bases if "file" in base)
        found.stale = [number for number in self._rows if number not in used]
        if self._adopted is not None:
            self._forget_ids()
        return found

    def _forget_ids(self) -> None:
        """They were another journal's."""
        things = (*self._changes.values(), *self._files.values(), *self._new.values(), *self._found.replacements)
        for thing in things:
            if isinstance(thing, Change | SealedFile | Directory | Replacement):
                thing.id = 0

    # --- files

    def _file(self, number: int, row: Row) -> None:
        """Owned by this object until `run` ends."""
        if "cap" in row:
            self._files[number] = cap_from_json(row["cap"])
            return
        data = base64.b64decode(row["data"]) if "data" in row else None
        digest = bytes.fromhex(row["digest"]) if "digest" in row else None
        if data is None and digest is None and not (self._same_boot or row["synced"]):
            raise FormatError("it was written in the last moment before the machine stopped, and is lost")
        base = self._base(row["base"], row["base_stop"])
        spool_number = row["number"]
        if self._adopted is not None:
            spool_number = self._spool.adopt(self._adopted / str(int(spool_number)))
        file = self._spool.restore(spool_number, bytes.fromhex(row["key"]), Spans((a, b) for a, b in row["spans"]))
        if data is not None:
            file.store_ranges(data)
        layers = Layers(file, row["size"], base, row["base_stop"])
        running = RunningHash(self._encoding)
        running.spoil()
        sealed = SealedFile(layers, self._encoding, running, digest=digest, synced=row["synced"])
        sealed.doubted = data is None
        sealed.id = number
        self._files[number] = sealed

    def _why(self, number: int) -> str:
        return f": {self._lost_files[number]}" if number in self._lost_files else ""

    def _base(self, base: Any, stop: int) -> Contents | None:
        if base is None:
            return None
        what = self._files.get(base["file"]) if "file" in base else cap_from_json(base["cap"])
        if what is None:
            raise FormatError(f"what it was written over is lost{self._why(base['file'])}")
        if isinstance(what, SealedFile):
            return SealedContents(what)
        kind = LiveContents if what.kind == "mdmf" else LazyContents
        return kind(what, stop, self._opener)

    # --- changes

    def _change(self, number: int, row: Row) -> None:
        directory = self._directory(row["in"], row["path"])
        ancestors = tuple(None if each is None else cap_from_json(each) for each in row["ancestors"])
        change = Change(directory, row["name"], Kind(row["kind"]), row["position"], row["when"], ancestors)
        change.target = self._target(row["target"], directory, row["name"])
        change.metadata = row["metadata"]
        change.keys = None if (keys := row.get("keys")) is None else frozenset(keys)  # older journals have none
        change.sent = row["sent"]
        change.id = number
        if change.kind is Kind.LINK and change.target is None:
            raise FormatError("it says not what the name refers to")
        if isinstance(change.target, Directory):
            change.target.links.add(change)
        self._changes[number] = change

    def _directory(self, place: Row, path: str | None) -> Directory:
        if "new" in place:
            directory = self._new.setdefault(place["new"], Directory(None, path=path))
            self._found.last_id = max(self._found.last_id, place["new"])
            directory.id = place["new"]
        else:
            cap = cap_from_json(place["cap"])
            directory = self._found.directories.setdefault(cap, Directory(cap, path=path))
        return directory

    def _target(self, target: Row | None, directory: Directory, name: str) -> Target | None:
        if target is None:
            return None
        path = None if directory.path is None else f"{directory.path.rstrip('/')}/{name}"
        if "file" in target:
            return self._pending_file(target["file"], target["name"], target.get("mutable", "none"))
        if "new" in target:
            return self._directory(target, path)
        cap = cap_from_json(target["cap"])
        if not target.get("unlinked"):
            return cap
        made = self._directory(target, path)
        made.linked = False
        return made

    def _pending_file(self, number: int, name: str, mutable: str) -> PendingFile | Cap:
        if number not in self._pending:
            file = self._files.get(number)
            if not isinstance(file, SealedFile):
                if file is None:
                    raise FormatError(f"its contents are lost{self._why(number)}")
                return file
            self._pending[number] = PendingFile(file.retain(), name, mutable)
        return self._pending[number]

    def _drop_unreachable(self) -> None:
        """What is in a new directory that no name leads to: the name's row was lost."""
        for directory in self._new.values():
            if not directory.links:
                for change in [each for each in self._changes.values() if each.directory is directory]:
                    self._found.lost.append(f"{directory.path or 'a new directory'}: {change.name}")
                    change.wait_for_nothing()
                    change.hand_on(None)
                    del self._changes[change.id]

    def _replacement(self, number: int, row: Row) -> None:
        file = self._files.get(row["file"])
        if not isinstance(file, SealedFile):
            raise FormatError(f"its contents are lost{self._why(row['file'])}")
        cap, name = cap_from_json(row["cap"]), row.get("name", "a mutable file")  # older journals have none
        replacement = Replacement(cap, file.retain(), row["position"], name)
        replacement.id = number
        self._found.replacements.append(replacement)
        self._found.position = max(self._found.position, replacement.position)
