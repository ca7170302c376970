"""What the store finds after a kill or a power cut, with all of its log or a part: the rows, and if any are missing."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache import journal_store
from cache.journal_store import JournalStore, open_store

KEY = b"k" * 32
FRAME_BYTES = 24 + 4096  # of SQLite's log; its header has 32


class Disk:
    """A journal that is written, and what is left of it after various accidents."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._monkeypatch = monkeypatch
        self._copies = 0
        self.boot("first")

    def boot(self, name: str) -> None:
        self._monkeypatch.setattr(journal_store, "_boot_id", lambda: name)

    def open(self, path: Path | None = None) -> JournalStore:
        return open_store(path or self.path, "name", KEY)

    def after_a_kill(self, **damage: int) -> Path:
        """As it is now. `cut`: the log ends there; `flip`: at that byte of it a bit is another."""
        self._copies += 1
        copy = self.path.with_name(f"copy {self._copies}")
        shutil.copytree(self.path, copy)
        (wal,) = copy.glob("journal/name/0/journal.db-wal")
        if "cut" in damage:
            os.truncate(wal, damage["cut"])
        if "flip" in damage:
            data = bytearray(wal.read_bytes())
            data[damage["flip"]] ^= 1
            wal.write_bytes(data)
        return copy

    @property
    def log_bytes(self) -> int:
        return next(self.path.glob("journal/name/0/journal.db-wal")).stat().st_size


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path / "state", monkeypatch)


def nothing() -> None:
    """No spool files."""


async def written(store: JournalStore, groups: int, rng: random.Random) -> None:
    for _ in range(groups):
        rows: dict[int, Any] = {rng.randrange(1, 50): {"x": "y" * rng.randrange(6000)} for _ in range(3)}
        await store.write(rows)


@pytest.mark.parametrize("seed", range(3))
async def test_a_cut_log_is_noticed(disk: Disk, seed: int) -> None:
    """Wherever it is cut: after a kill nothing written may be missing, after a power cut nothing flushed."""
    rng = random.Random(seed)
    store = disk.open()
    ends = {0: 0}  # the log's length -> groups in it
    flushed = 0
    for number in range(1, 13):
        await written(store, 1, rng)
        if rng.random() < 0.3:
            await store.flush(nothing)
            flushed = number
        ends[disk.log_bytes] = number
    cuts = range(32, disk.log_bytes + 1, FRAME_BYTES)
    for cut in {cuts[0], cuts[-1], *rng.sample(cuts, 6)}:
        groups = max(count for end, count in ends.items() if end <= cut)
        for boot, kept in (("first", 12), ("second", flushed)):
            disk.boot(boot)
            found = disk.open(disk.after_a_kill(cut=cut))
            assert found.missing == max(0, kept - groups)
            assert found.same_boot == (boot == "first") or not groups
            found.close()
    disk.boot("first")
    store.close()


async def test_damage_is_noticed(disk: Disk) -> None:
    store = disk.open()
    await written(store, 10, random.Random(1))
    whole = disk.open(disk.after_a_kill())
    rows, damaged = whole.load()
    assert whole.missing == 0 and rows and not damaged
    whole.close()
    for at in (disk.log_bytes - 1, disk.log_bytes // 2, 10):
        found = disk.open(disk.after_a_kill(flip=at))
        assert 0 < found.missing <= 10
        found.close()
    store.close()


async def test_after_a_power_cut_what_was_only_written_is_not_missed_by_a_later_process(disk: Disk) -> None:
    """The mark got to the disk, the log did not; the next process is killed before it has written anything."""
    store = disk.open()
    rng = random.Random(2)
    await written(store, 3, rng)
    await store.flush(nothing)
    end = disk.log_bytes
    await written(store, 3, rng)
    disk.boot("second")
    left = disk.after_a_kill(cut=end)
    store.close()
    disk.path = left
    for _ in range(3):
        found = disk.open()
        assert found.missing == 0 and not found.same_boot  # nothing in it has been put in order
        disk.path = disk.after_a_kill()
        found.close()
    found = disk.open()
    await written(found, 1, rng)
    disk.path = disk.after_a_kill()
    found.close()
    found = disk.open()
    assert found.missing == 0 and found.same_boot
    found.close()


async def test_it_is_said_until_the_journal_goes_on(disk: Disk) -> None:
    store = disk.open()
    rng = random.Random(3)
    await written(store, 5, rng)
    end = disk.log_bytes
    await written(store, 2, rng)
    await store.flush(nothing)
    disk.path = disk.after_a_kill(cut=end)
    store.close()
    for _ in range(2):
        found = disk.open()
        assert found.missing == 2
        disk.path = disk.after_a_kill()
        found.close()
    found = disk.open()
    await written(found, 1, rng)
    disk.path = disk.after_a_kill()
    found.close()
    found = disk.open()
    assert found.missing == 0
    found.close()


@pytest.mark.parametrize("mark", [None, b"", b"garbage", bytes(36), b"\xff" * 36])
async def test_a_mark_that_cannot_be_read_says_nothing(disk: Disk, mark: bytes | None) -> None:
    store = disk.open()
    await written(store, 5, random.Random(4))
    copy = disk.after_a_kill()
    store.close()
    path = copy / "journal" / "name" / "0" / "mark"
    path.unlink()
    if mark is not None:
        path.write_bytes(mark)
    found = disk.open(copy)
    assert found.missing == 0
    await found.write({1: {"x": 1}})
    found.close()
    found = disk.open(copy)
    assert found.missing == 0 and found.load()[0][1] == {"x": 1}
    found.close()


async def test_an_empty_journal_leaves_no_mark(disk: Disk) -> None:
    store = disk.open()
    await store.write({1: {"x": 1}})
    await store.flush(nothing)
    await store.write({1: None})
    store.close()
    assert [path.name for path in (disk.path / "journal" / "name" / "0").iterdir() if path.is_file()] == ["lock"]
