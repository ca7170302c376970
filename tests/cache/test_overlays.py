"""Sealed files laid over each other: they show what they should, are few, and little is moved for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.contents import LAYERS_MAX, WritableContents
from cache.convergence import RunningHash
from cache.layers import Contents, Layers
from cache.sealed import SealedFile
from cache.spool import Spool, SpoolFile, SpoolFullError
from grid.errors import NotEnoughSharesError
from tests.cache.test_contents import ENCODING, Base, Step, do, expected_key, open_spool, steps, upload

LARGE = 1 << 30


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[bytes read from spool files, bytes written to them] since the test began."""
    counts = [0, 0]
    read, put = SpoolFile.read, SpoolFile.put

    def counted_read(self: SpoolFile, offset: int, length: int) -> bytes:
        counts[0] += length
        return read(self, offset, length)

    def counted_put(self: SpoolFile, offset: int, data: bytes | memoryview) -> int:
        counts[1] += len(data)
        return put(self, offset, data)

    monkeypatch.setattr(SpoolFile, "read", counted_read)
    monkeypatch.setattr(SpoolFile, "put", counted_put)
    return counts


def sealed_sparse(spool: Spool, size: int) -> SealedFile:
    """So many unsent bytes, whatever they are."""
    file = spool.create()
    os.truncate(file._path, size)
    file.spans.add(0, size)
    file.account(size)
    file.shut()
    running = RunningHash(ENCODING)
    running.spoil()
    return SealedFile(Layers(file, size, None, 0), ENCODING, running)


@settings(max_examples=150)
@given(st.lists(steps, min_size=1, max_size=7), st.none() | st.binary(max_size=300), st.booleans(), st.booleans())
def test_generations(
    state_dir: Path, generations: list[list[Step]], on_grid: bytes | None, fill: bool, room: bool
) -> None:
    """Each is written over the one before, which may be read all the time; merged or, without room, not."""

    async def run() -> None:
        spool = open_spool(state_dir)
        base: Contents | None = None if on_grid is None else Base(on_grid)
        model = bytearray(on_grid or b"")
        read: list[tuple[bytes, Contents]] = []
        for number, todo in enumerate(generations):
            contents = WritableContents(spool, ENCODING, 1, base)
            for step in todo:
                await do(contents, model, step)
            if not room:
                spool.limit_bytes = spool.used_bytes
            sealed = await contents.seal(complete=fill and number == 0 and room)
            spool.limit_bytes = 1 << 30
            base = sealed.open()
            read.append((bytes(model), sealed.open()))
            if number < len(generations) - 1:
                sealed.release()
        for expected, reader in read:
            assert await reader.read(0, len(expected) + 9) == expected
        key, data = await upload(sealed, spool, fill=fill)
        assert data == model and key == expected_key(data)
        if sealed.complete:
            assert sealed.read_now() == model
        for expected, reader in read:
            assert await reader.read(0, len(expected) + 9) == expected
            reader.close()
        sealed.release()
        assert base is not None
        base.close()
        assert spool.used_bytes == 0 and not os.listdir(state_dir)

    trio.run(run)


@pytest.mark.parametrize("scattered", [False, True])
async def test_a_thousand_changes_move_what_was_changed(state_dir: Path, moved: list[int], scattered: bool) -> None:
    """A program writes 100 bytes and calls fsync, over and over, in a file of 1 GiB that is not sent yet."""
    spool = open_spool(state_dir, limit=2 * LARGE)
    sealed = sealed_sparse(spool, LARGE)
    deepest = 0
    expected: dict[int, bytes] = {}
    for number in range(1000):
        contents = WritableContents(spool, ENCODING, 1, sealed.open())
        sealed.release()
        offset = number * 7919 * 4096 % (LARGE - 4096) if scattered else 5000 + 100 * number
        expected[offset] = b"%04d" % number * 25
        await contents.write(offset, expected[offset])
        sealed = await contents.seal()
        deepest = max(deepest, sealed.depth)
    assert deepest <= 6
    assert moved[0] < 10 << 20 and moved[1] < 10 << 20
    assert spool.used_bytes < LARGE + (1 << 20)
    reader = sealed.open()
    for offset, data in expected.items():
        assert await reader.read(offset, 100) == data
    reader.close()
    sealed.release()
    assert spool.used_bytes == 0


async def test_a_file_that_grows_to_many_times_its_size(state_dir: Path, moved: list[int]) -> None:
    """A log: each byte is copied a few times at most, however often it is stored."""
    spool = open_spool(state_dir)
    base: Contents | None = None
    line = b"l" * 10_000
    for _ in range(1000):
        contents = WritableContents(spool, ENCODING, 1, base)
        await contents.write(contents.size, line)
        sealed = await contents.seal()
        base = sealed.open()
        sealed.release()
    assert base is not None and await base.read(0, 20_000_000) == line * 1000
    assert moved[1] < 10 * len(line) * 1000
    base.close()
    assert spool.used_bytes == 0


async def test_merged_while_it_is_filled(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its upload fetches what it lacks, and it stands by itself from then on: in the middle of its being copied."""
    spool = open_spool(state_dir)
    data = bytes(range(1, 256)) * 30_000
    contents = WritableContents(spool, ENCODING, 1, Base(data))
    await contents.write(1 << 20, b"b" * (3 << 20))
    first = await contents.seal()
    contents = WritableContents(spool, ENCODING, 1, first.open())
    await contents.write(2 << 20, b"c" * (2 << 20))
    room, filled = spool.room, trio.Event()

    async def busy(size: int, wait_s: float) -> None:
        await room(size, wait_s)
        if wait_s == 0:  # it is the copying that asks
            await filled.wait()

    monkeypatch.setattr(spool, "room", busy)
    async with trio.open_nursery() as nursery:
        done: list[SealedFile] = []
        nursery.start_soon(seal, contents, done)
        await trio.testing.wait_all_tasks_blocked()
        assert not done
        await first.fill(spool, 1)
        filled.set()
    first.release()
    reader = done[0].open()
    assert await reader.read(0, len(data)) == data[: 1 << 20] + b"b" * (1 << 20) + b"c" * (2 << 20) + data[4 << 20 :]
    assert done[0].depth == 1
    reader.close()
    done[0].release()
    assert spool.used_bytes == 0


async def seal(contents: WritableContents, done: list[SealedFile]) -> None:
    done.append(await contents.seal())


async def test_what_is_hidden_goes(state_dir: Path) -> None:
    spool = open_spool(state_dir)
    sealed = sealed_sparse(spool, 1 << 20)
    contents = WritableContents(spool, ENCODING, 1, sealed.open())
    sealed.release()
    await contents.write(0, bytes(1 << 20))
    sealed = await contents.seal()
    assert sealed.depth == 1 and spool.used_bytes == 1 << 20
    contents = WritableContents(spool, ENCODING, 1, sealed.open(), keep=100)
    sealed.release()
    sealed = await contents.seal()
    assert sealed.depth == 1 and spool.used_bytes == 100
    sealed.release()


async def test_without_room_they_pile_up_for_a_while(state_dir: Path) -> None:
    """What was written can be sealed all the same, until reading would take too long."""
    spool = open_spool(state_dir)
    contents = WritableContents(spool, ENCODING, 0)
    await contents.write(0, b"first")
    sealed = await contents.seal()
    with pytest.raises(SpoolFullError):
        for number in range(LAYERS_MAX + 1):
            contents = WritableContents(spool, ENCODING, 0, sealed.open())
            sealed.release()
            await contents.write(10 * number, b"x")
            spool.limit_bytes = spool.used_bytes
            sealed = await contents.seal()
            spool.limit_bytes = 1 << 30
    assert sealed.depth == LAYERS_MAX
    spool.limit_bytes = 1 << 30
    sealed = await contents.seal()
    assert sealed.depth == 1 and sealed.size == 10 * (LAYERS_MAX - 1) + 1
    sealed.release()
    assert spool.used_bytes == 0


async def test_reading_goes_on_while_it_is_filled(state_dir: Path) -> None:
    """And what was fetched before it failed is not fetched again."""
    spool = open_spool(state_dir)
    data = bytes(range(256)) * (20 << 10)  # five chunks
    base = Base(data)
    contents = WritableContents(spool, ENCODING, 1, base)
    await contents.write(1 << 20, b"changed")
    sealed = await contents.seal()
    expected = data[: 1 << 20] + b"changed" + data[(1 << 20) + 7 :]
    reader = sealed.open()
    fetched: list[int] = []

    def told(count: int) -> None:
        fetched.append(count)
        base.broken = len(fetched) == 2

    with pytest.raises(NotEnoughSharesError):
        await sealed.fill(spool, 1, told)
    base.broken = False
    assert not sealed.complete and sealed.lacking().total == len(data) - 7 - sum(fetched)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sealed.fill, spool, 1, told)
        while not sealed.complete:
            assert await reader.read(len(data) - 5, 5) == data[-5:]
    assert sum(fetched) == len(data) - 7 and base.closed
    assert await reader.read(0, len(data)) == expected == await reader.read(0, sealed.size)
    reader.close()
    sealed.release()
    assert spool.used_bytes == 0
