"""What a check found out, as a value, and as Tahoe's web API presents it in JSON.

    {"storage-index": base32, "summary": text, "results": {"healthy", "recoverable", "count-shares-good", …}}

Of an immutable file every good share counts; of a mutable one those of its best version, or if none can be recovered
of the one with most shares. Healthy is: all N numbers are there and, if mutable, nothing of another version is. How
shares are spread, and whether there are corrupt ones beside the good, makes no difference to that: `count-happiness`
and `count-corrupt-shares` tell. A mutable share without a valid signature is as good as none, and not among the corrupt
ones: it has a list of its own. Source: the check results of Tahoe-LAFS 1.20; `list-invalid-shares`,
`list-incompatible-shares` and `servers-silent` are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from attrs import evolve, field, frozen

from grid.formats.base32 import b2a
from grid.operations.happiness import happiness

Sharemap = Mapping[str, frozenset[str]]  # {share id: server ids}


@frozen
class CorruptShare:
    """One share that fails a check, and which."""

    server_id: str
    share_number: int
    reason: str


@frozen
class CheckResults:
    """One object's health. `storage_index` None: a literal, or something unknown; there is nothing to check."""

    storage_index: bytes | None = field(default=None, repr=lambda index: b2a(index)[:5] if index else "None")
    mutable: bool = False
    verified: bool = False
    needed_shares: int = 0
    total_shares: int = 0
    good: Mapping[int, frozenset[str]] = field(factory=dict)  # {share number: server ids}
    sharemap: Sharemap = field(factory=dict)  # of all versions
    wrong_shares: int = 0  # of other versions than the best
    recoverable_versions: int = 0
    unrecoverable_versions: int = 0
    corrupt: tuple[CorruptShare, ...] = ()
    invalid: tuple[CorruptShare, ...] = ()  # mutable shares that are not what their file's key signed
    incompatible: tuple[tuple[str, int], ...] = ()  # (server id, share number) of layouts we do not know
    responding: tuple[str, ...] = ()  # server ids
    silent: tuple[str, ...] = ()  # ids of servers that were asked and did not answer

    @classmethod
    def of_immutable(
        cls, storage_index: bytes, k: int, n: int, good: Mapping[int, frozenset[str]], **others: Any
    ) -> Self:
        recoverable = len(good) >= k
        return cls(
            storage_index=storage_index,
            needed_shares=k,
            total_shares=n,
            good=good,
            sharemap={str(number): servers for number, servers in sorted(good.items())},
            recoverable_versions=int(recoverable),
            unrecoverable_versions=int(not recoverable),
            **others,
        )

    def with_shares(self, added: Mapping[int, frozenset[str]]) -> Self:
        """The same immutable file, with these shares as well."""
        numbers = self.good.keys() | added.keys()
        nobody: frozenset[str] = frozenset()
        union = {number: self.good.get(number, nobody) | added.get(number, nobody) for number in numbers}
        fresh = self.of_immutable(self.storage_index or b"", self.needed_shares, self.total_shares, union)
        return evolve(
            self,
            good=fresh.good,
            sharemap=fresh.sharemap,
            recoverable_versions=fresh.recoverable_versions,
            unrecoverable_versions=fresh.unrecoverable_versions,
        )

    @property
    def checkable(self) -> bool:
        return self.storage_index is not None

    @property
    def healthy(self) -> bool:
        if not self.checkable:
            return True
        versions_agree = self.recoverable_versions == 1 and not self.unrecoverable_versions
        return len(self.good) == self.total_shares and (versions_agree or not self.mutable)

    @property
    def recoverable(self) -> bool:
        return not self.checkable or self.recoverable_versions > 0

    @property
    def happiness(self) -> int:
        """Servers that each hold a share of their own."""
        ids = {share_id: index for index, share_id in enumerate(sorted(self.sharemap))}
        return happiness({ids[share_id]: servers for share_id, servers in self.sharemap.items()})

    @property
    def good_hosts(self) -> frozenset[str]:
        return frozenset().union(*self.good.values())

    @property
    def holders(self) -> frozenset[str]:
        """Ids of servers that hold any share, good or not."""
        bad = {share.server_id for share in (*self.corrupt, *self.invalid)}
        return frozenset(bad).union(*self.sharemap.values(), (server_id for server_id, _ in self.incompatible))

    @property
    def summary(self) -> str:
        if self.healthy:
            return "Healthy"
        shares = f"{len(self.good)} shares (enc {self.needed_shares}-of-{self.total_shares})"
        return f"Unhealthy: {' '.join(self._complaints(shares))}" if self.mutable else f"Not Healthy: {shares}"

    def _complaints(self, shares: str) -> list[str]:
        said = []
        if self.unrecoverable_versions:
            said.append("some versions are unrecoverable")
        if not self.recoverable_versions:
            said.append("no versions are recoverable")
        if self.recoverable_versions > 1:
            said.append("multiple versions are recoverable")
        if self.recoverable_versions and len(self.good) < self.total_shares:
            said.append(shares)
        if self.corrupt and self.verified:
            names = (f"{short_server(share.server_id)}-sh{share.share_number}" for share in self.corrupt)
            said.append(f"Corrupt Shares: {' '.join(names)}")
        return said

    def to_json(self) -> dict[str, Any]:
        """As Tahoe's web API has it. What is not checkable has nothing but `healthy`."""
        if self.storage_index is None:
            return {"storage-index": "", "results": {"healthy": True}}
        index = b2a(self.storage_index)
        results = {
            "healthy": self.healthy,
            "recoverable": self.recoverable,
            "count-happiness": self.happiness,
            "count-shares-good": len(self.good),
            "count-shares-needed": self.needed_shares,
            "count-shares-expected": self.total_shares,
            "count-good-share-hosts": len(self.good_hosts),
            "count-wrong-shares": self.wrong_shares,
            "count-recoverable-versions": self.recoverable_versions,
            "count-unrecoverable-versions": self.unrecoverable_versions,
            "count-corrupt-shares": len(self.corrupt),
            "list-corrupt-shares": [[share.server_id, index, share.share_number] for share in self.corrupt],
            "list-invalid-shares": [[share.server_id, index, share.share_number] for share in self.invalid],
            "list-incompatible-shares": [[server_id, index, number] for server_id, number in self.incompatible],
            "servers-silent": list(self.silent),
            "servers-responding": list(self.responding),
            "sharemap": {share_id: sorted(servers) for share_id, servers in self.sharemap.items()},
        }
        return {"storage-index": index, "summary": self.summary, "results": results}


@frozen
class RepairResults:
    """A check, what was done about it, and how things stand after that."""

    before: CheckResults
    after: CheckResults
    attempted: bool
    reason: str = ""  # why it was not attempted although unhealthy, or did not succeed

    @property
    def successful(self) -> bool:
        return self.attempted and self.after.healthy

    def to_json(self) -> dict[str, Any]:
        if self.before.storage_index is None:
            return self.before.to_json()
        return {
            "storage-index": b2a(self.before.storage_index),
            "repair-attempted": self.attempted,
            "repair-successful": self.successful,
            "pre-repair-results": self.before.to_json(),
            "post-repair-results": self.after.to_json(),
        }


def short_server(server_id: str) -> str:
    """What logs and summaries call a server."""
    return server_id.removeprefix("v0-")[:8]
