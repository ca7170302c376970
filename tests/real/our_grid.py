"""One storage server as a process of its own, ours or the real one, reached without an introducer.

    node = StorageNode(path)                        `tahoefs run`; program=… for another one
    node.start()                                    returns when it listens
    node.announcement(http=True)                    for GBSStorageServer or FoolscapStorageServer

What it costs can be measured: `cpu_seconds()` and `rss_bytes()` look at its process.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from grid.crypto import load_tub_identity, spki_hash_of_certificate
from grid.formats.announcement import Announcement, from_mapping
from grid.formats.furl import Furl
from grid.peers.foolscap_storage import FoolscapStorageServer
from grid.peers.gbs_storage import GBSStorageServer
from grid.peers.reconnect import Reconnector
from grid.wire.gbs import Nurl
from tests.grid.peers.loopback import until
from tests.real.tahoe_grid import OUR_PROGRAM, Node, free_ports, wait_until

HOST = "127.0.0.1"
SERVER_ID = "v0-" + "a" * 52
DIALS_MAX = 8


class StorageNode(Node):
    """A node directory with storage and nothing else, on a port of its own that stays the same."""

    def __init__(self, path: Path, *, program: Sequence[str | Path] = OUR_PROGRAM, settings: str = "") -> None:
        """`settings`: more lines for the [storage] section."""
        (self.port,) = free_ports(1)
        config = (
            f"[node]\nnickname = storage\nweb.port =\ntub.port = tcp:{self.port}:interface={HOST}\n"
            f"tub.location = tcp:{HOST}:{self.port}\n[storage]\nenabled = true\nreserved_space = 0\n{settings}"
        )
        super().__init__(Path(program[0]), path, "client", config)
        self.program = program

    def start(self) -> None:
        super().start()
        wait_until(self._listens, "the storage server to listen")

    def _listens(self) -> bool:
        if not self.running:
            raise AssertionError(f"the storage server ended: {self.log()[-2000:]}")
        socket.create_connection((HOST, self.port)).close()  # an OSError means: not yet
        return (self.path / "private" / "storage.furl").exists()

    def terminate(self) -> int:
        """Ask it to stop, and return its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(60)
        self.process = None
        return code

    @property
    def storage(self) -> Path:
        return self.path / "storage"

    def log(self) -> str:
        return (self.path / "output.log").read_text(errors="replace")

    @property
    def furl(self) -> Furl:
        return Furl.parse(self.private("storage.furl"))

    @property
    def nurl(self) -> Nurl:
        return Nurl(self.spki_hash, HOST, self.port, self.furl.name)

    @property
    def spki_hash(self) -> bytes:
        identity = load_tub_identity((self.path / "private" / "node.pem").read_bytes())
        return spki_hash_of_certificate(identity.certificate_der)

    def announced(self, *, http: bool = True) -> dict[str, object]:
        """What it would tell an introducer, as far as a client uses it."""
        fields: dict[str, object] = {"anonymous-storage-FURL": str(self.furl), "nickname": "storage"}
        return fields | ({"anonymous-storage-NURLs": [str(self.nurl)]} if http else {})

    def announcement(self, *, http: bool = True) -> Announcement:
        return from_mapping(SERVER_ID, self.announced(http=http))

    @asynccontextmanager
    async def joined(self, *, http: bool) -> AsyncIterator[FoolscapStorageServer | GBSStorageServer]:
        """Our client's view of it, connected."""
        announcement = self.announcement(http=http)
        server = GBSStorageServer(announcement) if http else FoolscapStorageServer(announcement, keepalive_s=240)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run, Reconnector(), trio.CapacityLimiter(DIALS_MAX))
            await until(lambda: server.connected, timeout_s=60)
            yield server
            nursery.cancel_scope.cancel()

    # --- what it costs

    def cpu_seconds(self) -> float:
        """Of user and system time since it was started, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self, *, peak: bool = False) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:" if peak else "VmRSS:")[2].split()[0]) << 10
