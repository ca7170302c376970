"""What is pinned, on the local disk beside the block store: records that stay until nobody wants them any more.

    <cache_dir>/pinned-1/index.db         SQLite, WAL: where each record stands, who wants it
                         <number>.pack    the records (`cache/block_packs.py`)

    records    key, pack, offset, payload bytes, segment size        one for each key, the latest
    marks      key, owner, epoch                                     `owner` wanted it when it looked last
    epochs     owner, epoch

An owner (the pins of one mounted root) takes a new epoch, marks all it wants, and sweeps: what has no mark of anybody
is garbage. A pack with more than GARBAGE_SHARE of it is cleared: what is wanted is appended anew, and the pack goes to
the block store as it is, so what is no longer pinned becomes ordinary cache without being copied.

The packs count within the block store's bound, each as a full one, and never take more than SHARE of it. A record is on
the disk before its row is: what is said to be here survives a power cut. Records prove themselves when they are read,
as in the block store; one that does not is forgotten and `damaged` is set, so that it is fetched anew.

Shared by all processes of a node directory. Plain blocking code, for worker threads. `_writing` is held over one
change, with its appends; `_reading` over one look into the index.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from attrs import field, frozen

from cache.block_packs import (
    HEADER,
    OpenPack,
    Record,
    create_pack,
    encode,
    list_packs,
    pack_path,
    read_at,
    resume_pack,
)
from cache.block_store import RECORD_BYTES_MAX, BlockStore
from grid.errors import GridError

log = logging.getLogger(__name__)

FORMAT: Final = "pinned-1"
SHARE: Final = 0.75  # of the cache, at most: the rest is for what is read besides
GARBAGE_SHARE: Final = 0.25  # of a pack; with more it is cleared
BUSY_TIMEOUT_S: Final = 10.0  # waited for another process that writes
READ_TRIES: Final = 3  # a record may move while it is read

_INDEX: Final = "index.db"
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS records
    (key BLOB PRIMARY KEY, pack INTEGER, offset INTEGER, length INTEGER, segment INTEGER) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_pack ON records (pack);
CREATE TABLE IF NOT EXISTS marks (key BLOB, owner TEXT, epoch INTEGER, PRIMARY KEY (key, owner)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_owner ON marks (owner, epoch);
CREATE TABLE IF NOT EXISTS epochs (owner TEXT PRIMARY KEY, epoch INTEGER) WITHOUT ROWID;
"""
_MARK: Final = (
    "INSERT INTO marks VALUES (?, ?, ?) "
    "ON CONFLICT (key, owner) DO UPDATE SET epoch = excluded.epoch WHERE epoch <> excluded.epoch"
)
_BEGIN_EPOCH: Final = (
    "INSERT INTO epochs VALUES (?, 1) ON CONFLICT (owner) DO UPDATE SET epoch = epoch + 1 RETURNING epoch"
)
_PUT: Final = "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)"


class PinsFullError(GridError):
    """What is pinned does not fit. The text says why and what to do."""


@frozen
class Item:
    """One record to be put."""

    key: bytes
    secret: bytes = field(repr=False)
    segment_size: int  # bytes in each segment of its file but the last
    payload: bytes | memoryview = field(repr=False)


@frozen
class _Place:
    pack: int
    offset: int
    length: int  # bytes of the payload
    segment_size: int


def disk_bytes(path: Path, pack_bytes: int) -> int:
    """What the store at `path` has of the disk, each pack counted as full; 0 when there is none."""
    try:
        packs = sum(max(size, pack_bytes) for size in list_packs(path).values())
        return packs + sum(file.stat().st_size for file in path.glob(f"{_INDEX}*"))
    except FileNotFoundError:
        return 0


class PinStore:
    """Nothing is made on the disk before the first record is put."""

    def __init__(self, path: Path, store: BlockStore) -> None:
        self.damaged = False  # something that was said to be here is not
        self._path = path
        self._store = store
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None  # device and inode of the index that is open
        self._pack: OpenPack | None = None

    @property
    def limit_bytes(self) -> int:
        """What may be pinned, by all mounts of the node directory."""
        return int(self._store.limit_bytes * SHARE)

    def used_bytes(self) -> int:
        """In packs, garbage too. Raises OSError."""
        return sum(list_packs(self._path).values()) if self._path.is_dir() else 0

    def room_bytes(self) -> int:
        """What may still be put. Raises OSError."""
        packs = list_packs(self._path) if self._path.is_dir() else {}
        spare = max((self._store.pack_bytes - size for size in packs.values()), default=0)
        return self.limit_bytes - sum(max(size, self._store.pack_bytes) for size in packs.values()) + max(spare, 0)

    def close(self) -> None:
        with self._writing, self._reading:
            self._let_go()

    def _let_go(self) -> None:
        for database in (self._reader, self._writer):
            if database is not None:
                database.close()
        if self._pack is not None:
            self._pack.close()
        self._reader = self._writer = self._pack = self._file = None

    # --- looking

    def get(self, key: bytes, secret: bytes, into: memoryview | None = None) -> Record | None:
        """As BlockStore.get."""
        try:
            for _ in range(READ_TRIES):
                if (place := self._find(key)) is None:
                    return None
                if into is not None and place.length > len(into):
                    return None
                if (record := self._read(key, secret, place, into)) is not None:
                    return record
                if self._find(key) == place:  # it has not moved: it is not what it was
                    self._forget(key, place)
        except (OSError, sqlite3.Error) as error:
            log.warning("what is pinned cannot be read: %s", error)
        return None

    def has(self, key: bytes) -> bool:
        """As BlockStore.has."""
        try:
            return self._find(key) is not None
        except (OSError, sqlite3.Error):
            return False

    def segment_size(self, key: bytes) -> int | None:
        """Of the record's file; None when there is no such record. Raises OSError."""
        with _as_os_errors():
            place = self._find(key)
        return None if place is None else place.segment_size

    def _find(self, key: bytes) -> _Place | None:
        with self._reading:
            if self._reader is None:
                if not (self._path / _INDEX).exists():
                    return None
                self._reader = self._connect()
            row = self._reader.execute("SELECT pack, offset, length, segment FROM records WHERE key = ?", (key,))
            found = row.fetchone()
        return None if found is None else _Place(*found)

    def _read(self, key: bytes, secret: bytes, place: _Place, into: memoryview | None = None) -> Record | None:
        if not 0 <= place.length <= RECORD_BYTES_MAX:
            return None
        payload = memoryview(bytearray(place.length)) if into is None else into[: place.length]
        return read_at(self._path, place.pack, place.offset, payload, key, secret)

    def _forget(self, key: bytes, place: _Place) -> None:
        log.warning("something that was pinned is damaged; it is fetched again")
        self.damaged = True
        with self._changing() as database:
            statement = "DELETE FROM records WHERE key = ? AND pack = ? AND offset = ?"
            database.execute(statement, (key, place.pack, place.offset))

    # --- changing

    def put(self, owner: str, epoch: int, items: Sequence[Item]) -> None:
        """Keep these, wanted by `owner`; on the disk when it returns. Raises PinsFullError, OSError."""
        with _as_os_errors(), self._changing() as database:
            rows = [self._append(item) for item in items]
            if self._pack is not None:
                self._pack.flush()
            database.executemany(_PUT, rows)
            database.executemany(_MARK, [(item.key, owner, epoch) for item in items])

    def replace(self, item: Item) -> bool:
        """Put it in the place of what is here under its key, if somebody wants that; else forget that.

        Returns whether it is here then. Raises OSError.
        """
        with _as_os_errors():
            if (place := self._find(item.key)) is None:
                return False
            with self._changing() as database:
                if database.execute("SELECT 1 FROM marks WHERE key = ? LIMIT 1", (item.key,)).fetchone() is None:
                    database.execute("DELETE FROM records WHERE key = ?", (item.key,))
                    return False
                if place.length == len(item.payload) and place.segment_size == item.segment_size:
                    record = self._read(item.key, item.secret, place)
                    if record is not None and record.payload == item.payload:
                        return True
                try:
                    row = self._append(item)
                except PinsFullError:  # better none than an older one
                    database.execute("DELETE FROM records WHERE key = ?", (item.key,))
                    self.damaged = True
                    return False
                assert self._pack is not None
                self._pack.flush()
                database.execute(_PUT, row)
                return True

    def begin_epoch(self, owner: str) -> int:
        """A new one, larger than all before. What is not on the disk any more is forgotten. Raises OSError."""
        with _as_os_errors():
            self.notice_removal()
            self._remove_if_damaged()
            with self._changing() as database:
                sizes = list_packs(self._path)
                for (pack,) in database.execute("SELECT DISTINCT pack FROM records").fetchall():
                    end = sizes.get(pack, 0) - HEADER.size
                    database.execute("DELETE FROM records WHERE pack = ? AND offset + length > ?", (pack, end))
                self.damaged = False
                number: int = database.execute(_BEGIN_EPOCH, (owner,)).fetchone()[0]
                return number

    def mark(self, owner: str, epoch: int, keys: Sequence[bytes]) -> list[bool]:
        """`owner` wants these: which are here? Raises OSError."""
        if not (self._path / _INDEX).exists():
            return [False] * len(keys)
        with _as_os_errors(), self._changing() as database:
            here = [database.execute("SELECT 1 FROM records WHERE key = ?", (key,)).fetchone() for key in keys]
            found = [row is not None for row in here]
            database.executemany(
                _MARK, [(key, owner, epoch) for key, is_here in zip(keys, found, strict=True) if is_here]
            )
            return found

    def sweep(self, owner: str, epoch: int) -> None:
        """What `owner` marked before `epoch` and not since is no longer wanted by it. Raises OSError."""
        if not (self._path / _INDEX).exists():
            return
        with _as_os_errors():
            with self._changing() as database:
                database.execute("DELETE FROM marks WHERE owner = ? AND epoch < ?", (owner, epoch))
            for number, size in list_packs(self._path).items():
                with self._changing() as database:
                    self._clear(database, number, size)

    def _clear(self, database: sqlite3.Connection, number: int, size: int) -> None:
        """Let the block store have a pack that is garbage for a good part, without what is wanted."""
        rows = database.execute(
            "SELECT key, offset, length, segment, EXISTS (SELECT 1 FROM marks WHERE marks.key = records.key)"
            " FROM records WHERE pack = ? ORDER BY offset",
            (number,),
        ).fetchall()
        wanted = [row for row in rows if row[4]]
        unwanted = [(key, offset, length) for key, offset, length, _, is_wanted in rows if not is_wanted]
        if size - sum(HEADER.size + row[2] for row in wanted) <= size * GARBAGE_SHARE and size:
            return
        if self._pack is not None and self._pack.number == number:
            self._pack.close()
            self._pack = None
        held = OpenPack.resume(self._path, number)
        if held is None:
            return  # a living process appends to it
        try:
            self._move(database, held, wanted)
        finally:
            held.close()
        database.executemany("DELETE FROM records WHERE key = ?", [(key,) for key, _, _ in unwanted])
        with suppress(FileNotFoundError):
            self._store.adopt(pack_path(self._path, number), unwanted)

    def _move(self, database: sqlite3.Connection, pack: OpenPack, rows: Sequence[tuple[Any, ...]]) -> None:
        moved = []
        for key, offset, length, segment_size, _ in rows:
            data = pack.read(offset, HEADER.size + length)
            if len(data) == HEADER.size + length:
                head, payload = data[: HEADER.size], data[HEADER.size :]
                moved.append(self._write(key, head, payload, segment_size, moving=True))
        if self._pack is not None:
            self._pack.flush()
        database.executemany(_PUT, moved)

    def _append(self, item: Item) -> tuple[bytes, int, int, int, int]:
        head, payload = encode(item.key, item.secret, item.segment_size, item.payload)
        return self._write(item.key, head, payload, item.segment_size)

    def _write(
        self, key: bytes, head: bytes, payload: bytes | memoryview, segment_size: int, *, moving: bool = False
    ) -> tuple[bytes, int, int, int, int]:
        """Append a record; returns its row. `moving`: from a pack that goes, so it fits in any case."""
        size, pack_bytes = len(head) + len(payload), self._store.pack_bytes
        if self._pack is None or self._pack.gone or self._pack.size + size > max(pack_bytes, size):
            self._begin_pack(size, moving=moving)
        assert self._pack is not None
        return key, self._pack.number, self._pack.append(head, payload), len(payload), segment_size

    def _begin_pack(self, size: int, *, moving: bool) -> None:
        pack_bytes = self._store.pack_bytes
        if self._pack is not None:
            if not self._pack.gone:
                self._pack.flush()
            self._pack.close()
            self._pack = None
        packs = list_packs(self._path)
        if (resumed := resume_pack(self._path, packs, size, pack_bytes)) is not None:
            self._pack = resumed
            return
        new = max(pack_bytes, size)
        if not moving and sum(max(held, pack_bytes) for held in packs.values()) + new > self.limit_bytes:
            limit = f"{self.limit_bytes / (1 << 20):.1f} MiB"
            raise PinsFullError(f"pins may take {limit} of the cache, and do: mount with a larger cache_size=")
        if not self._store.give_way(new):
            raise PinsFullError("the local disk is too full for more of what is pinned")
        self._pack = create_pack(self._path, packs)

    # --- the index

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction, with the lock held."""
        with self._writing:
            if self._writer is None:
                self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._writer = self._connect()
            database = self._writer
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    def _connect(self) -> sqlite3.Connection:
        path = self._path / _INDEX
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite gives its other files this mode
        database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            if database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'epochs'").fetchone() != (1,):
                database.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")
            status = path.stat()
        except BaseException:
            database.close()
            raise
        self._file = (status.st_dev, status.st_ino)
        return database

    def notice_removal(self) -> None:
        """When somebody removed the folder: it is empty from now on, and `damaged`. Raises OSError."""
        with self._writing, self._reading:
            try:
                status = (self._path / _INDEX).stat()
            except FileNotFoundError:
                status = None
            if self._file is not None and (status is None or self._file != (status.st_dev, status.st_ino)):
                self._let_go()
                self.damaged = True

    def _remove_if_damaged(self) -> None:
        with self._writing:
            if self._writer is None and not (self._path / _INDEX).exists():
                return
            try:
                self._writer = self._writer or self._connect()
                sound = self._writer.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
            except sqlite3.OperationalError:
                raise  # busy, or the disk's
            except sqlite3.DatabaseError:
                sound = False
            if not sound:
                log.warning("the index of what is pinned is damaged: all of it is fetched again")
                with self._reading:
                    self._let_go()
                shutil.rmtree(self._path, ignore_errors=True)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(f"the index of what is pinned: {error}") from error
