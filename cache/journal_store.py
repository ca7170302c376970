"""What the journal keeps on the local disk, so that a kill loses nothing: rows that come and go in groups.

    <state_dir>/journal/<storage index prefix>/<slot>/lock         held with flock by the process whose journal this is
                                                     /journal.db   SQLite, in WAL mode
                                                     /mark         how far it had got (`cache/journal_mark.py`)
                                                     /files/       the spool's (`cache/spool.py`)
    rows    id, and a JSON object sealed under a key derived from the mounted cap, with the id as context
    meta    format (another one is refused), boot (of the machine, when the journal was opened),
            sequence (how many groups of rows were written)

A row is the present state of one thing (a pending change, a spool file), not an event: what is settled is deleted, so
the journal is as long as what is unsent. Rows changed between two awaits are written in one transaction, in the order
of the changes; so what is found after a kill is the state between two operations.

    put, delete    remembered; `write` takes all of it to SQLite            survives the end of this process
    flush          fsync of new spool files, then of the write-ahead log    survives a power cut

The log is checkpointed only after spool files were fsynced, so that no row gets to the disk before its file does.
One thread at a time touches the database. Directories are 0700, files 0600.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import trio

from cache.journal_mark import JournalMark
from cache.spool import SpoolFullError
from grid.crypto import NONCE_BYTES, seal, unseal
from grid.errors import FormatError, GridError, NodeDirectoryError

log = logging.getLogger(__name__)

FORMAT: Final = 1
SLOTS_MAX: Final = 64  # mounts of one directory by one node directory, at a time
WAL_BYTES_MAX: Final = 4 << 20  # of the write-ahead log before it is checkpointed
ROW_BYTES_MAX: Final = 64 << 20  # of one row that we read back; a file in a million pieces has the longest
_SCHEMA: Final = """
    CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS rows (id INTEGER PRIMARY KEY, sealed BLOB NOT NULL);
"""
_FULL: Final = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_IOERR_WRITE}

Row: TypeAlias = dict[str, Any]


class JournalDamagedError(GridError):
    """Something in the journal is not what was written there."""


class JournalStore:
    """One slot: this process's rows on disk. Made by `open_slot`."""

    def __init__(self, path: Path, lock_fd: int, key: bytes) -> None:
        self.path = path
        self._lock_fd = lock_fd
        self._key = key
        self._turn = trio.Lock()  # held while a thread is at the database
        self._database = self._open_database()
        self._wal_fd = os.open(path / "journal.db-wal", os.O_RDONLY | os.O_CLOEXEC)
        found = self._check_meta()
        self._boot = _boot_id()
        self._mark = JournalMark(path / "mark", sha256(self._boot.encode()).digest()[:16])
        self._sequence = int(text) if (text := found.get("sequence", "")).isdecimal() else 0  # of the last group
        self.same_boot = found.get("boot", self._boot) == self._boot  # the machine has run since the rows were written
        self._meta_written = False
        self.missing = max(0, self._mark.kept - self._sequence)  # groups of rows that were kept, and are not there

    @property
    def files(self) -> Path:
        return self.path / "files"

    # --- opening and closing

    def _open_database(self) -> sqlite3.Connection:
        path = self.path / "journal.db"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite gives its other files this mode
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = OFF")  # `flush` does it, in the right order
            database.execute("PRAGMA wal_autocheckpoint = 0")
            database.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        except BaseException:
            database.close()
            raise
        return database

    def _check_meta(self) -> dict[str, str]:
        found = dict(self._database.execute("SELECT name, value FROM meta"))
        if found.setdefault("format", str(FORMAT)) != str(FORMAT):
            raise JournalDamagedError(f"its format is {found['format'][:20]}, and this program writes {FORMAT}")
        return found

    def close(self) -> None:
        """Let go of it. A journal without rows is removed. Harmless when repeated."""
        if self._lock_fd < 0:
            return
        try:
            empty = self._database.execute("SELECT 1 FROM rows LIMIT 1").fetchone() is None
            self._database.execute("PRAGMA synchronous = NORMAL")  # of what moves now from the log into the database
            self._database.close()
            if empty:
                _remove(self.path)
        except (sqlite3.Error, OSError) as error:
            log.warning("closing the journal: %s", error)
        finally:
            self._mark.close()
            os.close(self._wal_fd)
            os.close(self._lock_fd)
            self._lock_fd = -1

    # --- rows

    def load(self) -> tuple[dict[int, Row], list[int]]:
        """All rows by id, and the ids of those that do not open. At start only; blocks."""
        rows: dict[int, Row] = {}
        damaged: list[int] = []
        query = "SELECT id, CASE WHEN length(sealed) <= ? THEN sealed ELSE x'' END FROM rows ORDER BY id"
        for number, sealed in self._database.execute(query, (ROW_BYTES_MAX,)):
            try:
                row = json.loads(unseal(self._key, sealed, _context(number)))
                if not isinstance(row, dict):
                    raise FormatError("a row is no object")
            except (FormatError, ValueError, RecursionError):
                damaged.append(number)
            else:
                rows[number] = row
        return rows, damaged

    async def write(self, rows: Mapping[int, Row | None]) -> None:
        """All of these, or none: None deletes. Not interrupted. Raises SpoolFullError, OSError."""
        texts = {number: None if row is None else json.dumps(row).encode() for number, row in rows.items()}
        await self._in_thread(lambda: self._write(texts))

    async def clear(self) -> None:
        """Forget everything: it is in another journal now."""
        await self._in_thread(lambda: self._database.execute("DELETE FROM rows"))

    async def flush(self, prepare: Callable[[], None]) -> None:
        """Have all that was written on the disk. `prepare`, in the same thread, does so for the spool files."""

        def run() -> None:
            prepare()
            _fsync_directory(self.files)
            os.fsync(self._wal_fd)
            self._mark.note(self._sequence, self._sequence)
            if os.fstat(self._wal_fd).st_size > WAL_BYTES_MAX:
                self._database.execute("PRAGMA synchronous = NORMAL")
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._database.execute("PRAGMA synchronous = OFF")

        await self._in_thread(run)

    async def _in_thread(self, work: Callable[[], object]) -> None:
        with trio.CancelScope(shield=True):  # local disk; a half-done turn would have no owner
            async with self._turn:
                try:
                    await trio.to_thread.run_sync(work)
                except sqlite3.Error as error:
                    if error.sqlite_errorcode in _FULL:
                        raise SpoolFullError("the local disk is full") from None
                    raise OSError(errno.EIO, f"the journal cannot be written: {error}") from error
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT):
                        raise SpoolFullError("the local disk is full") from None
                    raise

    def _write(self, texts: Mapping[int, bytes | None]) -> None:
        database = self._database
        puts = [
            (number, seal(self._key, secrets.token_bytes(NONCE_BYTES), text, _context(number)))
            for number, text in texts.items()
            if text is not None
        ]
        database.execute("BEGIN IMMEDIATE")
        try:
            database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", puts)
            database.executemany("DELETE FROM rows WHERE id = ?", [(n,) for n, text in texts.items() if text is None])
            self._write_meta()
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        self._sequence += 1
        self._meta_written = True
        self._mark.note(self._sequence)

    def _write_meta(self) -> None:
        sequence = str(self._sequence + 1)
        if self._meta_written:
            self._database.execute("UPDATE meta SET value = ? WHERE name = 'sequence'", (sequence,))
            return
        # Not before: what an earlier run of the machine left is in order only when the first group was written.
        values = [("format", str(FORMAT)), ("boot", self._boot), ("sequence", sequence)]
        self._database.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", values)

    @classmethod
    def open_slot(cls, path: Path, lock_fd: int, key: bytes) -> Self:
        """Takes over the lock. Raises NodeDirectoryError for what is no journal of ours."""
        try:
            (path / "files").mkdir(mode=0o700, exist_ok=True)
            return cls(path, lock_fd, key)
        except (sqlite3.Error, OSError, JournalDamagedError) as error:
            os.close(lock_fd)
            raise NodeDirectoryError(
                f"the journal in {path} cannot be used: {error}; it holds what is unsent, so move it to mount without"
            ) from None


def open_store(state_dir: Path, name: str, key: bytes) -> JournalStore:
    """The first slot under `name` that no living process holds, with what a dead one left in it. Blocks.

    Raises NodeDirectoryError.
    """
    root = state_dir / "journal" / name
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (root.parent, root):
            path.chmod(0o700)
        for slot in range(SLOTS_MAX):
            path = root / str(slot)
            path.mkdir(mode=0o700, exist_ok=True)
            if (lock_fd := _lock(path)) is not None:
                return JournalStore.open_slot(path, lock_fd, key)
    except OSError as error:
        raise NodeDirectoryError(f"cannot keep unsent files in {root}: {error.strerror}; is it yours?") from None
    raise NodeDirectoryError(f"all {SLOTS_MAX} journals in {root} are in use")


def abandoned_stores(state_dir: Path, name: str, key: bytes) -> list[JournalStore]:
    """Those with something in them whose process is dead. Blocks. Raises NodeDirectoryError."""
    found = []
    for path in sorted((state_dir / "journal" / name).iterdir()):
        if (path / "journal.db").exists() and (lock_fd := _lock(path)) is not None:
            found.append(JournalStore.open_slot(path, lock_fd, key))
    return found


def _lock(path: Path) -> int | None:
    """The slot's lock, None if another has it."""
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove(path: Path) -> None:
    """An empty journal. The lock file stays: another process may have it open."""
    (path / "mark").unlink(missing_ok=True)  # first: it must not speak of a journal that is gone
    for file in (*(path / "files").iterdir(), *(path / f"journal.db{end}" for end in ("", "-wal", "-shm"))):
        file.unlink(missing_ok=True)


def _context(number: int) -> bytes:
    return b"row %d" % number


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
