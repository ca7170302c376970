"""TLS for tubs, both ways, over any byte stream.

Tubs trust no authority: any certificate is taken, and its SHA-1 is the peer's name. Both sides present one.
The dialler uses the standard library. The acceptor cannot: the standard library asks for a client certificate
only together with verifying it, which self-signed ones fail; so it uses pyOpenSSL with a callback that accepts.

For HTTP the server alone shows a certificate, and the standard library does both sides. Whoever dials compares
the hash of its public key with what was announced, see `dial_pinned`.

Diallers run over memory buffers, acceptors on the socket itself; `grid/transports/tls_stream.py` makes streams of both.
"""

from __future__ import annotations

import hmac
import os
import ssl
from contextlib import suppress
from functools import cache
from socket import socket as stdlib_socket
from typing import Final

import trio
from OpenSSL import SSL, crypto

from grid.crypto import TubIdentity, spki_hash_of_certificate
from grid.errors import FormatError, NegotiationError
from grid.transports.tls_stream import READ_BYTES, RECORD_BYTES, SEND_BYTES, Buffer, Engine, TLSStream

_TAKEN_BYTES: Final = SEND_BYTES + RECORD_BYTES  # ciphertext copied out of pyOpenSSL at a time
_UNEXPECTED_EOF: Final = -1  # in pyOpenSSL's SysCallError
_PARTIAL_WRITE: Final = 1  # SSL_MODE_ENABLE_PARTIAL_WRITE: each call would write one record


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
        if isinstance(transport, trio.SocketStream):
            return await _shake_hands(transport, _SocketEngine(self._server, transport.socket))
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
        if isinstance(transport, trio.SocketStream) and not received:
            return await _shake_hands(transport, _LibrarySocketEngine(self._context, transport.socket))
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


async def _shake_hands(transport: trio.abc.Stream, engine: Engine) -> TLSStream:
    stream = TLSStream(transport, engine)
    try:
        await stream.do_handshake()
    except BaseException:
        engine.shutdown()
        raise
    return stream


def _check_open(socket: trio.socket.SocketType) -> None:
    """Raises ClosedResourceError. OpenSSL knows a descriptor's number alone, which may be another connection's then."""
    if socket.fileno() < 0:
        raise trio.ClosedResourceError("this stream is closed")


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
    has_socket = False

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

    def read(self, pieces: list[bytes]) -> bool:
        try:
            while piece := self._tls.read(RECORD_BYTES):
                pieces.append(piece)
        except ssl.SSLWantReadError:
            return True
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return False
        except ssl.SSLError as error:
            raise trio.BrokenResourceError("TLS failed") from error
        return False

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


class _LibrarySocketEngine:
    """Accepting on the socket itself: each record is worked on while it is in the processor's cache, and no byte goes
    by way of memory buffers.
    """

    has_socket = True

    def __init__(self, context: ssl.SSLContext, socket: trio.socket.SocketType) -> None:
        """Raises BrokenResourceError."""
        self._socket = socket
        self._ended = False  # after which the library must not be asked again
        try:
            # The library closes what it is given, and the transport closes its own: so there are two descriptors.
            plain = stdlib_socket(fileno=os.dup(socket.fileno()))
            plain.setblocking(False)  # which the other one is as well, from now on as before
            self._tls = context.wrap_socket(
                plain, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
            )
        except OSError as error:
            raise trio.BrokenResourceError(f"TLS handshake failed: {error.strerror}") from error

    def handshake(self) -> bool:
        _check_open(self._socket)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except (OSError, ValueError) as error:
            raise trio.BrokenResourceError("TLS handshake failed") from error
        return True

    def put(self, ciphertext: Buffer) -> None:
        raise ValueError("this engine takes it from the socket")

    def take(self) -> bytes:
        return b""

    def read(self, pieces: list[bytes]) -> bool:
        _check_open(self._socket)
        left = 0 if self._ended else READ_BYTES
        try:
            while left > 0 and (piece := self._tls.read(RECORD_BYTES)):
                pieces.append(piece)
                left -= len(piece)
            self._ended = left > 0
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            self._ended = True  # many peers close without a goodbye
        except OSError as error:
            raise trio.BrokenResourceError("TLS failed") from error
        return not self._ended

    def write(self, plaintext: memoryview) -> int:
        _check_open(self._socket)
        try:
            return self._tls.write(plaintext)
        except ssl.SSLWantWriteError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError("TLS failed") from error

    def shutdown(self) -> None:
        with suppress(OSError, ValueError):  # the goodbye was said, or cannot be said any more
            if self._socket.fileno() >= 0:
                self._tls.unwrap()
        self._tls.close()

    def peer_certificate_der(self) -> bytes | None:
        return None  # none was asked for


# --- accepting as a tub: pyOpenSSL


def _server_context(identity: TubIdentity) -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_2_VERSION)
    context.set_cipher_list(b"DEFAULT:@SECLEVEL=1")
    context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET)  # every connection proves its key anew
    context.clear_mode(_PARTIAL_WRITE)
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
    has_socket = False

    def __init__(self, context: SSL.Context, socket: trio.socket.SocketType | None = None) -> None:
        self._tls = SSL.Connection(context, socket)  # type: ignore[arg-type]
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
        pieces: list[bytes] = []
        try:
            while not pieces or len(pieces[-1]) == _TAKEN_BYTES:  # a shorter one was the last
                pieces.append(self._tls.bio_read(_TAKEN_BYTES))
        except SSL.WantReadError:
            pass
        return b"".join(pieces)

    def read(self, pieces: list[bytes]) -> bool:
        try:
            while True:
                pieces.append(self._tls.recv(RECORD_BYTES))
        except SSL.WantReadError:
            return True
        except (SSL.ZeroReturnError, SSL.SysCallError):
            return False
        except SSL.Error as error:
            raise trio.BrokenResourceError("TLS failed") from error

    def write(self, plaintext: memoryview) -> int:
        try:
            return self._tls.send(plaintext)
        except SSL.WantWriteError:
            return 0
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


class _SocketEngine(_ServerEngine):
    """The same on the socket itself: each record is worked on while it is in the processor's cache, and no byte goes by
    way of memory buffers. Worth a fifth of what receiving a large share costs.
    """

    has_socket = True

    def __init__(self, context: SSL.Context, socket: trio.socket.SocketType) -> None:
        super().__init__(context, socket)
        self._socket = socket
        self._ended = False  # after which OpenSSL must not be asked again

    def handshake(self) -> bool:
        _check_open(self._socket)
        return super().handshake()

    def take(self) -> bytes:
        return b""

    def read(self, pieces: list[bytes]) -> bool:
        _check_open(self._socket)
        left = 0 if self._ended else READ_BYTES
        try:
            while left > 0:
                pieces.append(self._tls.recv(RECORD_BYTES))
                left -= len(pieces[-1])
        except SSL.WantReadError:
            pass
        except SSL.ZeroReturnError:
            self._ended = True
        except SSL.Error as error:
            if not isinstance(error, SSL.SysCallError) or error.args[0] != _UNEXPECTED_EOF:
                raise trio.BrokenResourceError("TLS failed") from error
            self._ended = True  # many peers close without a goodbye
        return not self._ended

    def write(self, plaintext: memoryview) -> int:
        _check_open(self._socket)
        return super().write(plaintext)

    def shutdown(self) -> None:
        if self._socket.fileno() >= 0:
            super().shutdown()
