"""Deep checks on servers in memory: order, bounded memory, going on after an interruption, what counts as what."""

from __future__ import annotations

import io
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from grid.check_history import RESUME_WITHIN_S, CheckHistory
from grid.formats.caps import Cap, CHKReadCap, LiteralCap
from grid.nodes.checker import Checker
from grid.nodes.nodemaker import NodeMaker
from grid.nodes.traversal import walk
from tahoefs.deep_check import OBJECTS_AT_ONCE, WINDOW, DeepCheck, Totals, Wish, root_key
from tahoefs.progress import Progress
from tests.grid.nodes.test_checker import holders, upload
from tests.grid.nodes.test_dirnode import maker
from tests.grid.operations import mutable_grid
from tests.memory_server import MemoryBroker

LIT: Final = LiteralCap(b"lit")
OBJECTS: Final = 10_000 if os.environ.get("TAHOEFS_SOAK") else 400
PER_DIRECTORY: Final = 100
GROWTH_BYTES_MAX: Final = 256 << 10  # the paths of unhealthy objects, up to LISTED_MAX; nothing else may grow


class Deep:
    """A tree, and deep checks of it that may be stopped."""

    def __init__(self, tmp_path: Path, servers: int = 10) -> None:
        self.broker = MemoryBroker(servers)
        self.nodes: NodeMaker = maker(self.broker)
        self.history = CheckHistory(tmp_path)
        self.units: list[dict[str, Any]] = []

    async def check(
        self, root: Cap, wish: Wish | None = None, *, resume: bool = False, stop_after: int | None = None
    ) -> Totals:
        self.units.clear()

        def emit(unit: dict[str, Any]) -> None:
            self.units.append(unit)
            if len(self.units) == stop_after:
                scope.cancel()

        checker = Checker(self.broker, mutable_grid.SECRETS, self.nodes, self.history)
        check = DeepCheck(checker, self.history, wish or Wish(), emit)
        with trio.CancelScope() as scope:
            await check.run(root_key(root), walk(self.nodes, root), resume=resume)
        return check.totals

    def asked(self) -> int:
        """How often servers were asked since last time what they hold."""
        return sum(server.calls.pop("get_buckets", 0) for server in self.broker.servers)


async def test_in_the_order_of_the_walk(tmp_path: Path) -> None:
    deep = Deep(tmp_path)
    below = await deep.nodes.create_dirnode({f"g{n:02}": (await upload(deep.nodes, 100, n), {}) for n in range(30)})
    children = {f"f{n:03}": (await upload(deep.nodes, 100, 100 + n), {}) for n in range(WINDOW + 20)}
    root = await deep.nodes.create_dirnode({**children, "below": (below.cap, {}), "lit": (LIT, {})})
    slow = holders(deep.broker, children["f003"][0].storage_index)[0]
    slow.latency_s = 0.01
    totals = await deep.check(root.cap)
    names = ["/".join(unit["path"]) for unit in deep.units]
    assert names == ["", *sorted(children), "lit", "below", *(f"below/g{n:02}" for n in range(30))]
    assert (totals.objects, totals.checked, totals.healthy) == (len(names), len(names) - 1, len(names) - 1)
    assert totals.healthy_all and totals.recoverable_all


async def test_damage_is_told_apart(tmp_path: Path) -> None:
    """A share lost, a file lost, a directory lost, and what was repaired of that."""
    deep = Deep(tmp_path)
    caps = [await upload(deep.nodes, 100, n) for n in range(3)]
    gone = await deep.nodes.create_dirnode({"unseen": (caps[0], {})})
    files = {f"f{n}": (cap, {}) for n, cap in enumerate(caps)}
    root = await deep.nodes.create_dirnode({**files, "gone": (gone.cap, {})})
    holders(deep.broker, caps[0].storage_index)[0].immutable.pop(caps[0].storage_index or b"")
    for server in deep.broker.servers:
        server.immutable.pop(caps[1].storage_index or b"", None)
        del server.slots[gone.get_storage_index() or b""]
    deep.nodes = maker(deep.broker)
    totals = await deep.check(root.cap)
    assert (totals.checked, totals.healthy, totals.unhealthy, totals.unrecoverable, totals.unread) == (5, 2, 3, 2, 1)
    assert totals.unhealthy_paths == [["f0"], ["f1"], ["gone"]] and not totals.recoverable_all
    totals = await deep.check(root.cap, Wish(repair=True, add_lease=True))
    assert (totals.repairs_attempted, totals.repairs_successful, totals.unhealthy) == (1, 1, 2)
    assert totals.leases_renewed == 3 * 10


async def test_what_may_not_be_repaired_does_not_end_it(tmp_path: Path) -> None:
    deep = Deep(tmp_path)
    root = await deep.nodes.create_dirnode({"f": (await upload(deep.nodes, 100), {})})
    holders(deep.broker, root.get_storage_index())[0].slots.clear()
    totals = await deep.check(root.cap.readonly, Wish(repair=True))
    assert (totals.checked, totals.unhealthy, totals.repairs_attempted) == (2, 1, 0)
    assert "write cap" in deep.units[0]["note"]


def lost_file(number: int) -> CHKReadCap:
    """Checking it asks every server, as for any file."""
    return CHKReadCap(number.to_bytes(16, "big"), bytes(32), 3, 10, 1000)


async def big_tree(nodes: NodeMaker, objects: int) -> Cap:
    directories = {}
    for first in range(0, objects, PER_DIRECTORY):
        files = {f"f{n}": (lost_file(n), {}) for n in range(first, first + PER_DIRECTORY)}
        directories[f"d{first}"] = ((await nodes.create_immutable_dirnode(files)).cap, {})
    return (await nodes.create_immutable_dirnode(directories)).cap


async def test_memory_does_not_grow_with_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    for objects in (OBJECTS // 4, OBJECTS):
        deep = Deep(tmp_path / str(objects), servers=3)
        root = await big_tree(deep.nodes, objects)
        deep.nodes = maker(deep.broker)
        monkeypatch.setattr(deep, "units", _Counted())
        tracemalloc.start()
        try:
            totals = await deep.check(root)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert totals.checked == objects + 1 + objects // PER_DIRECTORY
    assert peaks[1] - peaks[0] < GROWTH_BYTES_MAX, peaks


async def test_a_big_one_interrupted_and_resumed(tmp_path: Path) -> None:
    """Twice; nothing is checked twice but what was under way."""
    deep = Deep(tmp_path, servers=3)
    root = await big_tree(deep.nodes, OBJECTS)
    directories = 1 + OBJECTS // PER_DIRECTORY
    asked = []
    for stop_after in (OBJECTS // 3, OBJECTS // 2, None):
        deep.nodes, deep.units = maker(deep.broker), _Counted()
        deep.asked()
        totals = await deep.check(root, resume=True, stop_after=stop_after)
        asked.append(deep.asked())
        assert stop_after is None or totals.objects == stop_after
    assert totals.checked == totals.objects == OBJECTS + directories
    checks = 3 * (OBJECTS + directories + 2 * OBJECTS_AT_ONCE)
    assert all(asked) and sum(asked) <= checks + 3 * 3 * directories, "and the directories, which are walked anew"


class _Counted(list[Any]):
    """Counts what is put in, and keeps nothing."""

    count = 0

    def append(self, unit: Any) -> None:
        self.count += 1

    def __len__(self) -> int:
        return self.count


async def test_interrupted_and_resumed(tmp_path: Path) -> None:
    """What was checked is not asked for again; the output is whole; another wish is another check."""
    deep = Deep(tmp_path)
    files = {f"f{n:03}": (await upload(deep.nodes, 100, n), {}) for n in range(60)}
    root = await deep.nodes.create_dirnode(files)
    deep.asked()
    await deep.check(root.cap, stop_after=20)
    before = deep.asked()
    assert 0 < before < 600
    totals = await deep.check(root.cap, resume=True)
    assert before + deep.asked() <= 600 + 8 * 10, "but for those that were under way"
    assert totals.objects == 61 and [unit["path"] for unit in deep.units] == [[], *([name] for name in sorted(files))]
    await deep.check(root.cap, resume=True)
    assert deep.asked() == 600, "a complete one is not resumed"
    await deep.check(root.cap, stop_after=20)
    deep.asked()
    await deep.check(root.cap, Wish(add_lease=True), resume=True)
    assert deep.asked() == 600, "not the same wish"


def test_an_old_run_is_not_resumed(tmp_path: Path) -> None:
    with CheckHistory(tmp_path) as history:
        first = history.begin_run(b"root", "check", 1000.0, resume=True)
        assert history.begin_run(b"root", "check", 1000.0 + RESUME_WITHIN_S - 1, resume=True) == first
        assert history.begin_run(b"root", "check", 1000.0 + RESUME_WITHIN_S + 1, resume=True) != first
        assert history.begin_run(b"root", "check", 1000.0, resume=False) != first


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("checking") as progress:
        progress.objects(1234, "2 unhealthy")
        assert "checking: 1234 objects" in terminal.getvalue() and "2 unhealthy" in terminal.getvalue()
        progress.line("a line")
    assert terminal.getvalue().endswith("\r\x1b[K") and capsys.readouterr().out == "a line\n"
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("checking") as progress:
        progress.objects(1, "all well")
    assert isinstance(sys.stderr, io.StringIO) and not sys.stderr.getvalue()
