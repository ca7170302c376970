"""Walks everything that can be reached from a directory: each object once, in bounded memory, whatever the tree.

    a directory ── its unknown children, its files, each in name order ── its directories, each with all below it

An object is known by its verify cap, so cycles end and what is linked twice is visited once; literals, which have none,
count wherever they are. What is still to be visited and what was seen stands in a temporary SQLite database that spills
to a nameless file, caps and names encrypted under a key that never leaves the process. Memory: one directory's table,
and the database's page cache, 2 MB as SQLite has it; nodes are not kept. A directory that cannot be read is visited
like any other, with the error. Source: deep traversal in Tahoe-LAFS 1.20.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from attrs import field, frozen

from grid.crypto import KEY_BYTES, aes_ctr
from grid.errors import GridError
from grid.formats.caps import Cap, UnknownCap, parse_cap

if TYPE_CHECKING:
    from grid.nodes.nodemaker import NodeMaker

ROW_BYTES_MAX: Final = 1 << 32  # of one encrypted row: a path and a cap are far shorter
PATH_PARTS_MAX: Final = 2000  # directories inside each other; deeper ones are not entered

Path = tuple[str, ...]


@frozen
class Visit:
    """One object: where it was found first, and what a traversal learns of it in passing."""

    path: Path  # names from the root, which has none
    cap: Cap = field(repr=False)
    size: int | None  # bytes: of an immutable file, or of a directory's table; None for a mutable file
    children: int | None = None  # of a directory
    error: GridError | None = None  # why a directory could not be read

    @property
    def key(self) -> bytes | None:
        return visit_key(self.cap)


def visit_key(cap: Cap) -> bytes | None:
    """16 bytes by which an object is known again; None for what is visited wherever it is found."""
    return None if cap.verifier is None else hashlib.sha256(str(cap.verifier).encode()).digest()[:16]


async def walk(nodemaker: NodeMaker, root: Cap) -> AsyncGenerator[Visit, None]:
    """Use it with contextlib.aclosing() if it may be left early. `root` may be a file. Raises nothing for what
    cannot be read.
    """
    with Agenda() as agenda:
        agenda.is_new(root)
        if not _can_be_entered(root):
            yield Visit((), root, root.size)
            return
        agenda.push([((), root)])
        while (item := agenda.pop()) is not None:
            path, cap = item
            node = nodemaker.create_from_cap(cap, keep=False)
            try:
                contents = await node.read()
            except GridError as error:
                yield Visit(path, cap, cap.size, error=error)
                continue
            finally:
                node.forget()
                del node
            yield Visit(path, cap, contents.size, len(contents.entries))
            children = [(name, contents.entries[name].cap) for name in sorted(contents.entries)]
            del contents
            ranked = sorted(children, key=lambda child: _rank(child[1]))  # stable: by name within each
            new = [((*path, name), child) for name, child in ranked if agenda.is_new(child)]
            for where, child in new:
                if not _can_be_entered(child) or len(where) > PATH_PARTS_MAX:
                    yield Visit(where, child, child.size)
            agenda.push([each for each in new if _can_be_entered(each[1]) and len(each[0]) <= PATH_PARTS_MAX])


def _can_be_entered(cap: Cap) -> bool:
    return cap.is_directory and not cap.is_verifier


def _rank(cap: Cap) -> int:
    if isinstance(cap, UnknownCap):
        return 0
    return 2 if _can_be_entered(cap) else 1


class Agenda:
    """What is to be visited, last in first out; and what was found."""

    def __enter__(self) -> Self:
        self._db = sqlite3.connect("")  # temporary, on disk when it grows
        self._db.executescript(
            "PRAGMA journal_mode=OFF; CREATE TABLE found (key BLOB PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE pending (id INTEGER PRIMARY KEY AUTOINCREMENT, item BLOB);"
        )
        self._key = secrets.token_bytes(KEY_BYTES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._db.close()

    def is_new(self, cap: Cap) -> bool:
        key = visit_key(cap)
        if key is None:
            return True
        return self._db.execute("INSERT OR IGNORE INTO found VALUES (?)", (key,)).rowcount > 0

    def push(self, items: Sequence[tuple[Path, Cap]]) -> None:
        """The first of them will be popped first, and before those that were pushed earlier."""
        for path, cap in reversed(items):
            cursor = self._db.execute("INSERT INTO pending (item) VALUES (NULL)")
            number = cursor.lastrowid
            assert number is not None
            plain = json.dumps([path, str(cap)]).encode()
            # ids are never given twice, so no part of the key stream is
            sealed = aes_ctr(self._key, plain, number * ROW_BYTES_MAX)
            self._db.execute("UPDATE pending SET item = ? WHERE id = ?", (sealed, number))

    def pop(self) -> tuple[Path, Cap] | None:
        row: Any = self._db.execute("SELECT id, item FROM pending ORDER BY id DESC LIMIT 1").fetchone()
        if row is None:
            return None
        number, sealed = row
        self._db.execute("DELETE FROM pending WHERE id = ?", (number,))
        path, text = json.loads(aes_ctr(self._key, sealed, number * ROW_BYTES_MAX))
        return tuple(path), parse_cap(text)
