"""Two of our own tubs over real sockets and TLS, either one the master."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import trio
import trio.testing

from grid.crypto import make_tub_identity
from grid.errors import (
    ConnectionLostError,
    FormatError,
    NegotiationError,
    PeerTimeoutError,
    RemoteFailure,
    Violation,
)
from grid.transports.tls import TubTLS
from grid.transports.tub import RemoteReference, Tub
from grid.wire.references import Referenceable
from tests.grid.transports.conftest import FAR_S, StartTub, identity_beside
from tests.grid.transports.targets import Target

DIALLER_IS_MASTER = pytest.mark.parametrize("dialler_is_master", [True, False], ids=["as master", "as slave"])


async def dial(start_tub: StartTub, dialler_is_master: bool) -> tuple[Tub, Tub, Target, RemoteReference]:
    """(dialler, acceptor, the acceptor's target, the dialler's reference to it)."""
    acceptor = await start_tub(listening=True)
    target = Target()
    furl = acceptor.register(target)
    dialler = await start_tub(identity_beside(acceptor.tub_id, greater=dialler_is_master))
    return dialler, acceptor, target, await dialler.get_reference(furl, timeout_s=FAR_S)


@DIALLER_IS_MASTER
async def test_calls_both_ways(start_tub: StartTub, dialler_is_master: bool) -> None:
    _, acceptor, target, reference = await dial(start_tub, dialler_is_master)
    assert reference.tub_id == acceptor.tub_id
    value = [1, b"bytes", "text", None, True, 1.5, {b"k": (1, 2)}, {3}, 1 << 70]
    assert await reference.call("echo", value, timeout_s=FAR_S) == value
    mine = Target()
    await reference.call("keep", mine, timeout_s=FAR_S)
    (back,) = target.kept
    assert await back.call("echo", "the other way", timeout_s=FAR_S) == "the other way"
    assert await reference.call("echo", mine, timeout_s=FAR_S) is mine


@DIALLER_IS_MASTER
async def test_large_strings(start_tub: StartTub, dialler_is_master: bool) -> None:
    _, _, _, reference = await dial(start_tub, dialler_is_master)
    data = bytes(range(256)) * 20_000
    assert await reference.call("echo", memoryview(data), timeout_s=FAR_S) == data
    pending = [reference.send("length", data[:size]) for size in (0, 1, 8191, 8192, 16384, 300_001, 1_000_003)]
    assert [await call.result(FAR_S) for call in pending] == [0, 1, 8191, 8192, 16384, 300_001, 1_000_003]


async def test_handlers_start_in_the_order_of_the_calls(start_tub: StartTub) -> None:
    _, _, target, reference = await dial(start_tub, True)
    calls = [reference.send("note", i) for i in range(300)]
    for call in calls:
        await call.result(FAR_S)
    assert target.seen == list(range(300))


async def test_a_handler_that_waits_holds_up_nobody(start_tub: StartTub) -> None:
    _, _, _, reference = await dial(start_tub, True)
    waiting = reference.send("wait")
    assert await reference.call("echo", 1, timeout_s=FAR_S) == 1
    assert not waiting.is_done
    await reference.call("open_gate", timeout_s=FAR_S)
    assert await waiting.result(FAR_S) == "waited"


async def test_errors(start_tub: StartTub, caplog: pytest.LogCaptureFixture) -> None:
    _, _, _, reference = await dial(start_tub, True)
    with pytest.raises(RemoteFailure) as failure:
        await reference.call("boom", timeout_s=FAR_S)
    assert failure.value.short_type == "NoSpace"
    assert len(failure.value.message) <= 1000
    with pytest.raises(RemoteFailure, match="ZeroDivisionError") as failure:
        await reference.call("bug", timeout_s=FAR_S)
    assert "secret" not in failure.value.message
    with pytest.raises(RemoteFailure, match="Violation"):
        await reference.call("no_such_method", timeout_s=FAR_S)
    with pytest.raises(Violation):
        reference.send("echo", object())
    with pytest.raises(PeerTimeoutError):
        await reference.call("wait", timeout_s=0)
    assert await reference.call("echo", 1, timeout_s=FAR_S) == 1


async def test_unknown_name_is_a_remote_failure(start_tub: StartTub) -> None:
    dialler, acceptor, target, _ = await dial(start_tub, True)
    furl = acceptor.register(target)
    with pytest.raises(RemoteFailure) as failure:
        await dialler.get_reference(furl[:-4] + "aaaa", timeout_s=FAR_S)
    assert failure.value.short_type == "KeyError"
    assert furl[-25:-4] not in str(failure.value)
    with pytest.raises(FormatError):
        await dialler.get_reference("pb://nonsense")


async def test_all_furls_of_a_tub_share_one_connection(start_tub: StartTub) -> None:
    acceptor, dialler = await start_tub(listening=True), await start_tub()
    furls = [acceptor.register(Target()) for _ in range(5)]
    references: list[RemoteReference] = []

    async def get(furl: str) -> None:
        references.append(await dialler.get_reference(furl, timeout_s=FAR_S))

    async with trio.open_nursery() as nursery:
        for furl in furls:
            nursery.start_soon(get, furl)
    assert len({reference.clid for reference in references}) == 5
    assert len({id(reference._connection) for reference in references}) == 1


@DIALLER_IS_MASTER
async def test_loss_fails_what_is_outstanding_and_dialling_again_works(
    start_tub: StartTub, dialler_is_master: bool
) -> None:
    dialler, acceptor, target, reference = await dial(start_tub, dialler_is_master)
    await reference.call("keep", Referenceable(), timeout_s=FAR_S)
    (canary,) = target.kept
    waiting = reference.send("wait")
    reference._connection.close("test")
    with trio.fail_after(FAR_S):
        await reference.wait_lost()
        await canary.wait_lost()
    with pytest.raises(ConnectionLostError):
        await waiting.result(FAR_S)
    with pytest.raises(ConnectionLostError):
        await reference.call("echo", 1, timeout_s=FAR_S)
    again = await dialler.get_reference(acceptor.register(target), timeout_s=FAR_S)
    assert await again.call("echo", 2, timeout_s=FAR_S) == 2
    assert not again.is_lost


async def test_the_connection_of_an_inbound_dial_is_used(start_tub: StartTub) -> None:
    """Neither dials what is connected already, whoever dialled first."""
    dialler, acceptor, _, reference = await dial(start_tub, True)
    mine = dialler.register(Target())
    back = await acceptor.get_reference(mine, timeout_s=FAR_S)  # no hints: it could not be dialled
    assert await back.call("echo", 1, timeout_s=FAR_S) == 1
    assert not reference.is_lost


@DIALLER_IS_MASTER
async def test_both_dial_at_once(start_tub: StartTub, dialler_is_master: bool) -> None:
    a = await start_tub(listening=True)
    b = await start_tub(identity_beside(a.tub_id, greater=dialler_is_master), listening=True)
    furls = [a.register(Target()), b.register(Target())]
    results: dict[int, Any] = {}

    async def get(index: int, tub: Tub, furl: str) -> None:
        reference = await tub.get_reference(furl, timeout_s=FAR_S)
        results[index] = await reference.call("echo", index, timeout_s=FAR_S)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(get, 0, b, furls[0])
        nursery.start_soon(get, 1, a, furls[1])
    assert results == {0: 0, 1: 1}


async def test_two_hints_make_one_connection(start_tub: StartTub, nursery: trio.Nursery) -> None:
    acceptor, dialler = await start_tub(listening=True), await start_tub()
    furl = acceptor.register(Target())
    (other,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, acceptor.accept, [other])
    both = furl.replace("@", f"@tcp:127.0.0.1:{other.socket.getsockname()[1]},tcp:127.0.0.1:1,")
    reference = await dialler.get_reference(both, timeout_s=FAR_S)
    assert await reference.call("echo", 1, timeout_s=FAR_S) == 1
    assert not reference.is_lost


async def test_nobody_there(start_tub: StartTub) -> None:
    dialler = await start_tub()
    nowhere = "a" * 32
    with pytest.raises(ConnectionLostError, match="cannot connect"):
        await dialler.get_reference(f"pb://{nowhere}@tcp:127.0.0.1:1/name", timeout_s=FAR_S)
    with pytest.raises(ConnectionLostError, match="no location hints"):
        await dialler.get_reference(f"pb://{nowhere}@tor:somewhere.onion:1/name", timeout_s=FAR_S)


async def test_another_tub_answers(start_tub: StartTub) -> None:
    acceptor, dialler = await start_tub(listening=True), await start_tub()
    furl = acceptor.register(Target())
    with pytest.raises(NegotiationError, match="unknown TubID"):
        await dialler.get_reference(furl.replace(acceptor.tub_id, "a" * 32), timeout_s=FAR_S)


async def test_a_silent_acceptor_costs_the_deadline_only(start_tub: StartTub, nursery: trio.Nursery) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    dialler = await start_tub()
    with pytest.raises(PeerTimeoutError):
        await dialler.get_reference(f"pb://{'a' * 32}@tcp:127.0.0.1:{port}/name", timeout_s=0.05)
    await listener.aclose()


async def test_stopping_a_tub_ends_its_connections() -> None:
    acceptor = Tub(make_tub_identity(), location="tcp:127.0.0.1:1")
    dialler = Tub(make_tub_identity())
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, acceptor.accept, [listener])
        await nursery.start(acceptor.run)
        furl = acceptor.register(Target()).replace(":1/", f":{listener.socket.getsockname()[1]}/")
        async with trio.open_nursery() as dialling:
            await dialling.start(dialler.run)
            reference = await dialler.get_reference(furl, timeout_s=FAR_S)
            waiting = reference.send("wait")
            dialling.cancel_scope.cancel()
        assert reference.is_lost
        with pytest.raises(ConnectionLostError):
            await waiting.result(FAR_S)
        with pytest.raises(ConnectionLostError, match="not running"):
            await dialler.get_reference(furl, timeout_s=FAR_S)
        nursery.cancel_scope.cancel()


async def test_released_objects_are_forgotten(start_tub: StartTub) -> None:
    _, acceptor, _, reference = await dial(start_tub, True)
    for _ in range(200):
        (await reference.call("new_object", timeout_s=FAR_S)).release()
    gc.collect()
    (connection,) = acceptor._connections.values()
    assert len(connection._broker._tables._ours) < 50


async def test_garbage_after_negotiation_ends_that_connection_only(
    start_tub: StartTub, caplog: pytest.LogCaptureFixture
) -> None:
    _, acceptor, _, reference = await dial(start_tub, True)
    other = await start_tub()
    kept = await other.get_reference(acceptor.register(Target()), timeout_s=FAR_S)
    await reference._connection._stream.send_all(b"\x8b")
    with trio.fail_after(FAR_S):
        await reference.wait_lost()
    assert await kept.call("echo", 1, timeout_s=FAR_S) == 1


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n\r\n", b"GET /id/x HTTP/1.1\r\n\r\n", b"x" * 5000, b"\x16\x03\x01"]
)
async def test_strangers_are_refused(start_tub: StartTub, sent: bytes) -> None:
    acceptor = await start_tub()
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all(sent)
    await ours.send_eof()
    await acceptor.accept(theirs)
    received = b""
    while data := await ours.receive_some():
        received += data
    assert received == b"" if sent[:1] == b"\x16" else received.startswith(b"HTTP/1.1 500 ")


async def test_both_sides_see_each_others_certificate() -> None:
    client, server = make_tub_identity(), make_tub_identity()
    ours, theirs = trio.testing.memory_stream_pair()
    streams: dict[str, Any] = {}

    async def shake(name: str, handshake: Any, transport: Any) -> None:
        streams[name] = await handshake(transport)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake, "client", TubTLS(client).dial, ours)
        nursery.start_soon(shake, "server", TubTLS(server).accept, theirs)
    data = bytes(range(256)) * 5000

    async def send() -> None:
        await streams["client"].send_buffers([b"a" * 10, memoryview(data), b"b", data, b""])
        await streams["client"].aclose()

    received = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while piece := await streams["server"].receive_some():
            received += piece
    assert received == b"a" * 10 + data + b"b" + data
    assert streams["server"].peer_certificate_der == client.certificate_der
    assert streams["client"].peer_certificate_der == server.certificate_der
    await streams["server"].aclose()


@DIALLER_IS_MASTER
async def test_a_tub_that_drains_answers_what_it_was_asked(
    start_tub: StartTub, dialler_is_master: bool, nursery: trio.Nursery
) -> None:
    dialler, acceptor, target, reference = await dial(start_tub, dialler_is_master)
    waiting, large = reference.send("wait"), reference.send("zeros", 3_000_000)
    assert await reference.call("echo", 1, timeout_s=FAR_S) == 1  # so all three have arrived
    drained = trio.Event()

    async def drain() -> None:
        await acceptor.drain()
        drained.set()

    nursery.start_soon(drain)
    assert len(await large.result(FAR_S)) == 3_000_000
    late = reference.send("echo", 2)
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert not drained.is_set()
    target.gate.set()
    assert await waiting.result(FAR_S) == "waited"
    await drained.wait()
    with pytest.raises(ConnectionLostError):
        await late.result(FAR_S)
    with pytest.raises((ConnectionLostError, PeerTimeoutError)):
        await dialler.get_reference(acceptor.register(target), timeout_s=FAR_S)
