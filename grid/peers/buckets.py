"""Immutable shares on a Foolscap server: writing with a window of bytes in flight, and reading.

    write ─ call ─ call ─ call ──>  server          at most about WINDOW_BYTES unanswered a server; then
          <── answer ── answer ───                  writers wait, all of them, whichever file they write

A round trip for every block would make an upload's speed that of the line's latency.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Final

import trio
from attrs import frozen

from grid.errors import ConnectionLostError, PeerError, RemoteProtocolError
from grid.peers.deadlines import ADVISE_TIMEOUT_S, CLOSE_TIMEOUT_S, READ_TIMEOUT_S, WRITE_TIMEOUT_S, with_data
from grid.peers.pulse import Pulse
from grid.transports.tub import PendingCall, RemoteReference

WINDOW_BYTES: Final = 1 << 20  # unanswered, per server; one write more may be under way from each writer
CALL_BYTES: Final = 200  # what a call costs beside its data: empty writes must not be free
READ_BYTES_MAX: Final = 4 << 20  # in one call; longer reads are cut into several
_REASON_BYTES_MAX: Final = 900


@frozen(eq=False)
class _SentWrite:
    writer: FoolscapBucketWriter
    pending: PendingCall
    weight: int  # bytes it takes of the window
    sent_at: float


class WriteWindow:
    """All writes on their way over one connection. A server answers them in order, so one task takes the answers."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._sent: deque[_SentWrite] = deque()
        self._bytes_in_flight = 0
        self._posted = trio.Event()
        self._progress = trio.lowlevel.ParkingLot()
        self._closed = False

    def post(
        self, writer: FoolscapBucketWriter, reference: RemoteReference, offset: int, data: bytes | memoryview
    ) -> None:
        if self._closed:
            raise ConnectionLostError("connection lost")
        weight = len(data) + CALL_BYTES
        pending = reference.send("write", offset, data)
        self._sent.append(_SentWrite(writer, pending, weight, trio.current_time()))
        self._bytes_in_flight += weight
        self._pulse.asked(weight)
        writer.unanswered += 1
        self._posted.set()

    async def wait_for_room(self) -> None:
        while self._bytes_in_flight > WINDOW_BYTES:
            await self._progress.park()

    async def wait_until_answered(self, writer: FoolscapBucketWriter) -> None:
        while writer.unanswered:
            await self._progress.park()

    async def run(self) -> None:
        """Take the answers, until cancelled with the connection; what is unanswered then has failed."""
        last_answer_at = trio.current_time()
        try:
            while True:
                if not self._sent:
                    self._posted = trio.Event()
                    await self._posted.wait()
                write = self._sent[0]
                # a slow line may take long over a full window, but something has to arrive now and then
                deadline = max(write.sent_at, last_answer_at) + with_data(WRITE_TIMEOUT_S, write.weight)
                try:
                    await write.pending.result(timeout_s=max(0.0, deadline - trio.current_time()))
                except PeerError as error:
                    self._settle(error)
                else:
                    last_answer_at = trio.current_time()
                    self._settle(None)
        finally:
            self._closed = True
            while self._sent:
                self._settle(ConnectionLostError("connection lost while writing"))

    def _settle(self, error: PeerError | None) -> None:
        write = self._sent.popleft()
        self._bytes_in_flight -= write.weight
        write.writer.unanswered -= 1
        if error is None:
            self._pulse.answered(write.weight)
        else:
            self._pulse.given_up(write.weight)
            write.writer.failure = write.writer.failure or error
        self._progress.unpark_all()


class FoolscapBucketWriter:
    """IBucketWriter over RIBucketWriter."""

    def __init__(self, reference: RemoteReference, window: WriteWindow, pulse: Pulse) -> None:
        self.failure: PeerError | None = None  # set by the window
        self.unanswered = 0  # writes; counted by the window
        self._reference: RemoteReference | None = reference  # None once closed or aborted
        self._window = window
        self._pulse = pulse

    async def write(self, offset: int, data: bytes | memoryview) -> None:
        self._window.post(self, self._usable(), offset, data)
        await self._window.wait_for_room()
        await trio.lowlevel.checkpoint()
        self._usable()

    async def close(self) -> None:
        try:
            await self._window.wait_until_answered(self)
            with self._pulse.call():
                await self._usable().call("close", timeout_s=CLOSE_TIMEOUT_S)
        except BaseException:
            self._discard()  # harmless if the server did close it
            raise
        self._forget()

    async def abort(self) -> None:
        """The request to abort is sent, not waited for: nothing depends on its answer."""
        self._discard()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def _usable(self) -> RemoteReference:
        if self.failure is not None:
            raise self.failure
        if self._reference is None:
            raise PeerError("this share was closed or aborted already")
        return self._reference

    def _discard(self) -> None:
        if self._reference is not None:
            with suppress(PeerError):
                self._reference.send("abort")
            self._forget()

    def _forget(self) -> None:
        if self._reference is not None:
            self._reference.release()
            self._reference = None


class FoolscapBucketReader:
    """IBucketReader over RIBucketReader. The server forgets it when the last use of this object is gone."""

    def __init__(self, reference: RemoteReference, pulse: Pulse) -> None:
        self._reference = reference
        self._pulse = pulse

    async def read(self, offset: int, length: int) -> bytes:
        pieces = []
        while True:
            wanted = min(length, READ_BYTES_MAX)
            timeout_s = with_data(READ_TIMEOUT_S, wanted)
            with self._pulse.call(wanted):
                piece: bytes = await self._reference.call("read", offset, wanted, timeout_s=timeout_s)
            if len(piece) > wanted:
                raise RemoteProtocolError("a server sent more than was asked for")
            pieces.append(piece)
            offset += wanted
            length -= wanted
            if not length or len(piece) < wanted:
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def advise_corrupt_share(self, reason: str) -> None:
        with suppress(PeerError), self._pulse.call():
            await self._reference.call("advise_corrupt_share", advice(reason), timeout_s=ADVISE_TIMEOUT_S)


def advice(reason: str) -> bytes:
    return reason.encode("utf-8", "replace")[:_REASON_BYTES_MAX]
