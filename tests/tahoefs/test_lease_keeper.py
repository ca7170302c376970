"""The mount's lease renewal: what is renewed when, going on after a stop, and what `status` says of it."""

from __future__ import annotations

from typing import Any, cast

import trio
import trio.testing

import grid
from grid.check_history import CheckHistory
from grid.nodes.checker import Checker
from grid.nodes.dirnode import DirectoryNode
from grid.nodes.nodemaker import NodeMaker
from tahoefs.lease_keeper import FIRST_AFTER_S, PACE_S, RETRY_S, LeaseKeeper
from tests.grid.nodes.test_checker import upload
from tests.grid.nodes.test_dirnode import maker
from tests.grid.operations import mutable_grid
from tests.memory_server import MemoryBroker

WEEK_S = 7 * 86400.0
FILES = 3


class Client:
    """The part of a GridClient that a keeper uses."""

    def __init__(self, nodemaker: NodeMaker) -> None:
        self.nodemaker = nodemaker


class Mounted:
    """A tree of FILES files in one directory, and who keeps its leases."""

    def __init__(self) -> None:
        self.broker = MemoryBroker(10)
        self.nodes = maker(self.broker)
        self.history = CheckHistory(None)
        self.root: DirectoryNode

    async def fill(self) -> Mounted:
        self.root = await self.nodes.create_dirnode({f"f{n}": (await upload(self.nodes, 100, n), {}) for n in range(3)})
        for server in self.broker.servers:
            server.calls.clear()
        return self

    def keeper(self) -> LeaseKeeper:
        checker = Checker(self.broker, mutable_grid.SECRETS, self.nodes, self.history, clock=trio.current_time)
        client = cast(grid.GridClient, Client(self.nodes))
        return LeaseKeeper(client, checker, self.history, self.root.cap, WEEK_S, clock=trio.current_time)

    def renewals(self) -> int:
        """Objects renewed since last asked: each on ten servers."""
        count = sum(server.calls.pop("add_lease", 0) for server in self.broker.servers)
        return count // 10


async def test_once_a_week(autojump_clock: trio.testing.MockClock) -> None:
    mounted = await Mounted().fill()
    keeper = mounted.keeper()
    assert keeper.status()["oldest_s"] is None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await trio.sleep(FIRST_AFTER_S + 60)
        assert mounted.renewals() == 1 + FILES
        await trio.sleep(WEEK_S - 3600)
        assert mounted.renewals() == 0
        status = keeper.status()
        assert WEEK_S - 3600 < status["oldest_s"] < WEEK_S and not status["walking"]
        await trio.sleep(2 * 3600)
        assert mounted.renewals() == 1 + FILES and keeper.status()["oldest_s"] < 7200
        nursery.cancel_scope.cancel()
    assert keeper.status()["oldest_s"] is None, "closed"


async def test_goes_on_where_it_was_stopped(autojump_clock: trio.testing.MockClock) -> None:
    mounted = await Mounted().fill()
    with trio.move_on_after(2.5 * PACE_S):
        await mounted.keeper().renew_all()
    done = mounted.renewals()
    assert 0 < done < 1 + FILES
    assert await mounted.keeper().renew_all() == 0
    assert mounted.renewals() == 1 + FILES - done
    assert await mounted.keeper().renew_all() == 0
    assert mounted.renewals() == 0


async def test_what_fails_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    mounted = await Mounted().fill()
    keeper = mounted.keeper()
    await keeper.renew_all()
    await trio.sleep(WEEK_S)
    mounted.renewals()
    mounted.broker.servers[4].fail_on.add("add_lease")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await trio.sleep(FIRST_AFTER_S + 60)
        assert keeper.status()["oldest_s"] > WEEK_S, "not everywhere is not renewed"
        mounted.broker.servers[4].fail_on.clear()
        await trio.sleep(RETRY_S + 60)
        assert keeper.status()["oldest_s"] < RETRY_S
        nursery.cancel_scope.cancel()


async def test_what_is_gone_no_longer_counts(autojump_clock: trio.testing.MockClock) -> None:
    mounted = await Mounted().fill()
    keeper = mounted.keeper()
    await keeper.renew_all()
    await mounted.root.delete("f0")
    await trio.sleep(WEEK_S)
    await keeper.renew_all()
    assert keeper.status()["oldest_s"] < 60


async def test_another_mount_has_its_own_dates(autojump_clock: trio.testing.MockClock) -> None:
    mounted = await Mounted().fill()
    await mounted.keeper().renew_all()
    other: Any = mounted.keeper()
    other._key = bytes(16)
    assert other.status()["oldest_s"] is None


async def test_literals_need_none(autojump_clock: trio.testing.MockClock) -> None:
    mounted = await Mounted().fill()
    await mounted.root.set_uri("lit", "URI:LIT:nq")
    mounted.renewals()
    await mounted.keeper().renew_all()
    assert mounted.renewals() == 1 + FILES
