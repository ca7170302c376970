"""`make bench`, reads: what distance, a slow server and the caches do to reading through the mount.

    near       one file of 96 MiB, 3-of-10 on servers of ours, read from its beginning, cold
    far        the same, every server's replies 20 ms late: at least 70% of that rate
    straggler  far, and the replies of one server that holds a share ten times as late: at least 85% of far's rate
    again      read once more in the same mount: from the kernel's pages, no request reaches the daemon
    remounted  the first read of a new mount, from the disk cache: at least 60% of a pass-through file system's rate

All of it through one delay proxy a server, so that what the proxy costs is the same everywhere. Scenarios take turns;
medians are quoted.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

import grid
from tahoefs.control_client import ask
from tahoefs.registry import find_socket
from tests.delay_proxy import DelayProxies
from tests.real.our_grid import StorageNode
from tests.real.tahoe_grid import wait_until

SERVERS = 10
SHARES = (3, 7, 10)
FILE_BYTES = 96 << 20
PIECE_BYTES = 1 << 20
FAR_S = 0.02
SLOWER = 10
COMMAND_TIMEOUT_S = 240
RE_READS = 3


class Reads:
    """Ten servers behind their proxies, a client of theirs, and one file on them."""

    def __init__(self, scratch: Path, nodes: list[StorageNode], proxies: DelayProxies) -> None:
        self.nodes, self.proxies = nodes, proxies
        self.mountpoint, self.passed = scratch / "mnt", scratch / "passed"
        self.mountpoint.mkdir()
        self.passed.mkdir()
        self.client = scratch / "client"
        grid.create_client_directory(self.client, introducers=[], shares=SHARES)
        servers = {
            f"v0-{chr(ord('b') + number) * 51}a": {"ann": self._announced(number, node)}
            for number, node in enumerate(nodes)
        }
        (self.client / "private" / "servers.yaml").write_text(yaml.safe_dump({"storage": servers}))
        self.run("create-alias", "bench")
        self.original = scratch / "original"
        with self.original.open("wb") as file:
            for _ in range(FILE_BYTES // PIECE_BYTES):
                file.write(os.urandom(PIECE_BYTES))
        with self.mounted():
            shutil.copyfile(self.original, self.mountpoint / "file")
            self.run("sync", self.mountpoint)

    def _announced(self, number: int, node: StorageNode) -> dict[str, Any]:
        fields = node.announced()
        furl, nurls = str(fields["anonymous-storage-FURL"]), fields["anonymous-storage-NURLs"]
        assert isinstance(nurls, list)
        return {
            "nickname": f"server {number}",
            "anonymous-storage-FURL": self.proxies.through(node.port, furl),
            "anonymous-storage-NURLs": [self.proxies.through(node.port, nurl) for nurl in nurls],
        }

    def run(self, command: str, *arguments: str | Path) -> None:
        subprocess.run(
            [sys.executable, "-m", "tahoefs.cli", command, *map(str, arguments)]
            + (["-d", str(self.client)] if command in ("create-alias", "mount") else []),
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=COMMAND_TIMEOUT_S,
        )

    @contextmanager
    def mounted(self) -> Iterator[None]:
        self.run("mount", "bench:", self.mountpoint)
        try:
            wait_until(lambda: self.ask("status")["servers"]["connected"] == SERVERS, "all servers")
            yield
        finally:
            self.run("umount", self.mountpoint)

    def ask(self, command: str) -> dict[str, Any]:
        socket = find_socket(self.mountpoint)
        assert socket is not None
        answer: dict[str, Any] = ask(socket, {"command": command}, timeout_s=30)
        return answer

    def requests(self) -> int:
        """Reads that the kernel asked the daemon for."""
        return int(self.ask("stats")["metrics"]["fuse_seconds"]["values"]["read"]["count"])

    def forget(self) -> None:
        shutil.rmtree(self.client / "tahoefs" / "cache")

    def far(self, by_s: float) -> None:
        for node in self.nodes:
            self.proxies.delay_s[node.port] = by_s

    # --- scenarios; each returns MiB a second

    def near(self) -> float:
        self.far(0)
        self.forget()
        with self.mounted():
            return read(self.mountpoint / "file")

    def distant(self) -> float:
        self.far(FAR_S)
        self.forget()
        with self.mounted():
            return read(self.mountpoint / "file")

    def straggler(self) -> float:
        """It is slow from the middle of the session on: nothing is known of that when the file is opened."""
        self.far(FAR_S)
        self.forget()
        with self.mounted():
            self.proxies.delay_s[self.nodes[0].port] = FAR_S * SLOWER
            return read(self.mountpoint / "file")

    def again(self) -> float:
        with self.mounted():
            read(self.mountpoint / "file")
            for _ in range(RE_READS):  # the kernel may have dropped some pages meanwhile, and then asks for those
                before = self.requests()
                rate = read(self.mountpoint / "file")
                if (requests := self.requests() - before) == 0:
                    return rate
            raise AssertionError(f"every re-read reached the daemon, the last one {requests} times")

    def remounted(self) -> float:
        with self.mounted():
            rate = read(self.mountpoint / "file")
            if self.ask("status")["cache"]["misses"]:
                raise AssertionError("not everything was in the disk cache")
            return rate

    def pass_through(self) -> float:
        """The same file by a plain file system on pyfuse3."""
        command = [sys.executable, "-m", "tests.bench.passthrough", self.original, self.passed]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                return read(self.passed / "file")
            finally:
                subprocess.run(["umount", self.passed], check=True)


def read(path: Path) -> float:
    """From beginning to end, as cp does; MiB a second."""
    started = time.monotonic()
    size = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            size += len(piece)
    if size != FILE_BYTES:
        raise AssertionError("the file is not as long as it should be")
    return size / (1 << 20) / (time.monotonic() - started)


def run(scratch: Path, runs: int) -> None:
    with ExitStack() as stack:
        nodes = [StorageNode(scratch / f"server{number}") for number in range(SERVERS)]
        for node in nodes:
            node.start()
            stack.callback(node.kill)
        proxies = stack.enter_context(DelayProxies(dict.fromkeys((node.port for node in nodes), 0.0)))
        reads = Reads(scratch, nodes, proxies)
        rates: dict[str, list[float]] = {}
        scenarios = {
            "near": reads.near,
            "far": reads.distant,
            "straggler": reads.straggler,
            "again": reads.again,
            "pass-through": reads.pass_through,
            "remounted": reads.remounted,
        }
        for _ in range(runs):
            for name, scenario in scenarios.items():
                rates.setdefault(name, []).append(scenario())
        middle = {name: statistics.median(each) for name, each in rates.items()}
        print(f"{'':14}{'MiB/s':>8}{'ratio':>8}")
        for name, base in (
            ("near", None),
            ("far", "near"),
            ("straggler", "far"),
            ("again", "near"),
            ("pass-through", None),
            ("remounted", "pass-through"),
        ):
            ratio = "" if base is None else f"{middle[name] / middle[base]:>8.2f} of {base}"
            print(f"{name:14}{middle[name]:>8.0f}{ratio}", flush=True)
