"""The secrets a client shows to one storage server: for leases, and for writing to a mutable slot.

They are derived from the node's lease secret (`private/secret`), the storage index and the server's tub id, so
no server learns what another is told, and the same client finds its leases again.
"""

from __future__ import annotations

from attrs import field, frozen

from grid.formats import hashutil
from grid.interfaces import LeaseSecrets, SlotSecrets


@frozen
class Secrets:
    """Derives per-server secrets from the node's own. 32 bytes."""

    node_secret: bytes = field(repr=False)

    def lease(self, storage_index: bytes, tub_id: bytes) -> LeaseSecrets:
        return hashutil.lease_secrets(self.node_secret, storage_index, tub_id)

    def slot(self, writekey: bytes, storage_index: bytes, tub_id: bytes) -> SlotSecrets:
        return SlotSecrets(hashutil.write_enabler(writekey, tub_id), self.lease(storage_index, tub_id))
