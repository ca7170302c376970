"""A storage directory: where share files are, how much room there is, what was found broken in them.

    STORE/shares/XX/SI/N               finished shares; SI in base32, XX its first two characters, N decimal
    STORE/shares/incoming/SI.N         immutable shares being uploaded; SI.N.new: a mutable share being made
    STORE/corruption-advisories/TIME--SI-N
    STORE/tahoefs.journal              see grid/server/journal.py; gone after an orderly stop

What is in `incoming` is of no use after a stop and is deleted at the next start, by Tahoe-LAFS too. A share file is one
whose name is a share number; anything else in a bucket's directory is overlooked. Whether a share is mutable is told
by its first bytes alone.

Everything here and in immutables, slots and journal is synchronous and does a few system calls at a time; the service
above decides what runs in a thread. Share files are opened for each use (an immutable being read stays open a while),
so files that an administrator takes away or puts there are noticed at once.
Source: the storage directories of Tahoe-LAFS 1.20.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Final

from grid.errors import FormatError
from grid.formats import base32, container
from grid.server.checks import SHARE_NUMBER_MAX, STORAGE_INDEX_BYTES
from grid.server.errors import StorageError, UnusableShareError
from grid.server.immutables import OpenShares
from grid.server.journal import Journal, Places

log = logging.getLogger(__name__)

LEASE_PERIOD_S: Final = 31 * 24 * 3600
REASON_BYTES_MAX: Final = 32 << 10
ADVISORIES_MAX: Final = 10_000  # ours: files kept; nobody can fill a disk by complaining

_INCOMING = "incoming"


@lru_cache(maxsize=1024)  # several uses in one call, several calls in a row
def _name_of(storage_index: bytes) -> str:
    return base32.b2a(storage_index)


class ShareStore(Places):
    """One storage directory, in use by this process alone until close()."""

    def __init__(
        self,
        directory: Path,
        *,
        reserved_space: int = 0,
        readonly: bool = False,
        tub_id: bytes,
        clock: Callable[[], float] = time.time,
        durable: bool = False,
    ) -> None:
        """`tub_id`: 20 bytes, noted in the leases and write enablers this server accepts. Makes what is missing,
        finishes what an earlier process could not, and forgets its uploads. Raises StorageError when another process
        has the directory, OSError.
        """
        if len(tub_id) != container.NODE_ID_BYTES:
            raise ValueError("a tub id is 20 bytes")
        self.directory = Path(directory)
        self.reserved_space = reserved_space
        self.readonly = readonly
        self.tub_id = tub_id
        self.clock = clock
        self.durable = durable
        self._shares = os.path.join(os.fspath(directory), "shares")
        self._incoming = os.path.join(self._shares, _INCOMING)
        self._advisories = os.path.join(os.fspath(directory), "corruption-advisories")
        self._advisories_left: int | None = None
        os.makedirs(self._shares, exist_ok=True)
        self._lock = _lock_directory(directory)
        try:
            self.journal = Journal(os.path.join(os.fspath(directory), "tahoefs.journal"), self, durable=durable)
        except BaseException:
            os.close(self._lock)
            raise
        shutil.rmtree(self._incoming, ignore_errors=True)
        os.makedirs(self._incoming, exist_ok=True)
        self.open_shares = OpenShares(self)

    def close(self) -> None:
        """Let go of the directory. Harmless when repeated."""
        if self._lock >= 0:
            self.open_shares.close()
            self.journal.close()
            os.close(self._lock)
            self._lock = -1

    # --- where things are

    def bucket(self, storage_index: bytes) -> str:
        text = _name_of(storage_index)
        return f"{self._shares}/{text[:2]}/{text}"

    def share(self, storage_index: bytes, number: int) -> str:
        return f"{self.bucket(storage_index)}/{number}"

    def upload(self, storage_index: bytes, number: int) -> str:
        return f"{self._incoming}/{_name_of(storage_index)}.{number}"

    def temporary(self, storage_index: bytes, number: int) -> str:
        return f"{self.upload(storage_index, number)}.new"

    def share_numbers(self, storage_index: bytes) -> list[int]:
        """Numbers of the share files there are, of either kind, in order."""
        return share_numbers_in(self.bucket(storage_index))

    def prefixes(self) -> list[str]:
        """The directories buckets are in, in order."""
        return sorted(name for name in os.listdir(self._shares) if len(name) == 2)

    def buckets_in(self, prefix: str) -> list[bytes]:
        """Storage indexes, in the order of their names."""
        found = []
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in sorted(os.listdir(os.path.join(self._shares, prefix))):
                with suppress(FormatError):
                    storage_index = base32.a2b(name)
                    if len(storage_index) == STORAGE_INDEX_BYTES and name.startswith(prefix):
                        found.append(storage_index)
        return found

    def kind_of(self, storage_index: bytes, number: int) -> str:
        """`immutable` or `mutable`. Raises FileNotFoundError, UnusableShareError."""
        fd = os.open(self.share(storage_index, number), os.O_RDONLY | os.O_CLOEXEC)
        try:
            kind = container.kind_of(os.pread(fd, container.MAGIC_BYTES, 0))
        finally:
            os.close(fd)
        if kind is None:
            raise UnusableShareError(f"share {number} is in no container that is known")
        return kind

    # --- how much there is

    def available_space(self) -> int | None:
        """Bytes others may still use: 0 when read-only or the system will not say."""
        if self.readonly:
            return 0
        try:
            status = os.statvfs(self._shares)
        except OSError:
            return 0
        return max(status.f_frsize * status.f_bavail - self.reserved_space, 0)

    def has_room_for(self, size: int) -> bool:
        space = self.available_space()
        return space is None or size <= space

    # --- what was found broken

    def write_advisory(self, kind: str, storage_index: bytes, number: int, reason: str) -> None:
        """Note that somebody found a share damaged, for people to read. Best effort: the disk may be full."""
        if self._advisories_left is None:
            os.makedirs(self._advisories, exist_ok=True)
            self._advisories_left = ADVISORIES_MAX - len(os.listdir(self._advisories))
        text = base32.b2a(storage_index)
        reason = reason.encode("utf-8", "replace")[:REASON_BYTES_MAX].decode("utf-8", "ignore")
        report = (
            f"report: Share Corruption\ntype: {kind}\nstorage_index: {text}\nshare_number: {number}\n\n{reason}\n\n"
        ).encode()
        if self._advisories_left <= 0 or not self.has_room_for(len(report)):
            log.warning("a corruption report on share %d of %s was dropped: no room", number, text[:5])
            return
        now = datetime.fromtimestamp(self.clock(), UTC).replace(tzinfo=None)
        name = f"{now.isoformat(timespec='microseconds').replace(':', '')}--{text}-{number}"
        try:
            with open(os.path.join(self._advisories, name), "xb") as file:
                file.write(report)
        except FileExistsError:
            return
        self._advisories_left -= 1
        log.warning("share %d of %s was reported corrupt", number, text[:5])


def share_numbers_in(bucket: str) -> list[int]:
    try:
        names = os.listdir(bucket)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        number
        for name in names
        if name.isascii() and name.isdigit() and str(number := int(name[:4])) == name and number <= SHARE_NUMBER_MAX
    )


def _lock_directory(directory: Path) -> int:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise StorageError(f"{directory} is in use by another storage server") from None
    return fd
