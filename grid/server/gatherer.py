"""The statistics gatherer: asks every node that came to it, each minute, and keeps what they told in SQLite.

    provide(provider, nickname)     from a node, with each new connection
    provider.get_stats()            to each node, when it comes and every POLL_S; one that is lost is dropped

    gathered.sqlite     polls(at, tub_id, nickname, stats)     stats: JSON {"counters": {…}, "stats": {…}}

Anyone with the FURL may provide: names and numbers are checked, and bounded in number and size. The history is bounded
by rows and by bytes, the oldest goes first. Readers (`tahoefs stats --gathered`) open the file beside us: it is in WAL
mode.
Source: the gatherer of Tahoe-LAFS up to 1.15, whose `stats.json` held the last poll only.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import trio
from attrs import define, frozen

from grid.errors import PeerError, RemoteFailure
from grid.transports.tub import Referenceable, RemoteReference
from grid.wire.failures import shown
from grid.wire.remote_interfaces import RIStatsGatherer
from grid.wire.schemas import RemoteInterface

log = logging.getLogger(__name__)


DATABASE: Final = "gathered.sqlite"
POLL_S: Final = 60.0
POLL_TIMEOUT_S: Final = 30.0
PROVIDERS_MAX: Final = 1000
NUMBERS_MAX: Final = 5000  # of one poll
NAME_BYTES_MAX: Final = 200
NICKNAME_CHARACTERS_MAX: Final = 100
HISTORY_ROWS_MAX: Final = 200_000
HISTORY_BYTES_MAX: Final = 1 << 30
TRIM_EVERY: Final = 100  # rows added
READ_TIMEOUT_S: Final = 10.0  # for a lock another holds


@frozen
class Poll:
    """What one node told. `at`: POSIX seconds; `counters` only grow, `stats` are as of then."""

    at: float
    tub_id: str
    nickname: str
    counters: dict[str, float]
    stats: dict[str, float]


class History:
    """The database, of one writer. Its calls block: they are made in one worker thread at a time."""

    def __init__(self, path: Path) -> None:
        """Raises sqlite3.Error."""
        self._database = sqlite3.connect(path, timeout=READ_TIMEOUT_S, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS polls (id INTEGER PRIMARY KEY, at REAL NOT NULL, tub_id TEXT NOT NULL, "
            "nickname TEXT NOT NULL, stats TEXT NOT NULL)"
        )
        self._database.execute("CREATE INDEX IF NOT EXISTS polls_by_node ON polls (tub_id, at)")
        self._added = 0

    def add(self, poll: Poll) -> None:
        text = json.dumps({"counters": poll.counters, "stats": poll.stats})
        self._database.execute(
            "INSERT INTO polls (at, tub_id, nickname, stats) VALUES (?, ?, ?, ?)",
            (poll.at, poll.tub_id, poll.nickname, text),
        )
        self._added += 1
        if self._added % TRIM_EVERY == 0:
            self.trim()

    def trim(self) -> None:
        """Back within bounds, with room to spare."""
        rows, size = self._database.execute("SELECT count(*), coalesce(sum(length(stats)), 0) FROM polls").fetchone()
        part_kept = min(HISTORY_ROWS_MAX / max(rows, 1), HISTORY_BYTES_MAX / max(size, 1))
        if part_kept < 1:
            gone = math.ceil(rows * (1 - 0.9 * part_kept))
            self._database.execute("DELETE FROM polls WHERE id IN (SELECT id FROM polls ORDER BY id LIMIT ?)", (gone,))

    def close(self) -> None:
        self._database.close()


@define(eq=False)
class _Provider:
    reference: RemoteReference
    tub_id: str
    nickname: str
    asked_at: float = -math.inf  # trio time


class StatsGatherer(Referenceable):
    """RIStatsGatherer, to be registered under the gatherer's swissnum. `run()` polls."""

    remote_interface: ClassVar[RemoteInterface | None] = RIStatsGatherer

    def __init__(self, history: History) -> None:
        self._history = history
        self._providers: dict[str, _Provider] = {}  # by tub id
        self._writer = trio.CapacityLimiter(1)
        self._nursery: trio.Nursery | None = None

    @property
    def provider_count(self) -> int:
        return len(self._providers)

    async def remote_provide(self, provider: RemoteReference, nickname: bytes) -> None:
        if len(self._providers) >= PROVIDERS_MAX and provider.tub_id not in self._providers:
            raise RemoteFailure("builtins.MemoryError", "this gatherer has too many nodes to ask")
        name = shown(nickname, NICKNAME_CHARACTERS_MAX)
        known, came = self._providers.get(provider.tub_id), _Provider(provider, provider.tub_id, name)
        self._providers[provider.tub_id] = came
        log.info("node %s (%s) tells its statistics", provider.tub_id[:8], name)
        if known is not None:
            came.asked_at = known.asked_at
        if self._nursery is not None and trio.current_time() > came.asked_at + POLL_S:
            self._nursery.start_soon(self._poll_one, came)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                while True:
                    next_poll = trio.current_time() + POLL_S
                    await self.poll()
                    await trio.sleep_until(next_poll)
        finally:
            self._nursery = None

    async def poll(self) -> None:
        """Ask every node once; all at once, each with its deadline."""
        async with trio.open_nursery() as nursery:
            for provider in list(self._providers.values()):
                nursery.start_soon(self._poll_one, provider)

    async def _poll_one(self, provider: _Provider) -> None:
        provider.asked_at = trio.current_time()
        try:
            told = await provider.reference.call("get_stats", timeout_s=POLL_TIMEOUT_S)
        except PeerError as error:
            log.info("node %s (%s): %s", provider.tub_id[:8], provider.nickname, error)
            if provider.reference.is_lost and self._providers.get(provider.tub_id) is provider:
                del self._providers[provider.tub_id]
            return
        poll = Poll(time.time(), provider.tub_id, provider.nickname, *checked(told))
        try:
            await trio.to_thread.run_sync(self._history.add, poll, limiter=self._writer)
        except sqlite3.Error as error:
            log.error("statistics cannot be kept: %s", error)


def checked(told: dict[bytes, dict[bytes, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers of an answer, with proper names; what is none is left out, and what is too much."""
    found = []
    for kind in (b"counters", b"stats"):
        numbers: dict[str, float] = {}
        for name, value in list(told.get(kind, {}).items())[:NUMBERS_MAX]:
            proper = len(name) <= NAME_BYTES_MAX and name.isascii() and name.decode("ascii").isprintable()
            if proper and type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e18:
                numbers[name.decode("ascii")] = value
        found.append(numbers)
    return found[0], found[1]


@contextmanager
def _reading(directory: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{directory / DATABASE}?mode=ro", uri=True, timeout=READ_TIMEOUT_S)) as database:
        yield database


def _from_row(row: tuple[float, str, str, str]) -> Poll:
    at, tub_id, nickname, text = row
    told = json.loads(text)
    return Poll(at, tub_id, nickname, told["counters"], told["stats"])


def last_polls(directory: Path, *, before: float | None = None) -> list[Poll]:
    """The newest poll of each node, or the newest that is older than `before`. Raises sqlite3.Error."""
    with _reading(directory) as database:
        rows = database.execute(
            "SELECT at, tub_id, nickname, stats FROM polls WHERE id IN "
            "(SELECT max(id) FROM polls WHERE at < ? GROUP BY tub_id) ORDER BY nickname, tub_id",
            (math.inf if before is None else before,),
        )
        return [_from_row(row) for row in rows]


def polls_since(directory: Path, since: float, *, most: int) -> list[Poll]:
    """All nodes' polls since then, oldest first, the newest `most` of them. Raises sqlite3.Error."""
    with _reading(directory) as database:
        rows = database.execute(
            "SELECT at, tub_id, nickname, stats FROM polls WHERE at >= ? ORDER BY id DESC LIMIT ?", (since, most)
        ).fetchall()
    return [_from_row(row) for row in reversed(rows)]
