"""TLS for tubs, both ways, over any byte stream.

Tubs trust no authority: any certificate is taken, and its SHA-1 is the peer's name. Both sides present one.
The dialler uses the standard library. The acceptor cannot: the standard library asks for a client certificate
only together with verifying it, which self-signed ones fail; so it uses pyOpenSSL with a callback that accepts.
Both run over memory buffers under one stream, which reads and writes in large pieces.

For HTTP the server alone shows a certificate, and the standard library does both sides. Whoever dials compares
the hash of its public key with what was announced, see `dial_pinned`.

Limits: nothing is read ahead beyond one read of the socket, and ciphertext is sent in pieces of at most
SEND_BYTES and what records add to it. Who knows that much is on its way may say so: then the kernel wakes us once for
GATHER_BYTES, not for every packet.
"""

from __future__ import annotations

import hmac
import os
import ssl
from collections.abc import Sequence
from functools import cache
from socket import SO_RCVLOWAT, SOL_SOCKET
from typing import Final, Protocol

import trio
from OpenSSL import SSL, crypto

from grid.crypto import TubIdentity, spki_hash_of_certificate
from grid.errors import FormatError, NegotiationError

READ_BYTES: Final = 256 << 10  # asked of the socket at a time
RECORD_BYTES: Final = 16 << 10  # plaintext in one TLS record
SEND_BYTES: Final = 256 << 10  # ciphertext gathered before it is handed to the socket
COALESCE_BYTES: Final = RECORD_BYTES  # smaller buffers are joined until they fill a record
GATHER_BYTES: Final = 128 << 10  # waited for at a time where so much is known to come
UNREAD_BYTES_MAX: Final = 32 << 10  # of what was received, in a record that is not whole: less than two records
CLOSE_TIMEOUT_S: Final = 1.0  # for the goodbye

_SCRATCH: Final = bytearray(READ_BYTES)  # never in use across an await: sockets are read into it, engines copy from it

Buffer = bytes | bytearray | memoryview


class _Engine(Protocol):
    """One TLS connection over memory. Raises BrokenResourceError for everything that is wrong with it."""

    def handshake(self) -> bool:
        """Whether it is finished; else more has to come from the peer."""

    def put(self, ciphertext: Buffer) -> None: ...
    def take(self) -> bytes:
        """Ciphertext to send."""

    def read(self) -> bytes | None:
        """Up to one record; b"" at the end; None when more has to come from the peer."""

    def write(self, plaintext: memoryview) -> int: ...
    def shutdown(self) -> None: ...
    def peer_certificate_der(self) -> bytes | None: ...


class TLSStream(trio.abc.Stream):
    """A byte stream inside TLS; knows the certificate of its peer once the handshake is done."""

    def __init__(self, transport: trio.abc.Stream, engine: _Engine) -> None:
        self._transport = transport
        self._engine = engine
        self._send_lock = trio.Lock()
        self._encrypted_bytes = 0  # plaintext encrypted and not handed to the transport yet
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
            if not await self._fill():
                raise trio.BrokenResourceError("connection closed in the TLS handshake")
        await self._flush()

    async def receive_pieces(self, wanted: int = 1) -> list[bytes]:
        """At least one piece of what has arrived; none at the end.

        `wanted`: bytes that the peer must yet send before it can expect anything of us. They come in larger batches.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            pieces = []
            while piece := self._engine.read():
                pieces.append(piece)
            if pieces or piece is not None:
                return pieces
            if not await self._fill(wanted):
                return []  # many peers close without a goodbye

    async def _fill(self, wanted: int = 1) -> bool:
        """Let the engine have what comes next; False at the end."""
        socket = self.socket
        if socket is None:
            ciphertext = await self._transport.receive_some(READ_BYTES)
            self._engine.put(ciphertext)
            return bool(ciphertext)
        gather = min(wanted - UNREAD_BYTES_MAX, GATHER_BYTES)
        gather = gather if gather > RECORD_BYTES else 1
        try:
            if gather != self._gathering:
                socket.setsockopt(SOL_SOCKET, SO_RCVLOWAT, gather)
                self._gathering = gather
            if gather > 1:
                await trio.lowlevel.wait_readable(socket)
            else:
                await trio.lowlevel.checkpoint()
            while True:
                try:
                    count = os.readv(socket.fileno(), [_SCRATCH])
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(socket)
        except OSError as error:
            if socket.fileno() < 0:
                raise trio.ClosedResourceError("this stream is closed") from None
            raise trio.BrokenResourceError(f"connection broken: {error.strerror}") from error
        self._engine.put(memoryview(_SCRATCH)[:count])
        return bool(count)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """`max_bytes` is not honoured: what has arrived comes at once."""
        return b"".join(await self.receive_pieces())

    async def send_buffers(self, buffers: Sequence[Buffer]) -> None:
        """Send all of them, in order. Large ones are encrypted where they are."""
        async with self._send_lock:
            small = bytearray()
            for buffer in buffers:
                if len(buffer) < COALESCE_BYTES:
                    small += buffer
                    if len(small) >= COALESCE_BYTES:
                        await self._encrypt(memoryview(small))
                        small = bytearray()
                else:
                    await self._encrypt(memoryview(small))
                    small = bytearray()
                    await self._encrypt(memoryview(buffer))
            await self._encrypt(memoryview(small))
            await self._send_encrypted()

    async def _encrypt(self, data: memoryview) -> None:
        """The send lock is held. Sends whenever enough has gathered."""
        position = 0
        while position < len(data):
            written = self._engine.write(data[position : position + SEND_BYTES])
            position += written
            self._encrypted_bytes += written
            if self._encrypted_bytes >= SEND_BYTES:
                await self._send_encrypted()

    async def _send_encrypted(self) -> None:
        self._encrypted_bytes = 0
        if ciphertext := self._engine.take():
            await self._transport.send_all(ciphertext)

    async def send_all(self, data: Buffer) -> None:
        await self.send_buffers([data])

    async def wait_send_all_might_not_block(self) -> None:
        await self._transport.wait_send_all_might_not_block()

    async def _flush(self) -> None:
        async with self._send_lock:
            await self._send_encrypted()

    async def aclose(self) -> None:
        try:
            with trio.move_on_after(CLOSE_TIMEOUT_S):
                self._engine.shutdown()
                await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            pass
        finally:
            await trio.aclose_forcefully(self._transport)


class TubTLS:
    """The TLS contexts of one tub, made once."""

    def __init__(self, identity: TubIdentity) -> None:
        self._identity = identity
        self._client: ssl.SSLContext | None = None
        self._server: SSL.Context | None = None

    async def dial(self, transport: trio.abc.Stream) -> TLSStream:
        """The handshake as TLS client. Raises BrokenResourceError; the transport is the caller's to close then."""
        if self._client is None:
            self._client = _client_context()
            _load_identity(self._client, self._identity)
        return await _shake_hands(transport, _LibraryEngine(self._client))

    async def accept(self, transport: trio.abc.Stream) -> TLSStream:
        """The handshake as TLS server. Raises BrokenResourceError; the transport is the caller's to close then."""
        if self._server is None:
            self._server = _server_context(self._identity)
        return await _shake_hands(transport, _ServerEngine(self._server))


class ServerTLS:
    """Accepting for HTTP: shows the tub's certificate, asks for none. The context is made once."""

    def __init__(self, identity: TubIdentity) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.set_ciphers("DEFAULT:@SECLEVEL=1")  # as for tubs: an old key is still this server's key
        self._context.options |= ssl.OP_NO_RENEGOTIATION
        self._context.set_alpn_protocols(["http/1.1"])
        _load_identity(self._context, identity)

    async def accept(self, transport: trio.abc.Stream, received: bytes = b"") -> TLSStream:
        """The handshake; `received` was read of it already. As for tubs."""
        engine = _LibraryEngine(self._context, server_side=True)
        engine.put(received)
        return await _shake_hands(transport, engine)


async def dial_pinned(transport: trio.abc.Stream, spki_hash: bytes) -> TLSStream:
    """The handshake with a server that must hold the key whose SubjectPublicKeyInfo has this SHA-256.

    Nothing else in its certificate counts. Raises BrokenResourceError, or NegotiationError when it is another
    server; the transport is the caller's to close then.
    """
    stream = await _shake_hands(transport, _LibraryEngine(_pinned_context()))
    try:
        found = spki_hash_of_certificate(stream.peer_certificate_der or b"")
    except FormatError as error:
        raise NegotiationError(f"the server's certificate: {error}") from None
    if not hmac.compare_digest(found, spki_hash):
        raise NegotiationError("the server's key is not the announced one")
    return stream


async def _shake_hands(transport: trio.abc.Stream, engine: _Engine) -> TLSStream:
    stream = TLSStream(transport, engine)
    await stream.do_handshake()
    return stream


# --- the standard library


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    # Old tubs have short keys. It is the hash of the certificate that says who they are, nothing in it.
    context.set_ciphers("DEFAULT:@SECLEVEL=1")
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


@cache
def _pinned_context() -> ssl.SSLContext:
    return _client_context()


def _load_identity(context: ssl.SSLContext, identity: TubIdentity) -> None:
    # The standard library loads keys from named files only: this one has no place on any disk.
    descriptor = os.memfd_create("tub", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, identity.certificate_pem + identity.private_key_pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


class _LibraryEngine:
    def __init__(self, context: ssl.SSLContext, *, server_side: bool = False) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)

    def handshake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except (ssl.SSLError, ValueError) as error:
            raise trio.BrokenResourceError("TLS handshake failed") from error
        return True

    def put(self, ciphertext: Buffer) -> None:
        self._incoming.write(ciphertext)

    def take(self) -> bytes:
        return self._outgoing.read()

    def read(self) -> bytes | None:
        try:
            return self._tls.read(RECORD_BYTES)
        except ssl.SSLWantReadError:
            return None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""
        except ssl.SSLError as error:
            raise trio.BrokenResourceError("TLS failed") from error

    def write(self, plaintext: memoryview) -> int:
        try:
            return self._tls.write(plaintext)
        except ssl.SSLError as error:
            raise trio.BrokenResourceError("TLS failed") from error

    def shutdown(self) -> None:
        try:
            self._tls.unwrap()
        except (ssl.SSLError, ValueError):
            return  # the goodbye is queued, or cannot be said any more

    def peer_certificate_der(self) -> bytes | None:
        try:
            return self._tls.getpeercert(binary_form=True)
        except ValueError:
            return None


# --- accepting as a tub: pyOpenSSL


def _server_context(identity: TubIdentity) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(b"DEFAULT:@SECLEVEL=1")
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET)  # every connection proves its key anew
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    certificate = crypto.load_certificate(crypto.FILETYPE_PEM, identity.certificate_pem)
    key = crypto.load_privatekey(crypto.FILETYPE_PEM, identity.private_key_pem)
    context.use_certificate(certificate.to_cryptography())
    context.use_privatekey(key.to_cryptography_key())  # type: ignore[arg-type]
    context.set_verify(SSL.VERIFY_PEER, _accept_any)
    return context


def _accept_any(connection: SSL.Connection, certificate: crypto.X509, code: int, depth: int, ok: int) -> bool:
    return True


class _ServerEngine:
    def __init__(self, context: SSL.Context) -> None:
        self._tls = SSL.Connection(context, None)
        self._tls.set_accept_state()

    def handshake(self) -> bool:
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            return False
        except SSL.Error as error:
            raise trio.BrokenResourceError("TLS handshake failed") from error
        return True

    def put(self, ciphertext: Buffer) -> None:
        view = memoryview(ciphertext)
        while view:
            view = view[self._tls.bio_write(view) :]

    def take(self) -> bytes:
        pieces = []
        while True:
            try:
                pieces.append(self._tls.bio_read(SEND_BYTES + RECORD_BYTES))
            except SSL.WantReadError:
                return b"".join(pieces)

    def read(self) -> bytes | None:
        try:
            return self._tls.recv(RECORD_BYTES)
        except SSL.WantReadError:
            return None
        except (SSL.ZeroReturnError, SSL.SysCallError):
            return b""
        except SSL.Error as error:
            raise trio.BrokenResourceError("TLS failed") from error

    def write(self, plaintext: memoryview) -> int:
        try:
            return self._tls.send(plaintext)
        except SSL.Error as error:
            raise trio.BrokenResourceError("TLS failed") from error

    def shutdown(self) -> None:
        try:
            self._tls.shutdown()
        except SSL.Error:
            return  # the goodbye is queued, or cannot be said any more

    def peer_certificate_der(self) -> bytes | None:
        certificate = self._tls.get_peer_certificate()
        return crypto.dump_certificate(crypto.FILETYPE_ASN1, certificate) if certificate is not None else None
