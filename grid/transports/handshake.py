"""From a TCP connection to two tubs that have agreed: plain text, TLS, hello and decision, for both sides.

Every failure closes the connection and is a PeerError; the caller sets the deadline.
"""

from __future__ import annotations

from typing import Final

import trio

from grid.crypto import tub_id_of_certificate
from grid.errors import ConnectionLostError, NegotiationError
from grid.transports.tls import TubTLS
from grid.transports.tls_stream import READ_BYTES, TLSStream
from grid.wire.duplicates import ConnectionRecords
from grid.wire.negotiation import (
    INTERNAL_ERROR,
    PLAINTEXT_RESPONSE,
    TEXT_BYTES_MAX,
    Agreement,
    Negotiation,
    PlaintextRefusalError,
    TextBuffer,
    check_response,
    plaintext_request,
    read_request,
)

REFUSAL_TIMEOUT_S: Final = 5.0  # to tell a peer why

_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)


class Handshaker:
    """Does the same for every connection of one tub."""

    def __init__(self, tub_id: str, tls: TubTLS, records: ConnectionRecords) -> None:
        self._tub_id = tub_id
        self._tls = tls
        self._records = records

    async def dial(self, peer_tub_id: str, host: str, port: int) -> tuple[TLSStream, Agreement]:
        try:
            transport = await trio.open_tcp_stream(host, port)
        except OSError as error:
            raise ConnectionLostError(f"cannot connect to {host}:{port}: {error.strerror or error}") from None
        try:
            await transport.send_all(plaintext_request(peer_tub_id, host))
            block, rest = await _receive_block(transport, b"")
            check_response(block)
            if rest:
                raise NegotiationError("peer spoke before TLS")
            stream = await self._tls.dial(transport)
            return stream, await self._negotiate(stream, peer_tub_id)
        except _BROKEN:
            await trio.aclose_forcefully(transport)
            raise ConnectionLostError("connection broke in negotiation") from None
        except BaseException:
            await trio.aclose_forcefully(transport)
            raise

    async def accept(self, transport: trio.abc.Stream, received: bytes) -> tuple[TLSStream, Agreement]:
        try:
            await self._accept_plaintext(transport, received)
            stream = await self._tls.accept(transport)
            return stream, await self._negotiate(stream, None)
        except _BROKEN:
            await trio.aclose_forcefully(transport)
            raise ConnectionLostError("connection broke in negotiation") from None
        except BaseException:
            await trio.aclose_forcefully(transport)
            raise

    async def _accept_plaintext(self, transport: trio.abc.Stream, received: bytes) -> None:
        try:
            try:
                block, rest = await _receive_block(transport, received)
            except NegotiationError:
                raise PlaintextRefusalError(INTERNAL_ERROR) from None
            read_request(block, (self._tub_id,))
            if rest:
                raise PlaintextRefusalError(INTERNAL_ERROR)
        except PlaintextRefusalError as refusal:
            with trio.move_on_after(REFUSAL_TIMEOUT_S):
                await transport.send_all(refusal.response)
                if isinstance(transport, trio.SocketStream):
                    await transport.send_eof()
            raise
        await transport.send_all(PLAINTEXT_RESPONSE)

    async def _negotiate(self, stream: TLSStream, expected_tub_id: str | None) -> Agreement:
        def certificate_tub_id() -> str | None:
            der = stream.peer_certificate_der
            return tub_id_of_certificate(der) if der is not None else None

        negotiation = Negotiation(
            records=self._records,
            my_tub_id=self._tub_id,
            certificate_tub_id=certificate_tub_id,
            expected_tub_id=expected_tub_id,
        )
        await stream.send_all(negotiation.hello())
        while True:
            data = await stream.receive_some()
            if not data:
                raise ConnectionLostError("peer closed the connection in negotiation")
            try:
                agreement = negotiation.receive_data(data)
            except NegotiationError:
                with trio.move_on_after(REFUSAL_TIMEOUT_S):
                    if refusal := negotiation.take_outgoing():
                        await stream.send_all(refusal)
                    await stream.aclose()
                raise
            if agreement is not None:
                break
        try:
            if decision := negotiation.take_outgoing():
                await stream.send_all(decision)
        except BaseException:
            if agreement.is_master:
                self._records.forget_live(agreement.peer_tub_id, agreement.connection_number)
            raise
        return agreement


async def _receive_block(transport: trio.abc.Stream, received: bytes) -> tuple[bytes, bytes]:
    """(text up to the first empty line, what came after it)."""
    text = TextBuffer()
    text.receive_data(received)
    while (block := text.next_block()) is None:
        data = await transport.receive_some(min(READ_BYTES, TEXT_BYTES_MAX))
        if not data:
            raise ConnectionLostError("peer closed the connection in negotiation")
        text.receive_data(bytes(data))
    return block, text.take_rest()
