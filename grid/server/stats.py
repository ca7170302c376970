"""What a storage server tells of itself in statistics, beside what is counted as requests come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from grid.server.expirer import Expirer
from grid.server.storage import StorageService
from grid.stats import Metric

METRICS: Final = (
    Metric("storage_available_bytes", "gauge", "Bytes clients may still use."),
    Metric("storage_reserved_bytes", "gauge", "Bytes of the disk that are kept free."),
    Metric("storage_uploads", "gauge", "Uploads of shares in progress."),
    Metric("storage_buckets", "gauge", "Storage indexes with shares here, at the last full count."),
    Metric("storage_shares", "gauge", "Shares held, at the last full count.", "kind"),
    Metric("storage_leases", "gauge", "Leases on shares, at the last full count."),
    Metric("storage_leases_expired", "gauge", "Leases dropped because they were over, in the cycles remembered."),
    Metric("storage_shares_deleted", "gauge", "Shares deleted with their last lease, in the cycles remembered."),
    Metric("storage_freed_bytes", "gauge", "Bytes freed by that, in the cycles remembered."),
    Metric("storage_shares_unreadable", "gauge", "Shares that could not be read, at the last full count."),
)


class StorageStats:
    """IStatsProducer of one storage server."""

    def __init__(self, service: StorageService, expirer: Expirer) -> None:
        self._service = service
        self._expirer = expirer

    def get_stats(self) -> Mapping[str, float]:
        store = self._service.store
        told: dict[str, float] = {
            "storage_reserved_bytes": store.reserved_space,
            "storage_uploads": self._service.uploads_in_progress,
        }
        if (space := store.available_space()) is not None:
            told["storage_available_bytes"] = space
        if cycles := self._expirer.history:
            last = cycles[-1]
            told |= {
                "storage_buckets": last.buckets,
                "storage_leases": last.leases,
                "storage_shares_unreadable": len(last.corrupt),
                "storage_leases_expired": sum(cycle.leases_expired for cycle in cycles),
                "storage_shares_deleted": sum(cycle.shares_deleted for cycle in cycles),
                "storage_freed_bytes": sum(cycle.bytes_freed for cycle in cycles),
            }
            told |= {f"storage_shares.{kind}": count for kind, count in last.shares.items()}
        return told
