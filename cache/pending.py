"""What is on its way to the grid: a new file, and new contents for a mutable one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import trio

from cache.sealed import SealedFile
from grid.formats.caps import Cap

if TYPE_CHECKING:
    from cache.directories import Change


class PendingFile:
    """A sealed file that names refer to; uploaded as long as one of them does. Compared by identity."""

    def __init__(self, sealed: SealedFile, name: str) -> None:
        self.sealed: SealedFile | None = sealed  # None once it is stored or dropped
        self.name = name  # as it was first called, for messages
        self.size = sealed.size
        self.cap: Cap | None = None  # once stored
        self.error: Exception | None = None  # the last failure, until it succeeds
        self.attempts = 0  # that failed
        self.stage: Literal["queued", "hashing", "pushing", "linking"] = "queued"
        self.stored_shares = 0
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
    def wanted(self) -> bool:
        return bool(self.links) and self.cap is None


class Replacement:
    """New contents for a mutable file. An effect in the journal; the latest for one file is the one that counts."""

    def __init__(self, cap: Cap, sealed: SealedFile, position: int) -> None:
        self.cap = cap
        self.sealed = sealed
        self.position = position
        self.size = sealed.size
        self.error: Exception | None = None
        self.attempts = 0
