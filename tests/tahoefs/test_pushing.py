"""Pages pushed ahead of readers: the same bytes as requests give, not too far ahead, and never while a file may change.

Without a kernel, whose page cache a dictionary stands for; `test_pushed_pages.py` has a mount.
"""

from __future__ import annotations

import random
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from attrs import define, field
from hypothesis import given, settings
from hypothesis import strategies as st

from tahoefs import pushing
from tahoefs.inodes import Inode
from tahoefs.open_files import OpenFile
from tahoefs.pushing import PAGE_BYTES, SEQUENTIAL_BYTES, PagePusher
from tahoefs.targets import Kind
from tests.tahoefs.memory_workspace import MemoryWorkspace

REQUEST_BYTES = 128 << 10
NUMBER = 7


@define(eq=False, repr=False)
class LocalFile:
    """Contents all of which are on the local disk, but for the segments in `missing`."""

    data: bytes
    segment_size: int
    missing: set[int] = field(factory=set)
    served: int = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def note_served(self, count: int) -> None:
        self.served += count

    def has(self, number: int) -> bool:
        return number not in self.missing

    def read_into(self, number: int, buffer: memoryview) -> int:
        if number in self.missing:
            return 0
        piece = self.data[number * self.segment_size :][: self.segment_size]
        buffer[: len(piece)] = piece
        return len(piece)

    def local(self) -> LocalFile:
        return self

    async def read(self, offset: int, length: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.data[offset : offset + length]

    def close(self) -> None:
        pass


@define(eq=False, repr=False)
class Kernel:
    """A page cache, and what reads through it. Pages that were pushed and asked for are counted apart."""

    pusher: PagePusher
    opened: OpenFile
    contents: LocalFile
    pages: dict[int, bytes] = field(factory=dict)
    gate: threading.Event = field(factory=threading.Event)  # while clear, pages are not taken
    counting: threading.Lock = field(factory=threading.Lock)
    held: int = 0  # threads that store pages
    pushed: int = 0  # bytes
    requests: int = 0

    def store(self, number: int, offset: int, data: memoryview) -> None:
        assert number == NUMBER and offset % PAGE_BYTES == 0
        assert len(data) % PAGE_BYTES == 0 or offset + len(data) == self.contents.size
        with self.counting:
            self.held += 1
        self.gate.wait()
        with self.counting:
            self.held -= 1
            self.pushed += len(data)
        for start in range(0, len(data), PAGE_BYTES):
            self.pages[offset + start] = bytes(data[start : start + PAGE_BYTES])

    async def read(self, offset: int, length: int) -> bytes:
        """As a program would: what is not here is asked for, in requests as the kernel makes them."""
        stop = min(offset + length, self.contents.size)
        first = position = offset // PAGE_BYTES * PAGE_BYTES
        while position < stop:
            if position not in self.pages:
                end = position + PAGE_BYTES
                while end < stop and end not in self.pages and end - position < REQUEST_BYTES:
                    end += PAGE_BYTES
                answer = await self.request(position, end - position)
                for start in range(0, len(answer), PAGE_BYTES):
                    self.pages[position + start] = answer[start : start + PAGE_BYTES]
            position += PAGE_BYTES
        return b"".join(self.pages[at] for at in range(first, stop, PAGE_BYTES))[offset - first : stop - first]

    async def request(self, offset: int, length: int) -> bytes:
        self.requests += 1
        if (page := await self.pusher.page(self.opened, offset, length)) is not None:
            return page
        answer = await self.opened.read(offset, length)
        await self.pusher.note(self.opened, offset, len(answer))
        return answer


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other things must not look like a thread that is held up."""
    monkeypatch.setattr(pushing, "GATE_TIMEOUT_S", 60.0)


@asynccontextmanager
async def reading(contents: LocalFile) -> AsyncIterator[Kernel]:
    """An open file with these contents, read through a kernel of ours."""

    def let_go(inode: Inode, opened: OpenFile) -> None:
        opened.handles -= 1
        pusher.left(opened)

    pusher = PagePusher(let_go)
    opened = OpenFile(Inode(NUMBER, Kind.FILE, None, {}), MemoryWorkspace(), handles=1, reader=contents)
    kernel = Kernel(pusher, opened, contents)
    kernel.gate.set()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pusher.run, kernel.store)
        await trio.testing.wait_all_tasks_blocked()
        try:
            yield kernel
        finally:
            kernel.gate.set()
            let_go(opened.inode, opened)
            nursery.cancel_scope.cancel()
    assert opened.handles == 0, "a push still holds the file"


@settings(max_examples=40, deadline=None)
@given(
    st.integers(64 << 10, 1 << 20),
    st.integers(1, 8 << 20),
    st.integers(4096, 2 << 20),
    st.sets(st.integers(0, 80), max_size=2),
)
def test_what_is_pushed_is_what_is_read(segment_size: int, size: int, step: int, missing: set[int]) -> None:
    data = random.Random(size).randbytes(size)

    async def read_through() -> None:
        async with reading(LocalFile(data, segment_size, missing)) as kernel:
            for offset in range(0, size, step):
                assert await kernel.read(offset, step) == data[offset : offset + step]
            await kernel.pusher.quiet(kernel.opened)
            for offset, page in kernel.pages.items():
                assert page == data[offset : offset + PAGE_BYTES], offset

    trio.run(read_through)


@pytest.mark.parametrize("segment_size", [1 << 20, (1 << 20) + 2, 128 << 10])
async def test_most_of_a_file_read_on_and_on_is_not_asked_for(segment_size: int) -> None:
    size = 16 << 20
    contents = LocalFile(random.Random(1).randbytes(size), segment_size)
    async with reading(contents) as kernel:
        for offset in range(0, size, 1 << 20):
            assert await kernel.read(offset, 1 << 20) == contents.data[offset : offset + (1 << 20)]
        assert kernel.requests < 20, "each MiB would be eight"
        assert kernel.pushed > 15 << 20
        assert contents.served * segment_size > 15 << 20


async def test_no_further_ahead_than_the_bound() -> None:
    contents = LocalFile(bytes(40 << 20), 1 << 20)
    ahead = (pushing.AHEAD_STRETCHES + 1) * pushing.STRETCH_BYTES_MAX
    async with reading(contents) as kernel:
        for offset in range(0, 9 << 20, 64 << 10):
            await kernel.read(offset, 64 << 10)
            await trio.testing.wait_all_tasks_blocked()
            assert max(kernel.pages) < offset + ahead
        asked = kernel.requests
        await until(lambda: max(kernel.pages) > offset + ahead // 2)
        assert kernel.requests == asked, "all of that was pushed"


async def test_a_reader_that_stops_early_costs_little() -> None:
    contents = LocalFile(bytes(40 << 20), 1 << 20)
    async with reading(contents) as kernel:
        for offset in range(0, SEQUENTIAL_BYTES, REQUEST_BYTES):
            await kernel.read(offset, REQUEST_BYTES)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < kernel.pushed <= 2 << 20


async def test_reads_here_and_there_push_nothing() -> None:
    source = random.Random(3)
    contents = LocalFile(source.randbytes(32 << 20), 1 << 20)
    async with reading(contents) as kernel:
        for number in range(200):
            offset = number % 2 * (17 << 20) + source.randrange(15 << 20)
            length = source.randrange(1, SEQUENTIAL_BYTES - PAGE_BYTES)
            kernel.pages.clear()
            assert await kernel.read(offset, length) == contents.data[offset : offset + length]
        assert kernel.pushed == 0


async def test_a_file_that_is_being_fetched_is_left_alone() -> None:
    """Its beginning is on the disk already: where that ends each push would, and read-ahead would begin anew."""
    contents = LocalFile(bytes(48 << 20), 1 << 20, missing=set(range(20, 48)))
    async with reading(contents) as kernel:
        for offset in range(0, 18 << 20, REQUEST_BYTES):
            await kernel.read(offset, REQUEST_BYTES)
        assert kernel.pushed == 0


async def test_who_changes_a_file_waits_until_nothing_is_pushed() -> None:
    contents = LocalFile(bytes(16 << 20), 1 << 20)
    async with reading(contents) as kernel, trio.open_nursery() as nursery:
        kernel.gate.clear()  # as a page that the kernel has locked
        quiet = trio.Event()

        async def change() -> None:
            kernel.opened.writers += 1
            await kernel.pusher.quiet(kernel.opened)
            quiet.set()

        nursery.start_soon(kernel.read, 0, 1 << 20)  # waits for threads, which wait for the kernel
        await until(lambda: kernel.held == pushing.LANES)
        nursery.start_soon(change)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not quiet.is_set()
        await kernel.read(1 << 20, REQUEST_BYTES)  # what the thread may wait for is answered
        kernel.gate.set()
        await quiet.wait()
        before = kernel.pushed
        contents.data = bytes([1]) * contents.size
        kernel.pages.clear()
        for offset in range(0, contents.size, REQUEST_BYTES):
            assert set(await kernel.read(offset, REQUEST_BYTES)) == {1}, "a gate kept what was there before"
        assert kernel.pushed == before, "somebody may write"
        kernel.opened.writers -= 1
        kernel.pages.clear()
        for offset in range(0, contents.size, REQUEST_BYTES):
            assert set(await kernel.read(offset, REQUEST_BYTES)) == {1}
        assert kernel.pushed > before


async def test_more_files_than_the_bound_are_read_by_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "FILES_MAX", 1)
    contents = LocalFile(bytes(16 << 20), 1 << 20)
    other = OpenFile(Inode(NUMBER + 1, Kind.FILE, None, {}), MemoryWorkspace(), handles=1, reader=contents)

    async with reading(contents) as kernel:
        for offset in range(0, 1 << 20, REQUEST_BYTES):
            await kernel.read(offset, REQUEST_BYTES)
            await kernel.pusher.note(other, offset, REQUEST_BYTES)
        assert list(kernel.pusher._pushing) == [kernel.opened]
        monkeypatch.setattr(pushing, "RESTING_S", -1.0)
        await kernel.pusher.note(other, 1 << 20, REQUEST_BYTES)
        await until(lambda: kernel.opened not in kernel.pusher._pushing)
        assert await kernel.read(1 << 20, 4 << 20) == bytes(4 << 20)


async def test_at_the_end_no_thread_is_left_at_it() -> None:
    contents = LocalFile(bytes(16 << 20), 1 << 20)
    async with reading(contents) as kernel, trio.open_nursery() as nursery:
        kernel.gate.clear()
        nursery.start_soon(kernel.read, 0, 1 << 20)
        await until(lambda: kernel.held == pushing.LANES)
        nursery.cancel_scope.cancel()
    assert kernel.held == 0


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110  what is waited for happens in threads
            await trio.sleep(0.001)
