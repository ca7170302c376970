"""Storage directories for tests, with a clock that stands still, and the secrets of the golden vectors."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

from grid.interfaces import LeaseSecrets, SlotSecrets
from grid.server.shares import ShareStore
from grid.server.storage import StorageService
from tests.vectors import load

FIXED = load("storage.json")["fixed"]
NOW: int = FIXED["now"]
MONTH: int = FIXED["lease_period"]
NODE_ID = bytes.fromhex(FIXED["nodeid_hex"])
WRITE_ENABLER = bytes.fromhex(FIXED["write_enabler"])
LEASES = [
    LeaseSecrets(bytes.fromhex(renew), bytes.fromhex(cancel))
    for renew, cancel in zip(FIXED["renew_secrets"], FIXED["cancel_secrets"], strict=True)
]
SECRETS = SlotSecrets(WRITE_ENABLER, LEASES[0])
SI = bytes(range(16))


class Clock:
    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


@contextmanager
def open_store(directory: Path, **options: Any) -> Iterator[ShareStore]:
    store = ShareStore(directory, **{"tub_id": NODE_ID, "clock": Clock(), **options})
    try:
        yield store
    finally:
        store.close()


@asynccontextmanager
async def serve(directory: Path, **options: Any) -> AsyncIterator[StorageService]:
    with open_store(directory, **options) as store:
        service = StorageService(store)
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            yield service
            nursery.cancel_scope.cancel()


async def upload(service: StorageService, storage_index: bytes, number: int, data: bytes, lease: int = 0) -> None:
    _, uploads = await service.allocate_buckets(storage_index, LEASES[lease], {number}, len(data))
    await uploads[number].write(0, data)
    await uploads[number].close()


def share_file(store: ShareStore, storage_index: bytes, number: int) -> bytes:
    return Path(store.share(storage_index, number)).read_bytes()


def files_in(directory: Path) -> set[str]:
    """Every file there is, whatever it is."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
