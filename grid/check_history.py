"""What checks found, remembered: `tahoefs/checker_results.db` in the node directory. SQLite, mode 0600.

    results    by storage index, never a cap: when, and the results as JSON, compressed. The newest RESULTS_KEPT of each
    runs       deep checks: of which root, how, whether they came to their end
    checked    what was checked in a run, so that one that was interrupted can go on
    leases     when the leases of what a tree holds were renewed last

One process writes, others may read. Losing the file costs nothing but the history. Source: the 2008 interface
document names the file and its purpose; the tables are ours.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from grid.errors import NodeDirectoryError

FILE_NAME: Final = "checker_results.db"
RESULTS_KEPT: Final = 10  # of each object
RUNS_KEPT: Final = 20
RESUME_WITHIN_S: Final = 3 * 86400.0  # after its begin; what a run found before that says little about today
BUSY_TIMEOUT_S: Final = 2.0  # waited for another process that writes
RESULT_BYTES_MAX: Final = 16 << 20  # of one result, as JSON: believed only up to here when read back

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS results
    (storage_index BLOB, at REAL, verified INTEGER, json BLOB, PRIMARY KEY (storage_index, at)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, root BLOB, how TEXT, began REAL, finished REAL);
CREATE TABLE IF NOT EXISTS checked (run INTEGER, key BLOB, json BLOB, PRIMARY KEY (run, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases
    (root BLOB, key BLOB, at REAL, cycle INTEGER, PRIMARY KEY (root, key)) WITHOUT ROWID;
"""


class CheckHistory:
    """Open it with the node directory; `None` keeps everything in memory, for as long as the process lives."""

    def __init__(self, node_directory: Path | None) -> None:
        try:
            self._db = self._open(node_directory)
            self._db.executescript(_TABLES)
        except (sqlite3.Error, OSError) as error:
            where = f"{node_directory}/tahoefs/{FILE_NAME}"
            raise NodeDirectoryError(f"{where}: {error}; it may be deleted, at the price of its history") from None

    @staticmethod
    def _open(node_directory: Path | None) -> sqlite3.Connection:
        if node_directory is None:
            return sqlite3.connect(":memory:", isolation_level=None)
        folder = node_directory / "tahoefs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / FILE_NAME
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # before SQLite makes it with the umask
        db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")  # what a power cut may cost can be checked again
        return db

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        """Raises NodeDirectoryError."""
        try:
            return self._db.execute(statement, values)
        except sqlite3.Error as error:
            raise NodeDirectoryError(f"{FILE_NAME}: {error}") from None

    # --- results

    def remember(self, storage_index: bytes, at: float, *, verified: bool, results: dict[str, Any]) -> None:
        """`results` as CheckResults.to_json() has them; `at`: POSIX seconds."""
        row = (storage_index, at, verified, _pack(results))
        self._execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", row)
        self._execute(
            "DELETE FROM results WHERE storage_index = ?1 AND at < (SELECT min(at) FROM "
            "(SELECT at FROM results WHERE storage_index = ?1 ORDER BY at DESC LIMIT ?2))",
            (storage_index, RESULTS_KEPT),
        )

    def results_for(self, storage_index: bytes) -> list[tuple[float, dict[str, Any]]]:
        """(when, results), oldest first. What cannot be read any more is left out."""
        rows = self._execute("SELECT at, json FROM results WHERE storage_index = ? ORDER BY at", (storage_index,))
        return [(at, results) for at, packed in rows if (results := _unpack(packed)) is not None]

    # --- deep checks

    def begin_run(self, root: bytes, how: str, now: float, *, resume: bool) -> int:
        """The number of a new run, or of the last one of this root and kind if that was interrupted, not too long ago.

        `root`: 16 bytes that stand for the root's cap and tell nothing of it.
        """
        if resume:
            row = self._execute(
                "SELECT id, began, finished FROM runs WHERE root = ? AND how = ? ORDER BY id DESC LIMIT 1", (root, how)
            ).fetchone()
            if row is not None and row[2] is None and now - row[1] < RESUME_WITHIN_S:
                return int(row[0])
        cursor = self._execute("INSERT INTO runs (root, how, began) VALUES (?, ?, ?)", (root, how, now))
        number = cursor.lastrowid
        assert number is not None
        self._execute("DELETE FROM runs WHERE id <= ?", (number - RUNS_KEPT,))
        self._execute(
            "DELETE FROM checked WHERE run <= ? OR run IN (SELECT id FROM runs WHERE root = ? AND how = ? AND id < ?)",
            (number - RUNS_KEPT, root, how, number),
        )
        return number

    def note_checked(self, run: int, key: bytes, results: dict[str, Any]) -> None:
        self._execute("INSERT OR REPLACE INTO checked VALUES (?, ?, ?)", (run, key, _pack(results)))

    def checked_in(self, run: int, key: bytes) -> dict[str, Any] | None:
        row = self._execute("SELECT json FROM checked WHERE run = ? AND key = ?", (run, key)).fetchone()
        return None if row is None else _unpack(row[0])

    def finish_run(self, run: int, now: float) -> None:
        self._execute("UPDATE runs SET finished = ? WHERE id = ?", (now, run))
        self._execute("DELETE FROM checked WHERE run = ?", (run,))

    # --- leases

    def lease_cycle(self, root: bytes) -> int:
        """The number of the cycle under way: one more than that of the last that came to its end."""
        row = self._execute("SELECT max(cycle) FROM leases WHERE root = ? AND key = x''", (root,)).fetchone()
        return (row[0] or 0) + 1

    def note_lease(self, root: bytes, key: bytes, at: float | None, cycle: int) -> None:
        """Found in this cycle; `at`: renewed just now, or None when it was left as it is."""
        if at is None:
            self._execute("UPDATE leases SET cycle = ? WHERE root = ? AND key = ?", (cycle, root, key))
        else:
            self._execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", (root, key, at, cycle))

    def lease_of(self, root: bytes, key: bytes) -> float | None:
        """When it was renewed last."""
        row = self._execute("SELECT at FROM leases WHERE root = ? AND key = ?", (root, key)).fetchone()
        return None if row is None else row[0]

    def finish_lease_cycle(self, root: bytes, at: float, cycle: int) -> None:
        """What was not found in it is gone from the tree."""
        self._execute("DELETE FROM leases WHERE root = ? AND key != x'' AND cycle < ?", (root, cycle))
        self._execute("INSERT OR REPLACE INTO leases VALUES (?, x'', ?, ?)", (root, at, cycle))

    def last_lease_cycle(self, root: bytes) -> float | None:
        """When the last complete one came to its end."""
        return self.lease_of(root, b"")

    def oldest_lease(self, root: bytes) -> float | None:
        """When the lease was renewed that was not for longest, of all that is known to be in the tree."""
        row = self._execute("SELECT min(at) FROM leases WHERE root = ? AND key != x''", (root,)).fetchone()
        return row[0]  # type: ignore[no-any-return]


def _pack(results: dict[str, Any]) -> bytes:
    return zlib.compress(json.dumps(results, separators=(",", ":")).encode())


def _unpack(packed: bytes) -> dict[str, Any] | None:
    try:
        text = zlib.decompressobj().decompress(packed, RESULT_BYTES_MAX)
        results = json.loads(text)
    except (zlib.error, ValueError, TypeError, RecursionError):
        return None
    return results if isinstance(results, dict) else None
