"""Pages of files pushed into the kernel's page cache ahead of their readers, so that most reads never become requests.

    file    … read by requests │ stretch 0       │ stretch 1               │ stretch 2 …
    page                       G                 G                         G              G: a gate, which is not pushed

The kernel reads in requests of at most 128 KiB, and each is a turn of the event loop. When a file is immutable, on the
local disk, and read on and on, worker threads take whole segments of it ahead of the reader and put them where the
kernel looks first. What it finds there it does not ask for, so nothing would tell how far the reader got. Hence gates:
of each stretch the first page is left out. The request for it lets the threads go on, up to AHEAD_STRETCHES beyond, and
is answered when this stretch and the next are there; so is the request with which all begins. So the reader is not let
through to where threads are at work: there it would ask for pages that are about to be stored. If it comes there all
the same, the push ends, and another begins further on.

Never stale. What is pushed is what a request would be answered with at that moment, and it is pushed only while nobody
may change the file: no handle can write, and no truncation is under way. Who begins to, first waits until no thread is
at it (`quiet`). A push holds the file open, so that the inode's number cannot come to mean another.

Never stuck. A thread that stores a page which a request waits for is held by the kernel until that is answered. So no
answer waits for a thread but those to the requests for gates and the one with which all begins, whose pages no thread
stores, and they for GATE_TIMEOUT_S at most; and when the mount ends, requests are answered until no thread is at work
(`PagePusher.run`, `tahoefs.fuse:serve`).
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio
from attrs import define

from grid import stats
from tahoefs.inodes import Inode
from tahoefs.interfaces import ILocalSegments
from tahoefs.open_files import OpenFile

log = logging.getLogger(__name__)

PAGE_BYTES: Final = mmap.PAGESIZE
SEGMENT_BYTES_MIN: Final = 64 << 10  # smaller segments are not worth it …
SEGMENT_BYTES_MAX: Final = 4 << 20  # … and larger ones would take too much memory: a thread holds one
STRETCH_BYTES_MAX: Final = 8 << 20  # between two gates
AHEAD_STRETCHES: Final = 2  # pushed, or being pushed, beyond that of the gate the reader got to
SEQUENTIAL_BYTES: Final = 512 << 10  # read on and on before anything is pushed
NEAR_BYTES: Final = 512 << 10  # how far from the expected place such a read may start
MARGIN_BYTES: Final = 256 << 10  # left to requests before the first gate: the kernel may have asked for them
FAR_BYTES: Final = 32 << 20  # that segment must be here as well: else the file is just being fetched
FILES_MAX: Final = 8  # with pushes under way; then one gives way whose reader rests
RESTING_S: Final = 2.0  # no gate was asked for
LANES: Final = 2  # threads a file
THREADS_MAX: Final = 4  # over all files
GATE_TIMEOUT_S: Final = 0.5

PUSHED_BYTES: Final = stats.counter("fuse_pushed_bytes", "Bytes put into the kernel's page cache ahead of readers.")

Store = Callable[[int, int, memoryview], object]  # inode number, offset, bytes; blocks. Raises OSError


@define(eq=False)
class _Stretch:
    """Whole segments. Its ends share a page with its neighbours', unless segments are multiples of a page."""

    gate: int  # offset of its first page, in the first segment or begun in the one before
    first: int  # segment
    stop: int
    head: bytes = b""  # its part of the gate's page
    tail: bytes = b""  # its part of the next gate's page
    pushed: int = 0  # bytes
    done: bool = False


class _Workers:
    """The threads of all pushes, and the memory they work in: kept, as fresh memory costs much of what a copy does."""

    def __init__(self) -> None:
        self.limiter = trio.CapacityLimiter(THREADS_MAX)
        self._buffers: list[bytearray] = []  # at most one for each thread

    @contextmanager
    def buffer(self, size: int) -> Iterator[memoryview]:
        """In a worker thread."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = bytearray()
        if len(buffer) < size:
            buffer = bytearray(size)
        try:
            yield memoryview(buffer)[:size]
        finally:
            self._buffers.append(buffer)

    def free(self) -> None:
        self._buffers.clear()


class Push:
    """One file's pages on their way into the kernel."""

    def __init__(
        self, local: ILocalSegments, inode_number: int, position: int, store: Store, workers: _Workers
    ) -> None:
        """`position`: the offset its reader is at."""
        self._local = local
        self._inode_number = inode_number
        self._position = position
        self._store = store
        self._workers = workers
        self._next, self._first_gate = _first_gate(position + MARGIN_BYTES, local.segment_size)
        self._stretches: dict[int, _Stretch] = {}  # by number, from 0; those long passed are forgotten
        self._gates: dict[int, int] = {}  # {offset of the page: number of its stretch}, of the same
        self._done_stop = 0  # where the reader may go: up to here nothing is missing from the first gate on
        self._made = 0  # stretches
        self._passed = -1  # the furthest gate that was asked for
        self.stopped = False
        self._moved_at = trio.current_time()  # the reader
        self._moved = trio.Event()  # something of the above changed
        self.ended = trio.Event()  # no thread is at it any more
        self.is_missing = False  # it ended because something was not on the disk

    @property
    def _count(self) -> int:
        return -(-self._local.size // self._local.segment_size)

    @property
    def rests_s(self) -> float:
        """Seconds since its reader was seen to move."""
        return trio.current_time() - self._moved_at

    @property
    def covered(self) -> range:
        """Where its reader should be, in bytes."""
        return range(self._position - NEAR_BYTES, self._next * self._local.segment_size + NEAR_BYTES)

    async def run(self) -> None:
        """Until all of it is there, something is not on the disk, or `stop`."""
        try:
            far = min(self._next + FAR_BYTES // self._local.segment_size, self._count - 1)
            if not await trio.to_thread.run_sync(self._local.has, far, limiter=self._workers.limiter):
                self.is_missing = True
                return
            async with trio.open_nursery() as nursery:
                for _ in range(LANES):
                    nursery.start_soon(self._lane)
        finally:
            self.stop()
            self.ended.set()

    def stop(self) -> None:
        """Begin nothing more; `ended` tells when what had begun is done."""
        self.stopped = True
        self._move()

    def forget(self) -> None:
        """Stop, and answer nothing more: the file is going to be another."""
        self.stop()
        self._gates.clear()
        self._stretches.clear()

    async def begun(self) -> None:
        """Wait until there is something for the reader, with whose request it begins."""
        with trio.move_on_after(GATE_TIMEOUT_S):
            await self._wait_for(1)

    def note(self, offset: int, length: int) -> None:
        """A request was answered that is not for a gate alone. Tells where the reader is, all the same."""
        for gate, number in list(self._gates.items()):
            if offset <= gate < offset + length:
                self._pass(gate, number)
        if offset + length > max(self._first_gate, self._done_stop):
            self.stop()  # it has caught up

    async def page(self, offset: int, length: int) -> bytes | None:
        """The answer to a request for a gate, when the reader may go on; None for others, or if it is not known."""
        number = self._gates.get(offset)
        if number is None or length > PAGE_BYTES:
            return None  # also a gate, with pages that were not there yet: threads may be waiting for the answer
        self._pass(offset, number)
        with trio.move_on_after(GATE_TIMEOUT_S):
            await self._wait_for(number + 1)
        before, behind = self._stretches.get(number - 1), self._stretches.get(number)
        if behind is None or not behind.done or (number and (before is None or not before.done)):
            return None
        return ((before.tail if before is not None else b"") + behind.head)[:length]

    async def _wait_for(self, number: int) -> None:
        """Until this stretch and all before are done, or nothing more will be."""
        while not (self.stopped or all(self._is_done(each) for each in range(self._passed, number + 1))):
            await self._moved.wait()

    def _is_done(self, number: int) -> bool:
        if number >= self._made:
            return self._next >= self._count  # there is none
        stretch = self._stretches.get(number)
        return stretch is None or stretch.done

    def _pass(self, gate: int, number: int) -> None:
        if number > self._passed:
            self._passed, self._position, self._moved_at = number, gate, trio.current_time()
            for passed, old in list(self._gates.items()):
                if old < number - 1:
                    del self._gates[passed], self._stretches[old]
            self._move()

    def _note_done(self) -> None:
        number = max(0, self._passed)
        while number < self._made and self._is_done(number):
            if (stretch := self._stretches.get(number)) is not None:
                self._done_stop = max(self._done_stop, stretch.stop * self._local.segment_size)
            number += 1

    def _move(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    async def _lane(self) -> None:
        while (stretch := await self._begin_stretch()) is not None:
            try:
                stretch.done = await trio.to_thread.run_sync(self._push, stretch, limiter=self._workers.limiter)
            except Exception:
                log.exception("pushing pages failed in an unforeseen way")
            if stretch.done:
                self._note_done()
                self._local.note_served(stretch.stop - stretch.first)
                PUSHED_BYTES.add(stretch.pushed)
                self._move()
            else:
                self.stop()

    async def _begin_stretch(self) -> _Stretch | None:
        """The next one, when the reader is near enough; None when there is none."""
        while self._made > self._passed + (2 if self._passed < 0 else AHEAD_STRETCHES) and not self.stopped:
            await self._moved.wait()
        if self.stopped or self._next >= self._count:
            return None
        size = self._local.segment_size
        segments = min(1 << max(0, self._made - 1), max(1, STRETCH_BYTES_MAX // size))  # 1, 1, 2, 4, …
        gate = self._first_gate if not self._made else self._next * size // PAGE_BYTES * PAGE_BYTES
        stretch = _Stretch(gate, self._next, min(self._next + segments, self._count))
        self._stretches[self._made] = stretch
        self._gates[gate] = self._made
        self._made += 1
        self._next = stretch.stop
        return stretch

    def _push(self, stretch: _Stretch) -> bool:
        """In a worker thread. False: not all of it is here, or the kernel does not take it."""
        with self._workers.buffer(PAGE_BYTES + self._local.segment_size) as buffer:
            return self._push_through(stretch, buffer)

    def _push_through(self, stretch: _Stretch, buffer: memoryview) -> bool:
        """`buffer`: for what is left of the segment before (a page), and for a segment."""
        size = self._local.segment_size
        position = stretch.gate + PAGE_BYTES  # the next page to store
        left = 0  # bytes between `position` and the segment, in the buffer before it
        for number in range(stretch.first, stretch.stop):
            count = 0 if self.stopped else self._local.read_into(number, buffer[PAGE_BYTES:])
            if not count:
                self.is_missing |= not self.stopped
                return False
            start, stop = number * size, number * size + count
            if number == stretch.first:
                stretch.head = bytes(buffer[PAGE_BYTES:][max(0, stretch.gate - start) : min(position, stop) - start])
            end = stop if stop == self._local.size else stop // PAGE_BYTES * PAGE_BYTES
            if end > position:
                try:
                    self._store(self._inode_number, position, buffer[PAGE_BYTES + position - start :][: end - position])
                except OSError as error:  # the kernel has forgotten the file, or the mount is gone
                    log.debug("pages were not stored: %s", error)
                    return False
                stretch.pushed += end - position
                position = end
            left = max(0, stop - position)
            buffer[PAGE_BYTES - left : PAGE_BYTES] = buffer[PAGE_BYTES + count - left : PAGE_BYTES + count]
        stretch.tail = bytes(buffer[PAGE_BYTES - left : PAGE_BYTES])
        return True


def _first_gate(offset: int, segment_size: int) -> tuple[int, int]:
    """The first page from `offset` on that lies in one segment as a whole: (that segment, the page's offset)."""
    number, gate = offset // segment_size, -(-offset // PAGE_BYTES) * PAGE_BYTES
    if gate + PAGE_BYTES > (number + 1) * segment_size:
        number += 1
        gate = -(-number * segment_size // PAGE_BYTES) * PAGE_BYTES
    return number, gate


@define(eq=False)
class _Reading:
    """How an open file is read."""

    expected: int = 0  # where the next read starts, if it goes on
    streak: int = 0  # bytes read on and on up to there
    cold_until: int = 0  # not everything is on the disk up to there
    push: Push | None = None


class PagePusher:
    """The pushes of all open files. All of it on the event loop; no locks, as state changes between awaits only."""

    def __init__(self, let_go: Callable[[Inode, OpenFile], None]) -> None:
        """`let_go` gives back what a push holds an open file by."""
        self._let_go = let_go
        self._readings: dict[OpenFile, _Reading] = {}
        self._pushing: dict[OpenFile, Push] = {}  # the one that moved least recently first
        self._workers = _Workers()
        self._store: Store | None = None
        self._nursery: trio.Nursery | None = None

    async def run(self, store: Store) -> None:
        """Owns the pushes. Cancelled, it returns when no thread is at work: answer requests until then."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery, self._store = nursery, store
                await trio.sleep_forever()
        finally:
            self._nursery = None

    async def page(self, opened: OpenFile, offset: int, length: int) -> bytes | None:
        """The answer to a request, if a push knows it; may wait until that has got further."""
        if (push := self._pushing.get(opened)) is not None:
            self._pushing[opened] = self._pushing.pop(opened)
        elif (reading := self._readings.get(opened)) is None or (push := reading.push) is None:
            return None
        return await push.page(offset, length)

    async def note(self, opened: OpenFile, offset: int, length: int) -> None:
        """Before any other request is answered: when the file is read on and on, begin to push, and wait for that."""
        if opened.handles == 0:
            return
        if (reading := self._readings.get(opened)) is None:
            reading = self._readings[opened] = _Reading(expected=offset)
        near = abs(offset - reading.expected) <= NEAR_BYTES
        reading.streak = reading.streak + length if near else length
        reading.expected = max(reading.expected, offset + length) if near else offset + length
        if not near:
            reading.cold_until = 0
        if (push := reading.push) is not None:
            push.note(offset, length)
            if offset not in push.covered:
                push.stop()
            if not push.stopped:
                return
        ripe = reading.streak >= SEQUENTIAL_BYTES and reading.expected >= reading.cold_until
        if ripe and (push := self._begin(opened, reading)) is not None:
            await push.begun()

    def left(self, opened: OpenFile) -> None:
        """A handle was released. The last one's push ends."""
        if opened.handles == 0:
            self._readings.pop(opened, None)
        elif opened.handles == 1 and (push := self._pushing.get(opened)) is not None:
            push.stop()

    async def quiet(self, opened: OpenFile) -> None:
        """Return when nothing of this file is being pushed. Whoever calls sees to it that nothing begins after that."""
        if (reading := self._readings.get(opened)) is not None:
            if reading.push is not None:
                reading.push.forget()
            self._readings[opened] = _Reading()
        if (push := self._pushing.get(opened)) is not None:
            await push.ended.wait()

    def _begin(self, opened: OpenFile, reading: _Reading) -> Push | None:
        local = opened.local_segments()
        if opened in self._pushing or local is None or self._nursery is None or self._store is None:
            return None
        if not SEGMENT_BYTES_MIN <= local.segment_size <= SEGMENT_BYTES_MAX:
            return None
        if reading.expected + MARGIN_BYTES + local.segment_size > local.size:
            return None
        if len(self._pushing) >= FILES_MAX:
            oldest = next(iter(self._pushing.values()))
            if oldest.rests_s > RESTING_S:
                oldest.stop()  # the next read may find that it has ended
            return None
        push = Push(local, opened.inode.number, reading.expected, self._store, self._workers)
        reading.push = self._pushing[opened] = push
        opened.handles += 1
        self._nursery.start_soon(self._run, opened, reading, push)
        return push

    async def _run(self, opened: OpenFile, reading: _Reading, push: Push) -> None:
        try:
            await push.run()
        finally:
            if push.is_missing:
                reading.cold_until = reading.expected + FAR_BYTES
            del self._pushing[opened]
            if not self._pushing:
                self._workers.free()
            self._let_go(opened.inode, opened)
