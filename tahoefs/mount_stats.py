"""What a mount tells of itself in statistics, beside what is counted as requests come: its status, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from grid.stats import Metric

METRICS: Final = (
    Metric("mount_pending_files", "gauge", "Files written and not on the grid yet."),
    Metric("mount_pending_bytes", "gauge", "Bytes of these."),
    Metric("mount_pending_directories", "gauge", "Directories with changes that are not on the grid yet."),
    Metric("mount_uploads", "gauge", "Files on their way, by stage.", "stage"),
    Metric("mount_uploaded_files", "counter", "Files stored by this mount."),
    Metric("mount_pushed_bytes", "counter", "Bytes of shares this mount sent, or of ciphertext to a helper."),
    Metric("mount_publishes", "counter", "Publishes of directories by this mount."),
    Metric("mount_conflicts", "counter", "Names another writer had changed meanwhile; both were kept."),
    Metric("mount_oldest_lease_seconds", "gauge", "Seconds since a lease below this mount was last renewed, at most."),
    Metric("mount_errors", "gauge", "Errors that `tahoefs status` shows."),
    Metric("mount_faults", "counter", "Requests of the kernel that met a mistake of ours."),
    Metric("mount_timeouts", "counter", "Requests of the kernel that missed their deadline."),
    Metric("journal_bytes", "gauge", "Bytes of the journal: files open, and files not sent."),
    Metric("journal_limit_bytes", "gauge", "How many it may be."),
    Metric("cache_bytes", "gauge", "Bytes of ciphertext in the cache."),
    Metric("cache_limit_bytes", "gauge", "How many it may be."),
    Metric("cache_hits", "counter", "Segments found in the cache."),
    Metric("cache_misses", "counter", "Segments that had to be fetched."),
)


class MountStats:
    """IStatsProducer over a mount's status and the VFS's counts."""

    def __init__(self, status: Callable[[], dict[str, Any]], faults: Callable[[], tuple[int, int]]) -> None:
        """`faults` tells how many requests met a mistake of ours, and how many missed their deadline."""
        self._status = status
        self._faults = faults

    def get_stats(self) -> Mapping[str, float]:
        status = self._status()
        pending, journal, cache = status["pending"], status["journal"], status["cache"]
        faults, timeouts = self._faults()
        told: dict[str, float] = {
            "mount_pending_files": pending["files"],
            "mount_pending_bytes": pending["bytes"],
            "mount_pending_directories": pending["directories"],
            "mount_uploaded_files": status["uploaded"],
            "mount_pushed_bytes": status["throughput"]["pushed_bytes"],
            "mount_publishes": status["publishes"],
            "mount_conflicts": status["conflicts"],
            "mount_errors": len(status["errors"]),
            "mount_faults": faults,
            "mount_timeouts": timeouts,
            "journal_bytes": journal["bytes"],
            "journal_limit_bytes": journal["limit"],
            "cache_bytes": cache["bytes"],
            "cache_limit_bytes": cache["limit"],
            "cache_hits": cache["hits"],
            "cache_misses": cache["misses"],
        }
        if (leases := status.get("leases")) is not None and leases["oldest_s"] is not None:
            told["mount_oldest_lease_seconds"] = leases["oldest_s"]
        for upload in status["uploads"]:
            key = f"mount_uploads.{upload['stage']}"
            told[key] = told.get(key, 0) + 1
        return told
