"""Telling a statistics gatherer of ourselves: RIStatsProvider, and the connection over which it is polled.

    provide(provider, nickname)     ours, with every new connection; nobody waits for an answer
    provider.get_stats()            the gatherer's, each minute: {"counters": {name: number}, "stats": {name: number}}

A gatherer knows nodes by their tubs, so the node's own identity is used.
Source: the statistics of Tahoe-LAFS up to 1.15.
"""

from __future__ import annotations

import logging
from typing import ClassVar, Final, NoReturn

import trio

from grid.crypto import TubIdentity
from grid.errors import PeerError
from grid.formats.furl import Furl
from grid.peers.reconnect import Reconnector, keep_connected
from grid.stats import Registry, counters_and_gauges
from grid.transports.tub import Referenceable, RemoteReference, Tub
from grid.wire.remote_interfaces import RIStatsGatherer, RIStatsProvider
from grid.wire.schemas import RemoteInterface

log = logging.getLogger(__name__)

PROVIDE_TIMEOUT_S: Final = 60.0

Told = dict[bytes, dict[bytes, float]]


class StatsProvider(Referenceable):
    """RIStatsProvider over a registry."""

    remote_interface: ClassVar[RemoteInterface | None] = RIStatsProvider

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def remote_get_stats(self) -> Told:
        growing, current = counters_and_gauges(self._registry.collect())
        return {b"counters": _for_the_wire(growing), b"stats": _for_the_wire(current)}


def _for_the_wire(values: dict[str, float]) -> dict[bytes, float]:
    return {key.encode(): value if type(value) is int else float(value) for key, value in values.items()}


async def provide_stats(
    furl: Furl, registry: Registry, nickname: str, identity: TubIdentity, *, keepalive_s: float
) -> NoReturn:
    """Stay connected to the gatherer at `furl`, until cancelled."""
    provider, backoff = StatsProvider(registry), Reconnector().join()

    async def serve(_: Tub, gatherer: RemoteReference) -> None:
        await gatherer.call("provide", provider, nickname.encode(), timeout_s=PROVIDE_TIMEOUT_S)
        backoff.connected()
        log.info("statistics go to a gatherer")
        await trio.sleep_forever()

    def failed(error: PeerError) -> None:
        log.info("statistics gatherer: %s", error)

    await keep_connected(
        furl,
        RIStatsGatherer,
        serve=serve,
        failed=failed,
        backoff=backoff,
        dials=trio.CapacityLimiter(1),
        keepalive_s=keepalive_s,
        identity=identity,
    )
