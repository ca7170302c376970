"""What any storage server is before, and besides, being connected: its announcement, and what it says of itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, Protocol, TypeVar

import trio

from grid.errors import ConnectionLostError, FormatError, PeerError
from grid.formats.announcement import Announcement
from grid.formats.furl import Furl
from grid.peers.pulse import Pulse

log = logging.getLogger(__name__)

SLOW_DIAL_S: Final = 5.0  # who has not answered by then is not waited for at start-up
NAME_CHARACTERS: Final = 8
APPLICATION_BYTES_MAX: Final = 64
SPACE_BYTES_MAX: Final = 1 << 64  # what servers tell that do not know; ours: a number may be of any length
VERSION_KEY: Final = b"http://allmydata.org/tahoe/protocols/storage/v1"
_FEATURES: Final = (
    *(b"maximum-immutable-share-size", b"maximum-mutable-share-size", b"available-space"),
    *(b"tolerates-immutable-read-overrun", b"delete-mutable-shares-with-zero-length-writev"),
    *(b"fills-holes-with-zero-bytes", b"prevents-read-past-end-of-share-data"),
)
_OLD_IMMUTABLE_SHARE_BYTES_MAX: Final = (1 << 32) - 1  # of servers too old to say


class _HasPulse(Protocol):
    @property
    def pulse(self) -> Pulse: ...


_Connection = TypeVar("_Connection", bound=_HasPulse)


class AnnouncedServer(Generic[_Connection]):
    """The part of IStorageServer that is the same over each protocol; `_connection` is what the protocol keeps."""

    def __init__(self, announcement: Announcement, *, changed: Callable[[], None] = lambda: None) -> None:
        """Raises FormatError when the announcement has no usable FURL: its tub id is the seed of the lease secrets."""
        if announcement.furl is None:
            raise FormatError("a storage server is announced without a FURL")
        self.announcement = announcement
        self.last_failure: str | None = None
        self.clock_ahead_s: float | None = None  # of ours, to a second or so, where the server tells the time
        self._furl: Furl = announcement.furl
        self._tub_id = announcement.furl.tub_id_bytes
        self._changed = changed
        self._connection: _Connection | None = None
        self._version: Mapping[bytes, Any] = {}
        self._dialling_since: float | None = None
        self._failed_once = False

    @property
    def server_id(self) -> str:
        return self.announcement.server_id

    @property
    def name(self) -> str:
        return self.server_id.removeprefix("v0-")[:NAME_CHARACTERS]

    @property
    def nickname(self) -> str:
        return self.announcement.nickname

    @property
    def permutation_seed(self) -> bytes:
        return self.announcement.permutation_seed

    @property
    def tub_id(self) -> bytes:
        return self._tub_id

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def responsive(self) -> bool:
        """Connected, and not silent to what was asked of it."""
        return self._connection is not None and self._connection.pulse.responsive

    @property
    def latency_s(self) -> float | None:
        """Average time it took over small calls of late; None when nothing is known."""
        return self._connection.pulse.latency_s if self._connection else None

    def doubt(self) -> None:
        """The connection may be dead without any sign of it: find out soon."""
        if self._connection is not None:
            self._connection.pulse.doubt()

    def wonder(self) -> None:
        """Other servers are silent: have this one give a sign of life, if it is not awaited anyway."""
        if self._connection is not None:
            self._connection.pulse.wonder()

    def _connected(self) -> _Connection:
        if self._connection is None:
            raise ConnectionLostError(f"not connected to server {self.name}")
        return self._connection

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}{'' if self.connected else ' (not connected)'}>"

    @property
    def settled(self) -> bool:
        """Connected, or known to be of no use for now: it refused, was lost, or is slow to answer at all."""
        if self.connected or self._failed_once:
            return True
        return self._dialling_since is not None and trio.current_time() - self._dialling_since > SLOW_DIAL_S

    @property
    def maximum_immutable_share_size(self) -> int:
        default = 0 if not self._version else _OLD_IMMUTABLE_SHARE_BYTES_MAX
        size = self._told(b"maximum-immutable-share-size")
        return default if size is None else size

    @property
    def available_space(self) -> int | None:
        return self._told(b"available-space")

    def _told(self, key: bytes) -> int | None:
        inner = self._version.get(VERSION_KEY)
        value = inner.get(key) if isinstance(inner, Mapping) else None
        return min(value, SPACE_BYTES_MAX) if type(value) is int and value >= 0 else None

    @property
    def application_version(self) -> str:
        version = self._version.get(b"application-version", b"")
        text = version.decode("utf-8", "replace")[:APPLICATION_BYTES_MAX] if isinstance(version, bytes) else ""
        return text if text.isprintable() else ""

    def _failed(self, error: PeerError) -> None:
        self.last_failure = f"{type(error).__name__}: {error}"
        # a server that stays away is tried for ever: said once, not every minute
        log.log(logging.DEBUG if self._failed_once else logging.INFO, "storage server %s: %s", self.name, error)
        self._failed_once = True
        self._changed()


def bounded_version(version: Mapping[bytes, Any]) -> Mapping[bytes, Any]:
    """Of a `get_version` answer, which may be of any size, what is worth keeping for as long as we are connected."""
    inner, application = version.get(VERSION_KEY), version.get(b"application-version")
    told = inner if isinstance(inner, Mapping) else {}
    kept: dict[bytes, Any] = {VERSION_KEY: {key: told[key] for key in _FEATURES if isinstance(told.get(key), int)}}
    if isinstance(application, bytes):
        kept[b"application-version"] = application[:APPLICATION_BYTES_MAX]
    return kept
