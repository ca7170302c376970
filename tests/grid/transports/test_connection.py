"""One connection over memory streams, under a virtual clock: keepalive, and a peer that does not read."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from grid.crypto import make_tub_identity
from grid.errors import ConnectionLostError
from grid.transports import connection as connection_module
from grid.transports.connection import PONG_TIMEOUT_S, REPLY_BYTES_MAX, Connection
from grid.transports.tls import TubTLS
from grid.transports.tls_stream import TLSStream
from grid.wire.negotiation import Agreement
from grid.wire.references import Referenceable
from grid.wire.slicers import MessageWriter
from tests.grid.transports.targets import Target

KEEPALIVE_S = 240.0


class Names:
    def __init__(self) -> None:
        self.target = Target()

    def object_by_name(self, name: str) -> Referenceable | None:
        return self.target

    def furl_of(self, target: Referenceable) -> str | None:
        return None


async def connect(nursery: trio.Nursery) -> tuple[Connection, TLSStream]:
    """A running connection, and the bare stream of its peer."""
    ours, theirs = trio.testing.memory_stream_pair()
    streams: list[Any] = [None, None]

    async def shake(index: int, handshake: Any, transport: Any) -> None:
        streams[index] = await handshake(transport)

    async with trio.open_nursery() as shaking:
        shaking.start_soon(shake, 0, TubTLS(make_tub_identity()).dial, ours)
        shaking.start_soon(shake, 1, TubTLS(make_tub_identity()).accept, theirs)
    agreement = Agreement("b" * 32, 1, True, 1, b"")
    connection = Connection(streams[0], agreement, Names(), keepalive_s=KEEPALIVE_S)
    nursery.start_soon(connection.run)
    return connection, streams[1]


async def test_a_silent_peer_is_pinged_and_then_dropped(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    started_s = trio.current_time()
    connection, peer = await connect(nursery)
    call = connection.get_reference_by_name("name")
    received = await peer.receive_some()
    while not received.endswith(b"\x8e"):
        received += await peer.receive_some()
    assert trio.current_time() - started_s == pytest.approx(KEEPALIVE_S)
    await connection.wait_lost()
    assert trio.current_time() - started_s == pytest.approx(KEEPALIVE_S + PONG_TIMEOUT_S)
    with pytest.raises(ConnectionLostError, match="does not answer"):
        await call.result(1)
    await peer.aclose()


async def test_a_peer_that_answers_pings_stays(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    connection, peer = await connect(nursery)
    for _ in range(5):
        assert await peer.receive_some() == b"\x8e"
        await peer.send_all(b"\x8f")
    assert trio.current_time() >= 5 * KEEPALIVE_S
    assert not connection.is_lost
    connection.close("test")
    await peer.aclose()


async def test_ping_is_answered_at_once_also_inside_a_message(nursery: trio.Nursery) -> None:
    connection, peer = await connect(nursery)
    await peer.send_all(b"\x00\x88\x0b\x87\x07\x8e")
    assert await peer.receive_some() == b"\x07\x8f"
    connection.close("test")
    await peer.aclose()


async def test_a_peer_that_does_not_read_our_answers_is_not_read_either(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    """It asks for far more than it takes: what is queued for it stays within a bound."""
    connection, peer = await connect(nursery)
    writer = MessageWriter((), lambda own: (0, None, None), lambda handle: 0)
    size = REPLY_BYTES_MAX // 8
    await peer.send_buffers(writer.call(1, 0, "getReferenceByName", [b"name"]))
    transport: Any = connection._stream._transport
    transport.send_stream.send_all_hook = trio.sleep_forever
    for reqid in range(2, 50):
        await peer.send_buffers(writer.call(reqid, 1, "zeros", [size]))
    await trio.testing.wait_all_tasks_blocked()
    assert REPLY_BYTES_MAX < connection._broker.outgoing_bytes < REPLY_BYTES_MAX * 1.5
    connection.close("test")
    with trio.move_on_after(5):
        await connection.wait_lost()
    await trio.aclose_forcefully(peer)


async def test_a_master_with_much_to_say_waits_until_its_slave_reads_banana(nursery: trio.Nursery) -> None:
    connection, peer = await connect(nursery)
    for _ in range(100):
        connection.get_reference_by_name("n" * 32)
    assert await peer.receive_some() == b"\x8e"
    await trio.testing.wait_all_tasks_blocked()
    await peer.send_all(b"\x8f")
    received = 0
    while received < 100 * 60:
        received += len(await peer.receive_some())
    connection.close("test")
    await peer.aclose()


async def test_a_peer_that_leaves_calls_unanswered_is_dropped(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is remembered of them would grow for as long as the connection lives."""
    monkeypatch.setattr(connection_module, "UNANSWERED_MAX", 10)
    connection, peer = await connect(nursery)
    calls = [connection.get_reference_by_name("name") for _ in range(11)]
    for call in calls:
        with pytest.raises(ConnectionLostError, match="unanswered"):
            await call.result(1)
    await connection.wait_lost()
    await trio.aclose_forcefully(peer)
