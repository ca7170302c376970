"""The secrets a client shows to one storage server, for leases and for writing to a mutable slot; renewing leases.

The secrets are derived from the node's lease secret (`private/secret`), the storage index and the server's tub id, so
no server learns what another is told, and the same client finds its leases again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Final

import trio
from attrs import field, frozen

from grid.errors import PeerError, PeerTimeoutError
from grid.formats import hashutil
from grid.interfaces import IStorageServer, LeaseSecrets, SlotSecrets
from grid.operations.worker import in_lanes

log = logging.getLogger(__name__)

RENEW_TIMEOUT_S: Final = 15.0  # for one server's answer
RENEWALS_AT_ONCE: Final = 32  # of one object


@frozen
class Secrets:
    """Derives per-server secrets from the node's own. 32 bytes."""

    node_secret: bytes = field(repr=False)

    def lease(self, storage_index: bytes, tub_id: bytes) -> LeaseSecrets:
        return hashutil.lease_secrets(self.node_secret, storage_index, tub_id)

    def slot(self, writekey: bytes, storage_index: bytes, tub_id: bytes) -> SlotSecrets:
        return SlotSecrets(hashutil.write_enabler(writekey, tub_id), self.lease(storage_index, tub_id))


async def renew_leases(
    servers: Collection[IStorageServer], secrets: Secrets, storage_index: bytes
) -> dict[str, PeerError | None]:
    """Add our lease to all shares these servers hold, or renew it, for a month. {server id: None, or what failed}."""
    outcome: dict[str, PeerError | None] = {}

    async def renew(server: IStorageServer) -> None:
        try:
            with trio.move_on_after(RENEW_TIMEOUT_S) as scope:
                await server.add_lease(storage_index, secrets.lease(storage_index, server.tub_id))
            if scope.cancelled_caught:
                raise PeerTimeoutError(f"server {server.name} did not answer in time")
            outcome[server.server_id] = None
        except PeerError as error:
            log.info("lease not renewed on server %s: %s", server.name, error)
            outcome[server.server_id] = error

    await in_lanes(RENEWALS_AT_ONCE, servers, renew)
    return outcome
