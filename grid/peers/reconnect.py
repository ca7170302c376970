"""When to dial a peer again: exponential back-off, cut short when the network is seen to be back.

After a failed attempt the delay is 1 s, multiplied by e for each further failure up to a cap, and jittered by
a normal deviate of 12 %. A new connection to any peer sets the others' delays back to 1 s: what kept
them away is probably over.

Source: what Tahoe-LAFS 1.20 does, except for the cap, which is an hour there: a mount has to come back by
itself soon after its network does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import trio

from grid.crypto import TubIdentity, make_tub_identity
from grid.errors import ConnectionLostError, PeerError, RemoteProtocolError
from grid.formats.furl import Furl
from grid.transports.tub import RemoteReference, Tub
from grid.wire.schemas import RemoteInterface

INITIAL_DELAY_S: Final = 1.0
DELAY_MAX_S: Final = 60.0
FACTOR: Final = math.e
JITTER: Final = 0.12
DIAL_TIMEOUT_S: Final = 30.0  # TCP, TLS, negotiation and looking up the name, all hints at once
STABLE_S: Final = 10.0  # a connection that lived shorter than this does not count as a success


class Reconnector:
    """Back-off for a set of peers. Each takes a `Backoff` and leaves when its owner ends."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._rng = rng or random.Random()
        self._members: set[Backoff] = set()

    def join(self) -> Backoff:
        backoff = Backoff(self)
        self._members.add(backoff)
        return backoff

    def leave(self, backoff: Backoff) -> None:
        self._members.discard(backoff)

    def jittered(self, delay_s: float) -> float:
        return max(INITIAL_DELAY_S / 2, self._rng.normalvariate(delay_s, delay_s * JITTER))

    def reset_all(self) -> None:
        for backoff in self._members:
            backoff.reset()

    def reset_others(self, newly_connected: Backoff) -> None:
        for backoff in self._members:
            if backoff is not newly_connected:
                backoff.reset()


class Backoff:
    """One peer's retry timer: `connected()` upon success, `await wait()` after every loss or failed attempt."""

    def __init__(self, owner: Reconnector) -> None:
        self._owner = owner
        self._delay_s = INITIAL_DELAY_S
        self._connected_at: float | None = None
        self._flapping = False
        self._reset = trio.Event()

    def connected(self) -> None:
        """The peer is there and does what it should: for a peer that only accepts connections, do not call this."""
        self._connected_at = trio.current_time()
        if not self._flapping:  # a peer that comes and goes says nothing about the network
            self._owner.reset_others(self)

    def reset(self) -> None:
        """Try again in about a second, whatever the delay has grown to."""
        self._delay_s = INITIAL_DELAY_S
        self._reset.set()

    async def wait(self) -> None:
        if self._connected_at is not None:
            self._flapping = trio.current_time() - self._connected_at < STABLE_S
            if not self._flapping:
                self._delay_s = INITIAL_DELAY_S
            self._connected_at = None
        delay_s = self._delay_s
        self._delay_s = min(delay_s * FACTOR, DELAY_MAX_S)
        self._reset = trio.Event()
        with trio.move_on_after(self._owner.jittered(delay_s)):
            await self._reset.wait()
            # all were reset at the same moment: jitter keeps them from dialling at the same moment
            await trio.sleep(self._owner.jittered(INITIAL_DELAY_S))


async def keep_connected(
    furl: Furl,
    interface: RemoteInterface,
    *,
    serve: Callable[[Tub, RemoteReference], Awaitable[None]],
    failed: Callable[[PeerError], None],
    backoff: Backoff,
    dials: trio.CapacityLimiter,
    keepalive_s: float,
    identity: TubIdentity | None = None,
) -> NoReturn:
    """Connect to `furl`, run `serve` while the connection lasts, and again after every loss, for ever.

    `serve` is cancelled when the connection is lost; it drops the connection by returning or raising PeerError.
    `failed` hears of every attempt and every connection that ended. What is there must say that it is of `interface`:
    by that its answers are checked. Our identity towards this peer, unless it is given, is made here,
    for this run only: no other program speaks for it, and peers cannot tell by it that they serve the same user.
    """
    # one tub for all connections: it can tell the peer which of them a new one is to replace
    tub = Tub(identity or make_tub_identity(), keepalive_s=keepalive_s)
    while True:
        try:
            await _connect_once(tub, furl, interface, serve, backoff, dials)
        except PeerError as error:
            failed(error)
        else:
            failed(ConnectionLostError("connection lost"))
        await backoff.wait()


async def _connect_once(
    tub: Tub,
    furl: Furl,
    interface: RemoteInterface,
    serve: Callable[[Tub, RemoteReference], Awaitable[None]],
    backoff: Backoff,
    dials: trio.CapacityLimiter,
) -> None:
    ended: PeerError | None = None
    async with trio.open_nursery() as nursery:  # one for each connection: whatever happens, nothing of it stays
        await nursery.start(tub.run)
        try:
            async with dials:
                reference = await tub.get_reference(furl, timeout_s=DIAL_TIMEOUT_S)
            if reference.interface_name != interface.name:
                raise RemoteProtocolError("what answers there is something else")
            nursery.start_soon(_cancel_when_lost, reference, nursery.cancel_scope)
            await serve(tub, reference)
        except PeerError as error:
            ended = error  # raised outside: a nursery would wrap it into a group
        nursery.cancel_scope.cancel()
    if ended is not None:
        raise ended


async def _cancel_when_lost(reference: RemoteReference, scope: trio.CancelScope) -> None:
    await reference.wait_lost()
    scope.cancel()
