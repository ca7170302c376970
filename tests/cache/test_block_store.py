"""The block store on disk: whatever happens to it, a block that comes back is the block that was put."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import block_store
from cache.block_index import SLOTS_MIN
from cache.block_packs import HEADER, list_packs
from cache.block_store import FORMAT, PACK_BYTES_MIN, BlockStore
from tests.cache.kept_blocks import LIMIT, NUMBERS, SECRET, block, is_right, key, put

SOAK = os.environ.get("TAHOEFS_SOAK") == "1"
KILLS = 200 if SOAK else 12


def packs(path: Path) -> list[Path]:
    return sorted((path / FORMAT).glob("*.pack"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    opened = BlockStore.open(tmp_path, LIMIT)
    yield opened
    opened.close()


def test_what_was_put_is_there_also_after_a_restart(tmp_path: Path) -> None:
    for first in (0, 20, 40):  # each process goes on with the pack of the one before
        store = BlockStore.open(tmp_path, LIMIT)
        assert all(put(store, number) for number in range(first, first + 20))
        assert all(is_right(store, number) for number in range(first + 20))
        assert not is_right(store, first + 20)
        store.close()
    assert sum(path.stat().st_size for path in packs(tmp_path)) < LIMIT
    store = BlockStore.open(tmp_path / "by one process", LIMIT)
    assert all(put(store, number) for number in range(60))
    store.close()
    assert len(packs(tmp_path)) == len(packs(tmp_path / "by one process")) > 3


def test_only_who_may_read_the_file_is_believed(store: BlockStore) -> None:
    store.put(key(1), b"another's" + bytes(23), 1001, block(1))
    assert store.get(key(1), SECRET) is None


def test_it_may_be_read_into_a_buffer(store: BlockStore) -> None:
    put(store, 1, 300)
    buffer = bytearray(b"x" * 400)
    record = store.get(key(1), SECRET, memoryview(buffer))
    assert record is not None and bytes(record.payload) == block(1, 300) == buffer[:300]
    assert buffer[300:] == b"x" * 100
    assert store.get(key(1), SECRET, memoryview(buffer)[:299]) is None, "it does not fit"
    assert store.has(key(1)) and not store.has(key(2))


def test_the_last_put_counts(store: BlockStore) -> None:
    for text in (b"old", b"new"):
        store.put(key(1), SECRET, 5, text)
    record = store.get(key(1), SECRET)
    assert record is not None and bytes(record.payload) == b"new"


def test_nobody_else_may_look(tmp_path: Path, store: BlockStore) -> None:
    put(store, 1)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_another_version_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blocks-0").mkdir()
    (tmp_path / "blocks-0" / "data").write_bytes(b"old")
    (tmp_path / "other").mkdir()
    with caplog.at_level("INFO"):
        BlockStore.open(tmp_path, LIMIT).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [FORMAT, "other"]
    assert "blocks-0" in caplog.text


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "get", "reopen"]), st.integers(0, 60)), max_size=80))
def test_within_its_bound_whatever_comes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    limit = 12 * PACK_BYTES_MIN
    store = BlockStore.open(folder, limit)
    for step, number in steps:
        match step:
            case "put":
                assert put(store, number) and is_right(store, number)
            case "get":
                is_right(store, number)
            case "reopen":
                store.close()
                store = BlockStore.open(folder, limit)
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= limit
    store.close()
    shutil.rmtree(folder)


def test_a_working_set_far_over_the_bound(tmp_path: Path) -> None:
    """A cache of 64 MiB and a working set of 1 GiB."""
    limit, size = 64 << 20, 256 << 10
    count = (1 << 30) // size
    with closing(BlockStore.open(tmp_path, limit)) as store:
        for number in range(count):
            assert put(store, number, size)
            if number % 16 == 0:
                is_right(store, random.Random(number).randrange(number + 1), size)
                assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= limit
        kept = [number for number in range(count) if is_right(store, number, size)]
    assert len(kept) * size > limit * 0.6 and kept[-1] == count - 1


def test_what_is_read_again_and_again_stays(store: BlockStore) -> None:
    size = 16 << 10
    put(store, 0, size)
    for number in range(1, 8 * LIMIT // size):
        put(store, number, size)
        if number % 50 == 0:
            assert is_right(store, 0, size), number
    assert not is_right(store, 1, size)


def test_blocks_too_large_for_it_are_left_out(store: BlockStore) -> None:
    assert not store.put(key(1), SECRET, 1, bytes(LIMIT // 4))
    assert store.put(key(1), SECRET, 1, bytes(store.record_bytes_max))


def test_room_is_left_on_the_disk(store: BlockStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        put(store, number, 20_000)
    free = store._free_bytes()
    monkeypatch.setattr(block_store, "FREE_BYTES_MIN", free - 1000)
    used = store.used_bytes
    assert not put(store, 101, 20_000) or store.used_bytes < used  # what we have gives way, or nothing is taken
    monkeypatch.setattr(block_store, "FREE_BYTES_MIN", free * 2)
    assert not put(store, 102, 20_000)
    assert len(list_packs(store._path)) == 1 and store.used_bytes <= LIMIT // block_store.PACKS


def test_a_flipped_bit_is_a_miss(tmp_path: Path, store: BlockStore) -> None:
    put(store, 1, 300)
    (pack,) = packs(tmp_path)
    data = pack.read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        pack.write_bytes(flipped)
        assert not is_right(store, 1, 300), f"byte {place}"
    pack.write_bytes(data)
    assert is_right(store, 1, 300)
    for length in range(0, len(data), 7):
        pack.write_bytes(data[:length])
        assert not is_right(store, 1, 300)


def test_damage_anywhere_costs_only_what_was_damaged(tmp_path: Path) -> None:
    source = random.Random(5)
    store = BlockStore.open(tmp_path, LIMIT)
    for number in range(100):
        put(store, number)
    store.close()
    for _ in range(30):
        victim = source.choice([*packs(tmp_path), tmp_path / FORMAT / "index"])
        with victim.open("r+b") as file:
            file.seek(source.randrange(max(1, victim.stat().st_size)))
            file.write(source.randbytes(source.choice((1, 16, 5000))))
        if source.random() < 0.2:
            os.truncate(victim, source.randrange(victim.stat().st_size))
        store = BlockStore.open(tmp_path, LIMIT)
        for number in source.sample(range(100), 60):
            if not is_right(store, number):
                assert put(store, number) and is_right(store, number)
        store.close()


def test_the_index_is_built_anew_from_the_packs(tmp_path: Path) -> None:
    store = BlockStore.open(tmp_path, LIMIT)
    for number in range(80):
        put(store, number)
    store.close()
    for limit in (LIMIT, 4 * LIMIT, LIMIT):  # lost; then too small for a larger cache; then larger than needed
        if limit == LIMIT:
            (tmp_path / FORMAT / "index").unlink(missing_ok=True)
        store = BlockStore.open(tmp_path, limit)
        assert all(is_right(store, number) for number in range(80))
        assert store._index.slots >= max(SLOTS_MIN, limit // block_store.RECORD_BYTES_USUAL)
        store.close()


def test_the_cache_may_be_removed_while_it_is_in_use(tmp_path: Path, store: BlockStore) -> None:
    for _ in range(3):
        for number in range(50):
            assert put(store, number) and is_right(store, number)
        shutil.rmtree(tmp_path / FORMAT)
        assert not any(is_right(store, number) for number in range(50))
    put(store, 1)
    another = BlockStore.open(tmp_path, LIMIT)
    assert is_right(another, 1)
    another.close()


def test_two_share_it(tmp_path: Path, store: BlockStore) -> None:
    other = BlockStore.open(tmp_path, LIMIT)
    for number in range(0, 60, 2):
        put(store, number)
        put(other, number + 1)
    assert all(is_right(each, number) for each in (store, other) for number in range(60))
    assert len(packs(tmp_path)) >= 2  # each has its own
    other.close()


def test_many_threads_at_once(store: BlockStore) -> None:
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        source = random.Random(seed)
        try:
            for _ in range(150):
                number = source.randrange(200)
                if not is_right(store, number):
                    put(store, number)
        except BaseException as error:  # noqa: BLE001  shown by the test
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """Two processes at a time, each killed in the middle of it, again and again."""
    source = random.Random(11)
    for round_number in range(KILLS // 2):
        writers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.cache.kept_blocks", tmp_path, str(source.randrange(NUMBERS))],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"go\n"
        before = _written(tmp_path)
        while _written(tmp_path) == before:  # it is at it
            assert all(writer.poll() is None for writer in writers)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            _, complaint = writer.communicate()
            assert b"Error" not in complaint
        store = BlockStore.open(tmp_path, LIMIT)
        there = sum(is_right(store, number) for number in range(NUMBERS))
        assert there > min(round_number, 1)
        store.close()
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= LIMIT


def _written(folder: Path) -> tuple[tuple[int, int], ...]:
    return tuple(list_packs(folder / FORMAT).items())


def test_a_torn_record_at_the_end_is_cut_off(tmp_path: Path) -> None:
    store = BlockStore.open(tmp_path, LIMIT)
    put(store, 1, 5000)
    put(store, 2, 5000)
    store.close()
    (pack,) = packs(tmp_path)
    for cut in (1, 3000, 5000 + HEADER.size - 1):
        whole = pack.read_bytes()
        pack.write_bytes(whole[: len(whole) - cut])
        store = BlockStore.open(tmp_path, LIMIT)
        assert is_right(store, 1, 5000) and not is_right(store, 2, 5000)
        assert put(store, 2, 5000) and is_right(store, 2, 5000)
        store.close()
        assert pack.stat().st_size == len(whole)
