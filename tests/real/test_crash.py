"""The daemon killed (SIGKILL) at random moments, again and again, on one mount of one real grid.

Nothing that returned is lost, nothing comes back that was removed, nothing is there in half; see `crash_model.py`.

    killed while working       workers make calls; sometimes while all is sent (`sync`), or while the servers hang
    killed while starting      before the mount is there
    killed while replaying     right after

TAHOEFS_KILL_ROUNDS sets how often: a few times here, a thousand times in `make soak`. The seed is printed;
TAHOEFS_CRASH_SEED runs the same calls again. TAHOEFS_CRASH_GRID=ours takes our own servers, which start faster.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tahoefs.mount_config import MountConfig, log_file
from tahoefs.mountpoint import prepare
from tests.real.crash_model import Worker
from tests.real.mounting import Mount, can_mount, tahoefs
from tests.real.tahoe_grid import SERVERS, TahoeGrid
from tests.real.threads import in_threads

pytestmark = [pytest.mark.interop, pytest.mark.mount]

ROUNDS = int(os.environ.get("TAHOEFS_KILL_ROUNDS", "6"))
OURS = os.environ.get("TAHOEFS_CRASH_GRID") == "ours"
SEED = os.environ.get("TAHOEFS_CRASH_SEED") or str(random.randrange(1 << 32))
WORKERS = "mnop"
WORK_S = (0.05, 1.5)  # any moment will do: it is that of the kill
START_S = (0.1, 1.5)
REPLAY_S = (0.0, 0.5)


class Daemon:
    """The mount's daemon, started without the command line in front of it, so that its pid is known from the start."""

    def __init__(self, node_dir: Path, cap: str, where: Path) -> None:
        self._config = MountConfig(str(node_dir), cap, (), "crash", str(where))
        self.cap = cap
        self.path = where
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        prepare(self.path)  # as `tahoefs mount` does: a dead mount is cleared
        command = [sys.executable, "-P", "-m", "tahoefs.daemon"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        self._process.stdin.write(self._config.to_json())
        self._process.stdin.close()

    def wait_ready(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        assert json.loads(self._process.stdout.readline() or "{}") == {"ready": True}, self.log()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(log_file(self._config).parent.glob("*.log*")))


@pytest.fixture(scope="module")
def grid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TahoeGrid]:
    if (reason := can_mount()) is not None:
        pytest.skip(reason)
    if not OURS:
        yield request.getfixturevalue("real_grid")
        return
    grid = TahoeGrid(tmp_path_factory.mktemp("our-grid"), our_introducer=True, our_servers=SERVERS)
    try:
        yield grid.start()
    finally:
        grid.stop()


@pytest.fixture
def daemon(grid: TahoeGrid, tmp_path: Path) -> Iterator[Daemon]:
    where = tmp_path / "mnt"
    where.mkdir()
    daemon = Daemon(grid.new_client(tmp_path / "node", "crash"), grid.mkdir(), where)
    yield daemon
    daemon.kill()


def work_and_kill(
    daemon: Daemon,
    workers: list[Worker],
    rng: random.Random,
    seed: str,
    *,
    hanging: contextlib.AbstractContextManager[None] | None = None,
    syncing: bool = False,
) -> None:
    """Each worker in a thread, until the daemon is gone. `hanging` is entered some time before that."""
    killed = threading.Event()

    def sync() -> None:
        while syncing and not killed.is_set():
            tahoefs("sync", daemon.path, check=False)  # sends at once what would wait; fails when the daemon is killed

    def kill() -> None:
        time.sleep(rng.uniform(*WORK_S) / 2)
        with hanging or contextlib.nullcontext():
            time.sleep(rng.uniform(*WORK_S) / 2)
            killed.set()
            daemon.kill()

    in_threads(kill, sync, *(partial(worker.run, seed, killed) for worker in workers))


def the_real_client_sees(grid: TahoeGrid, cap: str) -> dict[str, bytes]:
    """{path: contents} of all below a directory; those of a directory are empty."""
    return {path: b"" if kind == "dirnode" else grid.get(child["ro_uri"]) for path, kind, child in grid.walk(cap)}


def check(workers: list[Worker]) -> None:
    in_threads(*(worker.check for worker in workers))


def test_the_model_is_right(tmp_path: Path) -> None:
    """The control: on a local disk the same calls make the same trees."""
    try:
        os.setxattr(tmp_path, "user.try", b"")
    except OSError:
        pytest.skip("the temporary directory is on a file system without extended attributes")
    workers = [Worker(tmp_path, letter) for letter in WORKERS]
    for round_number in range(3):
        done = threading.Event()
        threading.Timer(0.3, done.set).start()
        in_threads(*(partial(worker.run, f"{SEED}.{round_number}", done) for worker in workers))
        check(workers)
    assert all(worker.calls > 100 and worker.tree for worker in workers)


def test_killed_at_any_moment(daemon: Daemon, grid: TahoeGrid) -> None:
    print(f"TAHOEFS_CRASH_SEED={SEED}")
    rng = random.Random(SEED)
    workers = [Worker(daemon.path, letter) for letter in WORKERS]
    for round_number in range(ROUNDS):
        daemon.start()
        kind = rng.choice(("working", "working", "working", "starting", "replaying"))
        if kind == "starting":
            time.sleep(rng.uniform(*START_S))
            daemon.kill()
            continue
        daemon.wait_ready()
        if kind == "replaying":
            time.sleep(rng.uniform(*REPLAY_S))
            daemon.kill()
            continue
        check(workers)
        hanging = grid.hung(range(len(grid.servers))) if rng.random() < 0.25 else None
        seed, syncing = f"{SEED}.{round_number}", rng.random() < 0.4
        work_and_kill(daemon, workers, rng, seed, hanging=hanging, syncing=syncing)
    daemon.start()
    daemon.wait_ready()
    check(workers)
    everything_arrives(daemon, grid, workers)
    assert sum(worker.calls for worker in workers) > 10 * ROUNDS


def test_the_journal_alone_shows_everything(daemon: Daemon, grid: TahoeGrid) -> None:
    """Worked, killed and mounted again while there is no server: all is there before anything was sent."""
    workers = [Worker(daemon.path, letter) for letter in WORKERS]
    daemon.start()
    daemon.wait_ready()
    with grid.without(range(len(grid.servers))):
        work_and_kill(daemon, workers, random.Random(SEED), SEED)
        daemon.start()
        daemon.wait_ready()
        check(workers)
        work_and_kill(daemon, workers, random.Random(SEED), SEED + ".again")
        daemon.start()
        daemon.wait_ready()
        check(workers)
    everything_arrives(daemon, grid, workers)


def everything_arrives(daemon: Daemon, grid: TahoeGrid, workers: list[Worker]) -> None:
    """The real client sees the same as this mount, nothing is left to do, and nothing was out of the ordinary."""
    tahoefs("sync", daemon.path)
    status = Mount(daemon.path).status()
    assert (status["conflicts"], status["errors"]) == (0, [])
    assert not any(status["pending"].values())
    check(workers)
    expected = {path: entry.data for worker in workers for path, entry in worker.tree.items()}
    assert the_real_client_sees(grid, daemon.cap) == expected
    log = daemon.log()
    assert "Traceback" not in log and "ERROR" not in log
    tahoefs("umount", daemon.path)
