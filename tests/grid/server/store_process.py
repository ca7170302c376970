"""A process that serves one storage directory over Foolscap: `python -m tests.grid.server.store_process DIRECTORY`.

Prints its FURL when it listens. Ends with its standard input.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from grid.crypto import TubIdentity, load_tub_identity, make_tub_identity
from grid.formats import base32
from grid.server.foolscap import FoolscapStorage
from grid.server.shares import ShareStore
from grid.server.storage import StorageService
from grid.transports.tub import Tub


def identity_in(path: Path) -> TubIdentity:
    if not path.exists():
        identity = make_tub_identity()
        path.write_bytes(identity.certificate_pem + identity.private_key_pem)
    return load_tub_identity(path.read_bytes())


async def main(directory: Path) -> None:
    identity = identity_in(directory / "node.pem")
    store = ShareStore(directory / "storage", tub_id=base32.a2b(identity.tub_id))
    service = StorageService(store)
    front = FoolscapStorage(service)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    tub = Tub(identity, location=f"tcp:127.0.0.1:{port}")
    async with trio.open_nursery() as nursery:
        for task in (service.run, front.run, tub.run):
            await nursery.start(task)
        nursery.start_soon(trio.serve_listeners, tub.accept, listeners)
        print(tub.register(front, "swissnum"), flush=True)
        await trio.lowlevel.wait_readable(0)
        nursery.cancel_scope.cancel()
    store.close()
    if os.environ.get("STORE_PROCESS_TIMES"):
        times = os.times()
        print(times.user, times.system, flush=True)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
