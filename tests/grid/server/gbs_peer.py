"""Our storage server over HTTP here: on a real port, or over streams in memory, so that time can be skipped."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio
import trio.testing
from attrs import define, field

from grid.crypto import TubIdentity, make_tub_identity, spki_hash_of_certificate
from grid.formats.announcement import Announcement, from_mapping
from grid.server.foolscap import FoolscapStorage
from grid.server.gbs import GBSStorage
from grid.server.storage import StorageService
from grid.transports.http import HTTPConnection
from grid.transports.listener import CombinedPort
from grid.transports.tls import ServerTLS, dial_pinned
from grid.transports.tls_stream import TLSStream
from grid.transports.tub import Tub
from grid.wire.gbs import Nurl
from tests.grid.server.stores import serve
from tests.vectors import section

SWISSNUM: str = section("storage.json", "http.swissnum")
HOST = "127.0.0.1"


@define
class Peer:
    """A storage server: `connect` gives a connection in memory, `port` is open if it was asked for."""

    service: StorageService
    combined: CombinedPort
    identity: TubIdentity
    nursery: trio.Nursery
    tub: Tub
    port: int = 0
    furl: str = field(default="", repr=False)

    @property
    def spki_hash(self) -> bytes:
        return spki_hash_of_certificate(self.identity.certificate_der)

    @property
    def nurl(self) -> Nurl:
        return Nurl(self.spki_hash, HOST, self.port, SWISSNUM)

    def announcement(self, *, http: bool = True) -> Announcement:
        nurls = {"anonymous-storage-NURLs": [str(self.nurl)]} if http else {}
        return from_mapping("v0-" + "a" * 52, {"anonymous-storage-FURL": self.furl, "nickname": "ours", **nurls})

    def reach(self) -> trio.abc.Stream:
        """A connection without TLS on it yet."""
        ours, theirs = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self.combined.accept, theirs)
        return ours

    async def stream(self) -> TLSStream:
        return await dial_pinned(self.reach(), self.spki_hash)

    async def connect(self) -> HTTPConnection:
        return HTTPConnection(await self.stream(), b"localhost")


@asynccontextmanager
async def gbs_peer(directory: Path, *, listen: bool = False, **options: Any) -> AsyncIterator[Peer]:
    identity = make_tub_identity()
    async with serve(directory, **options) as service, trio.open_nursery() as nursery:
        handler = GBSStorage(service, SWISSNUM)
        foolscap = FoolscapStorage(service)
        tub = Tub(identity, location=f"tcp:{HOST}:1")
        combined = CombinedPort(tub=tub, handler=handler, tls=ServerTLS(identity))
        peer = Peer(service, combined, identity, nursery, tub)
        await nursery.start(tub.run)
        await nursery.start(foolscap.run)
        if listen:
            peer.port = await nursery.start(combined.run, HOST, 0)
        peer.furl = tub.register(foolscap, SWISSNUM).replace(f"{HOST}:1/", f"{HOST}:{peer.port}/")
        yield peer
        nursery.cancel_scope.cancel()
