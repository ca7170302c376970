"""Statistics over the wire: a provider and a gatherer on loopback, what is kept, and what nobody honest tells."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio
import trio.testing

from grid.crypto import make_tub_identity
from grid.errors import RemoteFailure
from grid.formats.furl import Furl
from grid.peers.stats_gatherer import StatsProvider, provide_stats
from grid.server import gatherer as module
from grid.server.gatherer import DATABASE, History, Poll, StatsGatherer, checked, last_polls, polls_since
from grid.stats import Metric, Registry
from grid.transports.tub import Referenceable, Tub
from grid.wire.remote_interfaces import RIStatsProvider
from tests.grid.peers.loopback import Listener, until

METRICS = (Metric("part_bytes", "counter", "Bytes of a part."), Metric("part_things", "gauge", "Things of it.", "kind"))


class Part:
    def __init__(self) -> None:
        self.bytes = 0

    def get_stats(self) -> dict[str, float]:
        return {"part_bytes": self.bytes, "part_things.red": 2.5}


@pytest.fixture
async def gatherer(nursery: trio.Nursery, tmp_path: Path) -> Any:
    listener = Listener(nursery)
    await listener.start()
    history = History(tmp_path / DATABASE)
    gatherer = StatsGatherer(history)
    furl = Furl.parse(listener.tub.register(gatherer, "gatherer"))
    yield gatherer, furl, listener
    history.close()


async def test_a_node_tells_and_is_remembered(
    gatherer: Any, nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known by its tub, again after a lost connection; what it told can be read beside the gatherer."""
    monkeypatch.setattr("grid.peers.reconnect.INITIAL_DELAY_S", 0.02)
    service, furl, listener = gatherer
    registry, part, identity = Registry(), Part(), make_tub_identity()
    registry.register(part, METRICS)

    async def provide() -> None:
        await provide_stats(furl, registry, "my node", identity, keepalive_s=240)

    nursery.start_soon(provide)
    await until(lambda: service.provider_count == 1)
    for count in (1, 2):
        part.bytes = 1000 * count
        await service.poll()
    listener.drop()
    await until(lambda: listener.accepted == 2)
    await until(lambda: not next(iter(service._providers.values())).reference.is_lost)
    part.bytes = 3000
    await service.poll()
    (last,) = last_polls(tmp_path)
    assert (last.tub_id, last.nickname) == (identity.tub_id, "my node")
    assert last.counters["part_bytes"] == 3000 and last.stats["part_things.red"] == 2.5
    assert [poll.counters["part_bytes"] for poll in polls_since(tmp_path, 0, most=10)] == [1000, 2000, 3000]
    assert last_polls(tmp_path, before=last.at)[0].counters["part_bytes"] == 2000
    nursery.cancel_scope.cancel()


async def test_a_node_is_asked_when_it_comes_and_not_again_because_it_came_again(
    gatherer: Any, nursery: trio.Nursery, tmp_path: Path
) -> None:
    service, furl, _ = gatherer
    await nursery.start(service.run)
    tub = Tub(make_tub_identity())
    await nursery.start(tub.run)
    reference = await tub.get_reference(furl)
    for nickname in (b"first", b"second"):
        await reference.call("provide", StatsProvider(Registry()), nickname, timeout_s=5)
        await until(lambda: last_polls(tmp_path))
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert [poll.nickname for poll in polls_since(tmp_path, 0, most=10)] == ["first"]
    nursery.cancel_scope.cancel()


async def test_a_node_that_is_gone_is_not_asked_again(gatherer: Any, nursery: trio.Nursery) -> None:
    service, furl, listener = gatherer
    tub = Tub(make_tub_identity())
    await nursery.start(tub.run)
    reference = await tub.get_reference(furl)
    await reference.call("provide", StatsProvider(Registry()), b"x" * 300 + b"\n", timeout_s=5)
    assert len(next(iter(service._providers.values())).nickname) == module.NICKNAME_CHARACTERS_MAX
    listener.drop()
    await until(lambda: reference.is_lost)
    await until(lambda: next(iter(service._providers.values())).reference.is_lost)
    await service.poll()
    assert service.provider_count == 0
    nursery.cancel_scope.cancel()


async def test_providers_are_bounded(gatherer: Any, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROVIDERS_MAX", 1)
    _, furl, _ = gatherer
    tubs = [Tub(make_tub_identity()) for _ in range(2)]
    for tub in tubs:
        await nursery.start(tub.run)
    first, second = [await tub.get_reference(furl) for tub in tubs]
    for _ in range(2):
        await first.call("provide", StatsProvider(Registry()), b"one", timeout_s=5)
    with pytest.raises(RemoteFailure, match="too many"):
        await second.call("provide", StatsProvider(Registry()), b"two", timeout_s=5)
    nursery.cancel_scope.cancel()


class Strange(Referenceable):
    remote_interface: ClassVar[Any] = RIStatsProvider

    async def remote_get_stats(self) -> Any:
        return {b"counters": "no dict"}


async def test_nonsense_is_not_kept(gatherer: Any, nursery: trio.Nursery, tmp_path: Path) -> None:
    service, furl, _ = gatherer
    tub = Tub(make_tub_identity())
    await nursery.start(tub.run)
    await (await tub.get_reference(furl)).call("provide", Strange(), b"one", timeout_s=5)
    await service.poll()
    assert last_polls(tmp_path) == [] and service.provider_count == 1
    nursery.cancel_scope.cancel()


def test_only_numbers_with_names_are_kept() -> None:
    told: dict[bytes, dict[bytes, Any]] = {
        b"counters": {
            b"good": 1,
            b"none": None,
            b"x" * 300: 1,
            b"n\xff": 1,
            b"new\nline": 1,
            b"text": b"2",
            b"yes": True,
        },
        b"stats": {b"float": 0.5, b"nan": math.nan, b"inf": math.inf, b"huge": 1 << 80},
        b"else": {b"a": 1},
    }
    assert checked(told) == ({"good": 1}, {"float": 0.5})
    assert checked({}) == ({}, {})
    many = {b"n%d" % number: number for number in range(module.NUMBERS_MAX + 10)}
    assert len(checked({b"counters": many})[0]) == module.NUMBERS_MAX


def test_the_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows, and by bytes; the oldest goes first."""
    monkeypatch.setattr(module, "HISTORY_ROWS_MAX", 500)
    monkeypatch.setattr(module, "TRIM_EVERY", 10)
    history = History(tmp_path / DATABASE)
    for number in range(1200):
        history.add(Poll(float(number), "tub", "name", {"n": number}, {}))
    kept = polls_since(tmp_path, 0, most=10_000)
    assert 400 <= len(kept) <= 510 and kept[-1].counters["n"] == 1199
    assert [poll.at for poll in kept] == sorted(poll.at for poll in kept)
    monkeypatch.setattr(module, "HISTORY_BYTES_MAX", 2000)
    history.trim()
    assert len(polls_since(tmp_path, 0, most=10_000)) < 100
    history.close()


def test_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.Error):
        last_polls(tmp_path)
