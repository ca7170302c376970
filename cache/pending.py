"""What is on its way to the grid: a new file, and new contents for a mutable one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import trio
from attrs import define

from cache.cap_json import cap_to_json
from cache.sealed import SealedFile
from cache.throughput import Meter
from grid.formats.caps import Cap

if TYPE_CHECKING:
    from cache.directories import Change


@define
class UploadProgress:
    """IUploadProgress: how far the upload under way is. Bytes are of shares, which are n/k times the file's."""

    meter: Meter
    shares_placed: int = 0
    shares_total: int = 0  # 0 until the servers are chosen
    pushed_bytes: int = 0
    push_bytes: int = 0

    def begin(self, placed: int, total: int, push_bytes: int) -> None:
        self.shares_placed, self.shares_total, self.push_bytes = placed, total, push_bytes

    def pushed(self, count: int) -> None:
        self.pushed_bytes += count
        self.meter.add(count, trio.current_time())

    def placed(self) -> None:
        self.shares_placed += 1

    @property
    def fraction(self) -> float:
        return min(self.pushed_bytes / self.push_bytes, 1.0) if self.push_bytes else 0.0


Stage = Literal["queued", "encoding", "pushing", "linking"]


class PendingFile:
    """A sealed file that names refer to; uploaded as long as one of them does. Compared by identity."""

    def __init__(self, sealed: SealedFile, name: str, mutable: str = "none") -> None:
        self.sealed: SealedFile | None = sealed  # None once it is stored or dropped
        self.name = name  # as it was first called, for messages
        self.mutable = mutable  # what it is stored as: "sdmf", "mdmf" or, for an immutable file, "none"
        self.size = sealed.size
        self.cap: Cap | None = None  # once stored
        self.error: Exception | None = None  # the last failure, until it succeeds
        self.attempts = 0  # that failed
        self.sending = False  # its upload is under way
        self.progress: UploadProgress | None = None  # of that upload, or of the one that stored it
        self.links: set[Change] = set()  # pending LINKs to it
        self.scope: trio.CancelScope | None = None  # of the upload under way
        self.queued = False

    def __repr__(self) -> str:
        return f"<PendingFile {self.size} bytes, {self.state}>"

    @property
    def state(self) -> Literal["pending", "stored", "failed"]:
        if self.cap is not None:
            return "stored"
        return "failed" if self.error is not None else "pending"

    @property
    def stage(self) -> Stage:
        if self.cap is not None:
            return "linking"
        if not self.sending:
            return "queued"
        return "pushing" if self.progress is not None and self.progress.shares_total else "encoding"

    @property
    def unsent_bytes(self) -> int:
        """Of its contents; what is on its way to servers counts as sent."""
        if self.cap is not None:
            return 0
        return self.size if self.progress is None else round(self.size * (1 - self.progress.fraction))

    @property
    def wanted(self) -> bool:
        return bool(self.links) and self.cap is None


class Replacement:
    """New contents for a mutable file. An effect in the journal; the latest for one file is the one that counts."""

    def __init__(self, cap: Cap, sealed: SealedFile, position: int, name: str) -> None:
        self.cap = cap
        self.sealed = sealed
        self.position = position
        self.name = name  # for messages
        self.size = sealed.size
        self.unsent_bytes = sum(stop - start for start, stop in self.written())
        self.sending = False
        self.progress = None  # of a publish nothing is known but that it is under way
        self.error: Exception | None = None
        self.attempts = 0
        self.done = False
        self.id = 0  # in the journal

    @property
    def stage(self) -> Stage:
        return "pushing" if self.sending else "queued"

    def written(self) -> list[tuple[int, int]]:
        """What is sent of it: everything, or in place where it was written."""
        if self.cap.kind != "mdmf":
            return [(0, self.size)]
        return self.sealed.showing(self.cap).without(0, self.size)

    @property
    def parts(self) -> Iterable[SealedFile]:
        return (self.sealed,)

    def row(self, number_of: Callable[[Any], int]) -> dict[str, Any] | None:
        """See `cache/replay.py` for the way back."""
        if self.done:
            return None
        return {
            "is": "replacement",
            "cap": cap_to_json(self.cap),
            "file": number_of(self.sealed),
            "position": self.position,
            "name": self.name,
        }
