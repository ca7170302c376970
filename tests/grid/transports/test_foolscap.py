"""Our tub against a real foolscap tub, either one the master and either one the dialler."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from grid.errors import ConnectionLostError, RemoteFailure
from grid.transports.tub import RemoteReference, Tub
from grid.wire.references import Referenceable
from tests.grid.transports.conftest import FAR_S, FoolscapPeer, StartTub, identity_beside
from tests.grid.transports.targets import Target

pytestmark = pytest.mark.interop
WE_ARE_MASTER = pytest.mark.parametrize("we_are_master", [True, False], ids=["as master", "as slave"])


async def dial(start_tub: StartTub, peer: FoolscapPeer, we_are_master: bool) -> tuple[Tub, RemoteReference]:
    tub = await start_tub(identity_beside(peer.tub_id, greater=we_are_master), listening=True)
    return tub, await tub.get_reference(peer.furl, timeout_s=FAR_S)


@WE_ARE_MASTER
async def test_values_and_errors(start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool) -> None:
    _, reference = await dial(start_tub, foolscap_peer, we_are_master)
    value = [1, -1, b"bytes", b"list", "text", "ü", None, True, 1.5, {b"k": (1, 2)}, {3}, frozenset((4,)), 1 << 70]
    assert await reference.call("echo", value, timeout_s=FAR_S) == value
    with pytest.raises(RemoteFailure) as failure:
        await reference.call("boom", timeout_s=FAR_S)
    assert failure.value.short_type == "ValueError"
    assert failure.value.message.startswith("boom boom")
    with pytest.raises(RemoteFailure):
        await reference.call("no_such_method", timeout_s=FAR_S)
    assert await reference.call("echo", 1, timeout_s=FAR_S) == 1


@WE_ARE_MASTER
async def test_large_strings(start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool) -> None:
    _, reference = await dial(start_tub, foolscap_peer, we_are_master)
    data = bytes(range(256)) * 12_345
    assert await reference.call("echo", memoryview(data), timeout_s=FAR_S) == data
    pending = [reference.send("zeros", 350_000 + i) for i in range(20)]
    assert [len(await call.result(FAR_S)) for call in pending] == [350_000 + i for i in range(20)]


@WE_ARE_MASTER
async def test_it_calls_us(start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool) -> None:
    _, reference = await dial(start_tub, foolscap_peer, we_are_master)
    mine = Target()
    assert await reference.call("call_me", mine, "echo", [[1, b"x", "y"]], timeout_s=FAR_S) == [1, b"x", "y"]
    # Before it answers, it calls us, and waits: whoever waits must go on serving.
    answer = await reference.call("call_me", mine, "boom", [], timeout_s=FAR_S)
    assert "NoSpace" in answer
    assert "Violation" in await reference.call("call_me", mine, "no_such_method", [], timeout_s=FAR_S)
    await reference.call("call_in_order", mine, 200, timeout_s=FAR_S)
    assert mine.seen == list(range(200))
    assert await reference.call("echo", mine, timeout_s=FAR_S) is mine


@WE_ARE_MASTER
async def test_disconnect_and_reconnect(start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool) -> None:
    tub, reference = await dial(start_tub, foolscap_peer, we_are_master)
    await reference.call("keep", Referenceable(), timeout_s=FAR_S)
    waiting = reference.send("never")
    reference.send("drop")
    with trio.fail_after(FAR_S):
        await reference.wait_lost()
    with pytest.raises(ConnectionLostError):
        await waiting.result(FAR_S)
    again = await tub.get_reference(foolscap_peer.furl, timeout_s=FAR_S)
    assert await again.call("losses", timeout_s=FAR_S) == 1  # its canary sang
    again._connection.close("test")
    await again.wait_lost()
    third = await tub.get_reference(foolscap_peer.furl, timeout_s=FAR_S)
    assert await third.call("how_many_brokers", timeout_s=FAR_S) == 1


@WE_ARE_MASTER
async def test_it_dials_us(start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool) -> None:
    """We accept: another tub of ours tells it where."""
    acceptor = await start_tub(identity_beside(foolscap_peer.tub_id, greater=we_are_master), listening=True)
    furl = acceptor.register(Target())
    _, reference = await dial(start_tub, foolscap_peer, True)
    assert await reference.call("dial", furl.encode(), timeout_s=FAR_S) is True
    # And back, over the same connection.
    back = await acceptor.get_reference(foolscap_peer.furl, timeout_s=FAR_S)
    assert await back.call("how_many_brokers", timeout_s=FAR_S) == 2


@WE_ARE_MASTER
async def test_two_hints_make_one_connection(
    start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool
) -> None:
    tub = await start_tub(identity_beside(foolscap_peer.tub_id, greater=we_are_master))
    furl = foolscap_peer.furl
    port = furl.partition("127.0.0.1:")[2].partition("/")[0]
    both = furl.replace("@tcp:", f"@tcp:localhost:{port},tcp:")
    reference = await tub.get_reference(both, timeout_s=FAR_S)
    assert await reference.call("how_many_brokers", timeout_s=FAR_S) == 1
    assert not reference.is_lost


@WE_ARE_MASTER
async def test_a_second_life_replaces_the_first(
    start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool
) -> None:
    """Same identity, new process as far as the peer can tell: it must not hold on to the old connection."""
    identity = identity_beside(foolscap_peer.tub_id, greater=we_are_master)
    first = await (await start_tub(identity)).get_reference(foolscap_peer.furl, timeout_s=FAR_S)
    second = await (await start_tub(identity)).get_reference(foolscap_peer.furl, timeout_s=FAR_S)
    with trio.fail_after(FAR_S):
        await first.wait_lost()
    assert await second.call("how_many_brokers", timeout_s=FAR_S) == 1


@WE_ARE_MASTER
async def test_a_peer_that_has_forgotten_us_is_replaced(
    start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool
) -> None:
    """We lost a connection of which the peer does not know the end yet, and dial again."""
    tub, reference = await dial(start_tub, foolscap_peer, we_are_master)
    connection: Any = reference._connection
    tub._connections.clear()
    connection._lose()
    if we_are_master:
        tub._records.forget_live(foolscap_peer.tub_id, connection.agreement.connection_number)
    again = await tub.get_reference(foolscap_peer.furl, timeout_s=FAR_S)
    assert await again.call("echo", 1, timeout_s=FAR_S) == 1
    assert await again.call("how_many_brokers", timeout_s=FAR_S) == 1


async def test_released_objects_are_forgotten(start_tub: StartTub, foolscap_peer: FoolscapPeer) -> None:
    _, reference = await dial(start_tub, foolscap_peer, True)
    for _ in range(100):
        (await reference.call("new_object", timeout_s=FAR_S)).release()
    assert await reference.call("echo", 1, timeout_s=FAR_S) == 1
    assert len(reference._connection._broker._tables._theirs) < 50


@WE_ARE_MASTER
async def test_much_to_say_at_once_after_the_decision(
    start_tub: StartTub, foolscap_peer: FoolscapPeer, we_are_master: bool
) -> None:
    """Until a slave has read the master's decision, it takes banana for text, and not more than 4096 bytes of it."""
    tub = await start_tub(identity_beside(foolscap_peer.tub_id, greater=we_are_master))
    references: list[RemoteReference] = []

    async def get() -> None:
        references.append(await tub.get_reference(foolscap_peer.furl, timeout_s=FAR_S))

    async with trio.open_nursery() as nursery:
        for _ in range(200):
            nursery.start_soon(get)
    assert {reference.clid for reference in references} == {1}
