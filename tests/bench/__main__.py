"""`make bench`: the mount against the real client, on the same real grid, in the same run.

    upload      one file of 256 MiB: `cp` into the mount and `tahoefs sync`     ./. PUT at the real client's web API
    download    the same file, cold (a fresh mount)                              ./. GET at the real client's web API
    small up    500 files of 4 KiB: `cp -r` into the mount and `tahoefs sync`    ./. `tahoe cp -r`
    small down  the same, cold                                                   ./. `tahoe cp -r`
    memory      the daemon's peak RSS after 1 GiB in and out of the mount        (limit: 250 MiB)
    servers     our storage server ./. the real one, see tests/bench/servers.py
    reads       distance, slow servers, caches: see tests/bench/reads.py

Each figure is a ratio, the real client's time by ours, so that above 1 the mount is faster; seconds are shown beside
it for orientation and mean nothing on another machine. Every pair runs in turn, ours and theirs, `--runs` times;
the median pair is quoted. CPU seconds are those of the client process (ours: the daemon) alone.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tahoefs.control_client import ask
from tahoefs.registry import find_socket
from tests.bench import reads, servers
from tests.real.tahoe_grid import TahoeGrid, tahoe_environment

LARGE_BYTES = 256 << 20
SMALL_FILES, SMALL_BYTES = 500, 4096
MEMORY_BYTES = 1 << 30
MEMORY_LIMIT_BYTES = 250 << 20
PIECE_BYTES = 1 << 20


def tahoefs(*arguments: str | Path, stdin: str = "") -> None:
    subprocess.run([sys.executable, "-m", "tahoefs.cli", *map(str, arguments)], input=stdin, text=True, check=True)


class Bench:
    """One grid, one scratch folder, and the two ways to do each thing."""

    def __init__(self, grid: TahoeGrid, scratch: Path, *, foolscap: bool = False) -> None:
        self.grid, self.scratch = grid, scratch
        self.node_dir = our_node_directory(grid.client.path, scratch / "node", foolscap=foolscap)
        self.mountpoint = scratch / "mnt"
        self.mountpoint.mkdir()
        self.large = scratch / "large"
        self.small = scratch / "small"
        self.small.mkdir()
        for number in range(SMALL_FILES):
            (self.small / f"file{number:03}").write_bytes(random.Random(number).randbytes(SMALL_BYTES))
        self.daemon_cpu_s = 0.0
        self.peak_rss = 0

    @contextmanager
    def mounted(self, cap: str) -> Iterator[Path]:
        shutil.rmtree(self.node_dir / "tahoefs" / "cache", ignore_errors=True)  # a fresh mount is a cold one here
        tahoefs("mount", "-", self.mountpoint, "-d", self.node_dir, stdin=cap)
        socket = find_socket(self.mountpoint)
        assert socket is not None
        pid = ask(socket, {"command": "status"}, timeout_s=30)["pid"]
        try:
            yield self.mountpoint
            self.daemon_cpu_s = cpu_seconds(pid)
            self.peak_rss = peak_rss_bytes(pid)
        finally:
            tahoefs("umount", self.mountpoint)

    def timed(self, what: Callable[[], object]) -> float:
        subprocess.run(["sync"], check=True)
        started = time.perf_counter()
        what()
        return time.perf_counter() - started

    # Each pair returns (our seconds, their seconds, our CPU seconds, their CPU seconds).

    def fresh_large(self, size: int = LARGE_BYTES) -> None:
        """New random content: nothing that any grid, cache or convergence could know."""
        with self.large.open("wb") as file:
            for _ in range(size // PIECE_BYTES):
                file.write(os.urandom(PIECE_BYTES))

    def upload(self) -> tuple[float, float, float, float]:
        self.fresh_large()
        ours_root, theirs_root = self.grid.mkdir(), self.grid.mkdir()
        with self.mounted(ours_root) as mount:

            def copy_in() -> None:
                shutil.copyfile(self.large, mount / "large")
                tahoefs("sync", mount)

            ours = self.timed(copy_in)
        ours_cpu = self.daemon_cpu_s
        self.ours_root = ours_root
        self.fresh_large()
        before = cpu_seconds(self.grid.client.pid)
        theirs = self.timed(lambda: self.put(theirs_root, "large"))
        self.theirs_root = theirs_root
        return ours, theirs, ours_cpu, cpu_seconds(self.grid.client.pid) - before

    def put(self, root: str, name: str) -> None:
        url = f"{self.grid.web}/uri/{urllib.parse.quote(root, safe='')}/{name}"
        with self.large.open("rb") as file:
            request = urllib.request.Request(url, data=file, method="PUT")
            request.add_header("Content-Length", str(self.large.stat().st_size))
            urllib.request.urlopen(request).read()

    def download(self) -> tuple[float, float, float, float]:
        """The file that `upload` put there, each from its own upload."""
        out = self.scratch / "out"
        with self.mounted(self.ours_root) as mount:
            ours = self.timed(lambda: shutil.copyfile(mount / "large", out))
        ours_cpu = self.daemon_cpu_s
        before = cpu_seconds(self.grid.client.pid)

        def fetch() -> None:
            url = f"{self.grid.web}/uri/{urllib.parse.quote(self.theirs_root, safe='')}/large"
            with urllib.request.urlopen(url) as answer, out.open("wb") as file:
                shutil.copyfileobj(answer, file, PIECE_BYTES)

        theirs = self.timed(fetch)
        if not filecmp.cmp(self.large, out, shallow=False):
            raise AssertionError("the download differs from the upload")
        return ours, theirs, ours_cpu, cpu_seconds(self.grid.client.pid) - before

    def small_up(self) -> tuple[float, float, float, float]:
        for number in range(SMALL_FILES):
            (self.small / f"file{number:03}").write_bytes(os.urandom(SMALL_BYTES))
        self.ours_root, self.theirs_root = self.grid.mkdir(), self.grid.mkdir()
        with self.mounted(self.ours_root) as mount:

            def copy_in() -> None:
                shutil.copytree(self.small, mount / "small")
                tahoefs("sync", mount)

            ours = self.timed(copy_in)
        ours_cpu = self.daemon_cpu_s
        for file in self.small.iterdir():
            file.write_bytes(os.urandom(SMALL_BYTES))
        before = cpu_seconds(self.grid.client.pid)
        theirs = self.timed(lambda: self.tahoe("cp", "-r", f"{self.small}", f"{self.theirs_root}"))
        return ours, theirs, ours_cpu, cpu_seconds(self.grid.client.pid) - before

    def small_down(self) -> tuple[float, float, float, float]:
        for name in ("ours", "theirs"):
            shutil.rmtree(self.scratch / name, ignore_errors=True)
        with self.mounted(self.ours_root) as mount:
            ours = self.timed(lambda: shutil.copytree(mount / "small", self.scratch / "ours"))
        ours_cpu = self.daemon_cpu_s
        (self.scratch / "theirs").mkdir()
        before = cpu_seconds(self.grid.client.pid)
        theirs = self.timed(lambda: self.tahoe("cp", "-r", f"{self.theirs_root}/small", f"{self.scratch / 'theirs'}"))
        if len(list((self.scratch / "ours").iterdir())) != SMALL_FILES:
            raise AssertionError("files are missing")
        return ours, theirs, ours_cpu, cpu_seconds(self.grid.client.pid) - before

    def tahoe(self, *arguments: str) -> None:
        subprocess.run(
            [self.grid.tahoe, "-d", self.grid.client.path, *arguments], check=True, stdout=subprocess.DEVNULL
        )

    def memory(self) -> int:
        """Peak RSS in bytes after 1 GiB in, and (fresh mount) out."""
        self.fresh_large(MEMORY_BYTES)
        root = self.grid.mkdir()
        with self.mounted(root) as mount:
            shutil.copyfile(self.large, mount / "large")
            tahoefs("sync", mount)
        peak = self.peak_rss
        with self.mounted(root) as mount:
            if not filecmp.cmp(self.large, mount / "large", shallow=False):
                raise AssertionError("the download differs from the upload")
        return max(peak, self.peak_rss)


def our_node_directory(theirs: Path, ours: Path, *, foolscap: bool) -> Path:
    """A node directory of our own for the same grid, so that one side's protocol can be chosen without the other's."""
    (ours / "private").mkdir(parents=True, mode=0o700)
    for name in ("secret", "convergence", "introducers.yaml"):
        shutil.copy(theirs / "private" / name, ours / "private" / name)
    config = (theirs / "tahoe.cfg").read_text()
    (ours / "tahoe.cfg").write_text(
        config.replace("[client]\n", "[client]\nforce_foolscap = true\n") if foolscap else config
    )
    return ours


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["large", "small", "memory", "servers", "reads"])
    parser.add_argument("--foolscap", action="store_true", help="our side speaks Foolscap (theirs: HTTP, its default)")
    arguments = parser.parse_args()
    only = set(arguments.only)
    if "servers" in only:
        with tempfile.TemporaryDirectory(prefix="tahoefs-bench-") as scratch:
            servers.run(Path(scratch), arguments.runs, tahoe_environment() / "bin" / "tahoe")
    if "reads" in only:
        with tempfile.TemporaryDirectory(prefix="tahoefs-bench-") as scratch:
            reads.run(Path(scratch), arguments.runs)
    if not only - {"servers", "reads"}:
        return
    with tempfile.TemporaryDirectory(prefix="tahoefs-bench-") as scratch:
        grid = TahoeGrid(Path(scratch) / "grid")
        try:
            grid.start()
            run(Bench(grid, Path(scratch), foolscap=arguments.foolscap), arguments.runs, only)
        finally:
            grid.stop()


def run(bench: Bench, runs: int, only: set[str]) -> None:
    print(f"{'':12}{'ratio':>8}{'ours s':>10}{'theirs s':>10}{'our CPU s':>11}{'their CPU s':>12}", flush=True)
    groups = {
        "large": (("upload", bench.upload), ("download", bench.download)),
        "small": (("small up", bench.small_up), ("small down", bench.small_down)),
    }
    for group, steps in groups.items():
        if group not in only:
            continue
        results: dict[str, list[tuple[float, float, float, float]]] = {}
        for _ in range(runs):
            for name, step in steps:
                results.setdefault(name, []).append(step())
        for name, pairs in results.items():
            middle = sorted(pairs, key=lambda pair: pair[1] / pair[0])[len(pairs) // 2]
            ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
            ours, theirs, our_cpu, their_cpu = middle
            print(f"{name:12}{ratio:>8.2f}{ours:>10.2f}{theirs:>10.2f}{our_cpu:>11.2f}{their_cpu:>12.2f}", flush=True)
    if "memory" in only:
        peak = bench.memory()
        verdict = "within" if peak <= MEMORY_LIMIT_BYTES else "OVER"
        print(f"{'memory':12}{peak / (1 << 20):>8.0f} MiB peak RSS, {verdict} the {MEMORY_LIMIT_BYTES >> 20} MiB limit")


if __name__ == "__main__":
    main()
