"""A TLS connection as a trio stream, over any byte stream; who does the cryptography is an `Engine`.

    socket -> scratch -> engine -> pieces, one for each record          pieces -> engine -> ciphertext -> socket
    engine on the socket -> pieces                                      pieces -> engine on the socket

Both ways in large pieces: on a fast line each wakeup costs more than what it moves. Who knows that much is on its way
may say so: then the kernel wakes us once for GATHER_BYTES, not for every packet. A send that the kernel takes at once
gives way to other tasks only after TURN_BYTES.

Limits: nothing is read ahead beyond one read of the socket, and ciphertext is sent in pieces of at most SEND_BYTES and
what records add to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from socket import SO_RCVLOWAT, SOL_SOCKET
from typing import Final, Protocol

import trio

READ_BYTES: Final = 1 << 20  # asked of the socket at a time
RECORD_BYTES: Final = 16 << 10  # plaintext in one TLS record
SEND_BYTES: Final = 256 << 10  # ciphertext gathered before it is handed to the socket
TURN_BYTES: Final = 1 << 20  # sent without giving way to other tasks
COALESCE_BYTES: Final = RECORD_BYTES  # small buffers are joined until they fill a record, if need be with what follows
GATHER_BYTES: Final = 1 << 20  # waited for at a time where so much is known to come
GATHER_TIMEOUT_S: Final = 0.2  # then what has come will do: on a slow line, or from a peer that stopped
UNREAD_BYTES_MAX: Final = 32 << 10  # of what was received, in a record that is not whole: less than two records
CLOSE_TIMEOUT_S: Final = 1.0  # for the goodbye

_SCRATCH: Final = bytearray(READ_BYTES)  # never in use across an await: sockets are read into it, engines copy from it

Buffer = bytes | bytearray | memoryview


class Engine(Protocol):
    """One TLS connection over memory. Raises BrokenResourceError for everything that is wrong with it.

    One that has the socket itself (`has_socket`) reads from it and writes to it; what it is given and asked for is
    plaintext alone.
    """

    has_socket: bool

    def handshake(self) -> bool:
        """Whether it is finished; else more has to come from the peer."""

    def put(self, ciphertext: Buffer) -> None: ...
    def take(self) -> bytes:
        """Ciphertext to send."""

    def read(self, pieces: list[bytes]) -> bool:
        """Append what has come, a piece for each record; False when that was the end."""

    def write(self, plaintext: memoryview) -> int:
        """How much was taken: not all of it, or nothing, while the socket takes no more."""

    def shutdown(self) -> None: ...
    def peer_certificate_der(self) -> bytes | None: ...


class TLSStream(trio.abc.Stream):
    """A byte stream inside TLS; knows the certificate of its peer once the handshake is done."""

    def __init__(self, transport: trio.abc.Stream, engine: Engine) -> None:
        self._transport = transport
        self._engine = engine
        self._send_lock = trio.Lock()
        self._encrypted_bytes = 0  # plaintext encrypted and not handed to the transport yet
        self._turn_bytes = 0  # plaintext encrypted since others had their turn
        self._gathering = 1  # bytes that make our socket readable

    @property
    def peer_certificate_der(self) -> bytes | None:
        return self._engine.peer_certificate_der()

    @property
    def socket(self) -> trio.socket.SocketType | None:
        """Of the transport, if that is one."""
        return self._transport.socket if isinstance(self._transport, trio.SocketStream) else None

    async def do_handshake(self) -> None:
        """Raises BrokenResourceError. The caller sets the deadline."""
        while not self._engine.handshake():
            await self._flush()
            if self._engine.has_socket:
                await self._wait_readable(1)
            elif not await self._fill():
                raise trio.BrokenResourceError("connection closed in the TLS handshake")
        await self._flush()

    async def receive_pieces(self, wanted: int = 1) -> list[bytes]:
        """At least one piece of what has arrived; none at the end.

        `wanted`: bytes that the peer must yet send before it can expect anything of us. They come in larger batches.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        pieces: list[bytes] = []
        if self._engine.has_socket:
            await self._receive_records(pieces, wanted)
            return pieces
        while self._engine.read(pieces) and not pieces:
            if not await self._fill(wanted):
                break  # many peers close without a goodbye
        return pieces

    async def _receive_records(self, pieces: list[bytes], wanted: int) -> None:
        """As receive_pieces(), where the engine has the socket."""
        waited = await self._gather(wanted)
        while self._engine.read(pieces) and not pieces:
            await self._wait_readable(1)
            waited = True
        if not waited:
            await trio.lowlevel.checkpoint()  # a peer that always has more must not keep others waiting

    async def _fill(self, wanted: int = 1) -> bool:
        """Let the engine have what comes next; False at the end."""
        socket = self.socket
        if socket is None:
            ciphertext = await self._transport.receive_some(READ_BYTES)
            self._engine.put(ciphertext)
            return bool(ciphertext)
        waited = await self._gather(wanted)
        while True:
            try:
                count = os.readv(socket.fileno(), [_SCRATCH])
                break
            except BlockingIOError:
                await self._wait_readable(1)
                waited = True
            except OSError as error:
                raise _trouble(socket, error) from error
        self._engine.put(memoryview(_SCRATCH)[:count])
        if not waited:
            await trio.lowlevel.checkpoint()  # a peer that always has more must not keep others waiting
        return bool(count)

    async def _gather(self, wanted: int) -> bool:
        """Where much is known to come, wait for it, but not long; whether there was a wait."""
        gather = min(wanted - UNREAD_BYTES_MAX, GATHER_BYTES)
        if gather <= RECORD_BYTES:
            return False
        with trio.move_on_after(GATHER_TIMEOUT_S):
            await self._wait_readable(gather)
        return True

    async def _wait_readable(self, gather: int) -> None:
        """Until so many bytes are there, or the end is. Raises BrokenResourceError, ClosedResourceError."""
        socket = self.socket
        assert socket is not None
        try:
            if gather != self._gathering:
                socket.setsockopt(SOL_SOCKET, SO_RCVLOWAT, gather)
                self._gathering = gather
            await trio.lowlevel.wait_readable(socket)
        except OSError as error:
            raise _trouble(socket, error) from error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """`max_bytes` is not honoured: what has arrived comes at once."""
        return b"".join(await self.receive_pieces())

    async def send_buffers(self, buffers: Sequence[Buffer]) -> None:
        """Send all of them, in order. Large ones are encrypted where they are."""
        await self._take_turn()
        try:
            small = bytearray()
            for buffer in buffers:
                if len(small) + len(buffer) < COALESCE_BYTES:
                    small += buffer
                    continue
                data = memoryview(buffer)
                if small:
                    missing = COALESCE_BYTES - len(small)
                    small += data[:missing]
                    await self._encrypt(memoryview(small))
                    data, small = data[missing:], bytearray()
                await self._encrypt(data)
            if small:
                await self._encrypt(memoryview(small))
            await self._send_encrypted()
        finally:
            self._send_lock.release()

    async def _take_turn(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._send_lock.acquire_nowait()
        except trio.WouldBlock:
            await self._send_lock.acquire()

    async def _encrypt(self, data: memoryview) -> None:
        """The send lock is held. Sends whenever enough has gathered."""
        position = 0
        at_a_time = TURN_BYTES if self._engine.has_socket else SEND_BYTES
        while position < len(data):
            written = self._engine.write(data[position : position + at_a_time])
            position += written
            self._encrypted_bytes += written
            self._turn_bytes += written
            if not written:
                await self._wait_writable()
            elif self._encrypted_bytes >= SEND_BYTES:
                await self._send_encrypted()
            if self._turn_bytes >= TURN_BYTES:
                self._turn_bytes = 0
                await trio.lowlevel.checkpoint()

    async def _send_encrypted(self) -> None:
        self._encrypted_bytes = 0
        rest = memoryview(self._engine.take())
        socket = self.socket
        if socket is None:
            if rest:
                await self._transport.send_all(rest)
            return
        # Not by way of the transport: that gives way to others for each piece, which costs more than a small send.
        try:
            while rest:
                try:
                    rest = rest[os.write(socket.fileno(), rest) :]
                except BlockingIOError:
                    await self._wait_writable()
        except OSError as error:
            raise _trouble(socket, error) from error

    async def _wait_writable(self) -> None:
        assert self.socket is not None
        self._turn_bytes = 0
        await trio.lowlevel.wait_writable(self.socket)

    async def send_all(self, data: Buffer) -> None:
        await self.send_buffers([data])

    async def wait_send_all_might_not_block(self) -> None:
        await self._transport.wait_send_all_might_not_block()

    async def _flush(self) -> None:
        await self._take_turn()
        try:
            await self._send_encrypted()
        finally:
            self._send_lock.release()

    async def aclose(self) -> None:
        try:
            with trio.move_on_after(CLOSE_TIMEOUT_S):
                self._engine.shutdown()
                await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            pass
        finally:
            await trio.aclose_forcefully(self._transport)


def _trouble(socket: trio.socket.SocketType, error: OSError) -> Exception:
    if socket.fileno() < 0:
        return trio.ClosedResourceError("this stream is closed")
    return trio.BrokenResourceError(f"connection broken: {error.strerror}")
