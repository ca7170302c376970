"""The pin store on disk: what is wanted stays, whatever else comes; what no longer is becomes ordinary cache."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.block_packs import list_packs
from cache.block_store import PACKS, BlockStore
from cache.disk_tier import DiskTier
from cache.pin_store import FORMAT, SHARE, Item, PinsFullError, PinStore
from tests.cache.kept_blocks import LIMIT, SECRET, block, is_right, key, put

SOAK = os.environ.get("TAHOEFS_SOAK") == "1"
KILLS = 100 if SOAK else 4
SIZE = 30_000


class Both:
    """Both stores of a cache, as every process has them."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        tier = DiskTier.open(path, limit)
        self.pins: PinStore = tier.pins
        self.blocks: BlockStore = tier._store
        self.close = tier.close

    def bytes_on_disk(self, path: Path) -> int:
        return sum(file.stat().st_size for file in path.rglob("*.pack"))

    def pin(self, *numbers: int, owner: str = "one", epoch: int = 1) -> None:
        self.pins.put(owner, epoch, [item(number) for number in numbers])

    def held(self, *numbers: int) -> list[bool]:
        return [is_pinned(self.pins, number) for number in numbers]


def item(number: int) -> Item:
    return Item(key(number), SECRET, 1000 + number, block(number, SIZE))


def is_pinned(pins: PinStore, number: int) -> bool:
    """Fails when something else is there."""
    assert pins.has(key(number)) or pins.get(key(number), SECRET) is None
    record = pins.get(key(number), SECRET)
    if record is None:
        return False
    buffer = bytearray(SIZE + 1)
    again = pins.get(key(number), SECRET, memoryview(buffer))
    assert again is not None and again.payload == record.payload == buffer[:SIZE]
    assert pins.get(key(number), SECRET, memoryview(bytearray(SIZE - 1))) is None
    assert (record.segment_size, bytes(record.payload)) == (1000 + number, block(number, SIZE))
    return True


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    opened = Both(tmp_path)
    yield opened
    opened.close()


def test_nothing_is_made_before_something_is_pinned(tmp_path: Path, both: Both) -> None:
    assert not both.held(1)[0] and both.pins.mark("one", 1, [key(1)]) == [False]
    assert not (tmp_path / FORMAT).exists()
    both.pin(1)
    assert both.held(1) == [True]
    for path in (tmp_path / FORMAT).rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / FORMAT).stat().st_mode) == 0o700


def test_pressure_evicts_what_is_not_pinned_and_nothing_else(tmp_path: Path, both: Both) -> None:
    both.pin(*range(50))
    for number in range(1000, 1000 + 3 * LIMIT // SIZE):
        assert put(both.blocks, number, SIZE)
        assert both.bytes_on_disk(tmp_path) <= LIMIT
    assert both.held(*range(50)) == [True] * 50
    assert not is_right(both.blocks, 1000, SIZE)
    assert is_right(both.blocks, 999 + 3 * LIMIT // SIZE, SIZE)


def test_what_does_not_fit_is_refused_and_the_bound_holds(tmp_path: Path, both: Both) -> None:
    for number in range(2000, 2200):
        put(both.blocks, number, SIZE)
    done = 0
    with pytest.raises(PinsFullError):
        for done in range(10_000):
            both.pin(done)
    assert 0.6 * LIMIT < done * SIZE <= SHARE * LIMIT == both.pins.limit_bytes
    assert both.held(*range(done)) == [True] * done
    assert both.bytes_on_disk(tmp_path) <= LIMIT
    assert both.pins.room_bytes() < LIMIT // PACKS
    assert put(both.blocks, 5, SIZE) and is_right(both.blocks, 5, SIZE)  # the rest is there for what is read


def test_a_sweep_gives_what_nobody_wants_to_the_block_store(tmp_path: Path, both: Both) -> None:
    both.pin(*range(20))
    both.pin(*range(20, 40), owner="two")
    epoch = both.pins.begin_epoch("one")
    assert epoch > 0
    wanted = [3, 17]
    assert both.pins.mark("one", epoch + 1, [key(n) for n in [*wanted, 30, 99]]) == [True, True, True, False]
    both.pins.sweep("one", epoch + 1)
    assert both.held(*wanted, *range(20, 40)) == [True] * 22
    gone = [number for number in range(20) if not both.held(number)[0]]
    assert len(gone) > 10  # but for a last pack with little garbage in
    assert all(is_right(both.blocks, number, SIZE) for number in gone)
    both.pins.sweep("two", 2)  # still wanted by the other
    assert both.held(*wanted, 30) == [True, True, True]
    assert both.bytes_on_disk(tmp_path) <= LIMIT
    both.pins.sweep("one", epoch + 2)
    assert not list_packs(tmp_path / FORMAT)
    assert all(is_right(both.blocks, number, SIZE) for number in range(40))


def test_what_changes_is_replaced_where_it_is(both: Both) -> None:
    new = Item(key(1), SECRET, 7, b"new")
    assert not both.pins.replace(new)
    both.pin(1, 2)
    assert both.pins.replace(new)
    record = both.pins.get(key(1), SECRET)
    assert record is not None and (record.segment_size, bytes(record.payload)) == (7, b"new")
    before = both.pins.used_bytes()
    assert both.pins.replace(new) and both.pins.used_bytes() == before  # the same again costs nothing
    both.pins.mark("one", 2, [key(2)])
    both.pins.sweep("one", 2)
    assert not both.pins.replace(Item(key(1), SECRET, 8, b"newer"))  # no longer wanted: the block store's, from now on
    assert both.pins.get(key(1), SECRET) is None


def test_it_is_there_after_a_restart_and_for_other_processes(tmp_path: Path, both: Both) -> None:
    other = Both(tmp_path)
    both.pin(1)
    assert other.held(1) == [True]
    other.pin(2, owner="two")
    other.close()
    assert both.held(1, 2) == [True, True]
    assert both.pins.begin_epoch("one") < both.pins.begin_epoch("one")
    again = Both(tmp_path)
    assert again.held(1, 2) == [True, True]
    again.close()


def test_only_who_may_read_the_file_is_believed(both: Both) -> None:
    both.pins.put("one", 1, [Item(key(1), b"another's" + bytes(23), 1001, block(1, SIZE))])
    assert not both.held(1)[0]


def test_damage_is_a_miss_and_is_told(tmp_path: Path, both: Both) -> None:
    both.pin(1, 2)
    [pack] = (tmp_path / FORMAT).glob("*.pack")
    data = bytearray(pack.read_bytes())
    data[len(data) // 4] ^= 1
    pack.write_bytes(data)
    assert both.held(1, 2) == [False, True] and both.pins.damaged
    assert both.pins.mark("one", 1, [key(1), key(2)]) == [False, True]
    os.truncate(pack, SIZE)
    both.pins.begin_epoch("one")
    assert not both.pins.damaged and both.pins.mark("one", 1, [key(1), key(2)]) == [False, False]


def test_the_folder_is_removed_while_it_is_open(tmp_path: Path, both: Both) -> None:
    both.pin(1)
    shutil.rmtree(tmp_path / FORMAT)
    assert both.held(1) == [False]
    both.pins.begin_epoch("one")
    both.pin(2)
    assert both.held(1, 2) == [False, True]


def test_the_whole_cache_is_removed_while_it_is_open(tmp_path: Path, both: Both) -> None:
    """Pins need the block store to give way, which has to find its own place again for that."""
    both.pin(1)
    for each in tmp_path.iterdir():
        shutil.rmtree(each)
    both.pins.begin_epoch("one")
    both.pin(2)
    assert both.held(1, 2) == [False, True]
    assert put(both.blocks, 3) and both.blocks.get(key(3), SECRET) is not None


def test_a_damaged_index_is_made_anew(tmp_path: Path, both: Both) -> None:
    both.pin(*range(50))
    both.pins.close()
    index = tmp_path / FORMAT / "index.db"
    index.write_bytes(b"SQLite format 3\0" + b"garbage" * 1000)
    again = Both(tmp_path)
    assert again.held(1) == [False]
    again.pins.begin_epoch("one")
    again.pin(2)
    assert again.held(1, 2) == [False, True]
    again.close()


def test_kills_cost_nothing_that_was_pinned(tmp_path: Path) -> None:
    """What `put` returned for is there, whole, whenever the process was killed; and nothing wrong ever is."""
    held = 0
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.cache.pinned_blocks", str(tmp_path), str(held)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
            assert program.stdout is not None
            for line in program.stdout:
                held = int(line)
                if held % 7 == 6:
                    program.send_signal(signal.SIGKILL)
                    break
            held = max([held, *map(int, program.stdout)])
        both = Both(tmp_path, 16 * LIMIT)
        assert both.held(*range(held + 1)) == [True] * (held + 1)
        held += 1
        both.close()
    assert held >= 3 * KILLS
