"""Several writers of one directory at once, and a grid that goes away while files are being copied in.

Here a part of it; TAHOEFS_SOAK=1 (`make soak`) asks for all: two mounts that make 500 files and 50 of the same names
each while the real client adds 50; 500 files copied in while the servers are gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.mounting import Mount, Mounter, tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid, wait_until
from tests.real.threads import in_threads

pytestmark = [pytest.mark.interop, pytest.mark.mount]

SOAK = bool(os.environ.get("TAHOEFS_SOAK"))
DIFFERENT, SAME, THEIRS = (500, 50, 50) if SOAK else (60, 6, 6)
COPIED = 500 if SOAK else 60
AWAY_AFTER = COPIED // 4  # files copied in before the servers go
SIZES = (20, 300, 5000)  # a literal, and small files
UPLOADS_SHOWN = 50
ARRIVAL_S = 600


def data_of(who: str, number: int) -> bytes:
    """Different for every file of every writer."""
    return f"{who} {number} ".encode() + content(SIZES[number % len(SIZES)], number)


def patiently(request: Callable[[], Any]) -> Any:
    """The real client gives up when others change what it is reading or writing; its user then tries again."""
    return wait_until(lambda: [request()], "the real client to get its turn")[0]


def listing(grid: TahoeGrid, cap: str) -> dict[str, Any]:
    """What the real client sees: {name: its part of the JSON}."""
    children: dict[str, Any] = patiently(lambda: grid.json(cap))[1]["children"]
    return children


def test_two_mounts_and_the_real_client(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, tmp_path: Path) -> None:
    """None of all the different contents is lost; of two files of one name one gets a name that says so."""
    both_have_opened = threading.Barrier(2)

    def write(mount: Mount, who: str) -> None:
        """All files of the same names are made before any is closed: neither writer can know of the other's.

        One of berta's is closed only after the grid has anna's.
        """
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((mount.path / f"same{number}.txt").open("xb")) for number in range(SAME)]
            for number, file in enumerate(files):
                file.write(data_of(f"{who} same", number))
            both_have_opened.wait()
            for number in range(DIFFERENT):
                (mount.path / f"{who}{number}").write_bytes(data_of(who, number))
                if number % (DIFFERENT // SAME) == 0 and len(files) > 1:
                    files.pop().close()
            if who == "berta":
                wait_until(lambda: "same0.txt" in listing(real_grid, root_cap), "anna's file to be stored")

    def add() -> None:
        for number in range(THEIRS):
            name, data = f"theirs{number}", data_of("theirs", number)
            patiently(lambda name=name, data=data: real_grid.put_at(root_cap, name, data))

    nodes = {who: real_grid.new_client(tmp_path / who, who) for who in ("anna", "berta")}
    with mounted(root_cap, node=nodes["anna"]) as anna, mounted(root_cap, node=nodes["berta"]) as berta:
        in_threads(lambda: write(anna, "anna"), lambda: write(berta, "berta"), add)
        in_threads(anna.sync, berta.sync)
        found = listing(real_grid, root_cap)
        expected = {data_of(who, number) for who in nodes for number in range(DIFFERENT)}
        expected |= {data_of(f"{who} same", number) for who in nodes for number in range(SAME)}
        expected |= {data_of("theirs", number) for number in range(THEIRS)}
        stored = {real_grid.get(child["ro_uri"]) for _, child in found.values()}
        assert not expected - stored, f"{len(expected - stored)} contents are lost"
        assert not stored - expected
        assert len(found) == len(expected) == 2 * (DIFFERENT + SAME) + THEIRS
        conflicts = [name for name in found if " (conflict " in name]
        assert len(conflicts) == SAME and {name.split()[0] for name in conflicts} == {f"same{n}" for n in range(SAME)}
        assert all(name.endswith((" anna).txt", " berta).txt")) for name in conflicts)
        assert any(name.startswith("same0 ") and name.endswith(" berta).txt") for name in conflicts)
        statuses = [anna.status(), berta.status()]
        assert sum(status["conflicts"] for status in statuses) == SAME
        assert [status["errors"] for status in statuses] == [[], []]
        for mount in (anna, berta):  # neither is stuck, and both see all of it
            wait_until(lambda mount=mount: set(os.listdir(mount.path)) == set(found), "all names to be seen", 60)
        for who, mount in (("anna", anna), ("berta", berta)):
            (mount.path / f"{who}0").write_bytes(b"written again")
            (mount.path / f"{who}1").unlink()
            mount.sync()
            assert real_grid.get(root_cap, f"{who}0") == b"written again"
            assert f"{who}1" not in listing(real_grid, root_cap)


class Copier:
    """Copies files into a mount in a thread; `closed` are those whose close() has returned."""

    def __init__(self, mount: Mount, count: int) -> None:
        self._mount = mount
        self._count = count
        self.begun = 0
        self.closed = 0
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            for number in range(self._count):
                self.begun += 1
                (self._mount.path / f"file{number}").write_bytes(data_of("copied", 3 * number + 1))
                self.closed += 1
        except BaseException as failure:  # noqa: BLE001 looked at in join()
            self.failure = failure

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._thread.join()

    def wait_closed(self, count: int) -> None:
        wait_until(lambda: self.failure or self.closed >= count, f"{count} files to be copied")
        if self.failure is not None:
            raise self.failure


def status_is_true(mount: Mount, copier: Copier) -> None:
    """No file that was closed is forgotten."""
    closed = copier.closed
    status = mount.status()
    pending = status["pending"]
    assert closed - status["uploaded"] <= pending["files"] <= copier.begun
    assert len(status["uploads"]) == min(pending["files"], UPLOADS_SHOWN)
    assert bool(pending["bytes"]) == any(each["stage"] != "linking" for each in status["uploads"])
    assert pending["directories"] == bool(pending["files"])


def pending_is_what_is_not_seen(grid: TahoeGrid, root_cap: str, mount: Mount, copier: Copier) -> None:
    """Every file is counted as pending until the real client sees it."""
    closed = copier.closed
    before = mount.status()["pending"]["files"]
    seen = len(listing(grid, root_cap))
    assert before + seen >= closed
    assert seen <= copier.begun


def refused(command: str, mount: Mount, *options: str) -> None:
    """The command says in one line what is not sent, within its bound, and the mount stays as it is."""
    done = tahoefs(command, mount.path, *options, check=False)
    assert done.returncode != 0, f"{command} claims to have sent everything"
    assert len(done.stderr.strip().splitlines()) == 1
    unsent = re.search(r"not on the grid: (\d+) files? \(", done.stderr)
    assert unsent is not None and int(unsent[1]) > 0, done.stderr
    assert mount.path.is_mount() and mount.status()["state"] != "draining"


@pytest.mark.parametrize("how", ["hung", "killed"])
def test_the_grid_goes_away_during_a_copy(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, how: str) -> None:
    """No close() fails, status tells how it stands, sync and umount refuse; when the servers are back, all arrives."""
    everybody = range(len(real_grid.servers))
    with mounted(root_cap) as mount:
        copier = Copier(mount, COPIED)
        with copier.running():
            copier.wait_closed(AWAY_AFTER)
            pending_is_what_is_not_seen(real_grid, root_cap, mount, copier)
            with real_grid.hung(everybody) if how == "hung" else real_grid.without(everybody):
                while copier.closed < COPIED:
                    status_is_true(mount, copier)
                    copier.wait_closed(min(COPIED, copier.closed + 10))
                status_is_true(mount, copier)
                assert mount.status()["pending"]["files"] > 0
                refused("sync", mount, "--timeout", "3")
                refused("umount", mount, "--timeout", "3")
                if SOAK:  # it gives up by itself, in two minutes
                    refused("sync", mount)
                wait_until(lambda: mount.status()["errors"], "the failure in the status", 120)
                status_is_true(mount, copier)
                for number in (0, COPIED - 1):
                    assert (mount.path / f"file{number}").read_bytes() == data_of("copied", 3 * number + 1)
            real_grid.reconnect()
            while any(mount.status()["pending"].values()):
                pending_is_what_is_not_seen(real_grid, root_cap, mount, copier)
        mount.sync(ARRIVAL_S)
        found = listing(real_grid, root_cap)
        assert set(found) == {f"file{number}" for number in range(COPIED)}
        for number in range(COPIED):
            assert real_grid.get(found[f"file{number}"][1]["ro_uri"]) == data_of("copied", 3 * number + 1)
        assert mount.status()["errors"] == []
