"""Every error the grid layer raises on purpose.

An error says what failed, on what, and whether trying again can help; the mount's answer (errno) and the
command line's (exit code) are chosen in one place, `tahoefs/errnos.py`. No error ever holds a cap, a key
or a secret: a storage index may appear, shortened by `short_si`.

    GridError
    ├── FormatError              bytes or text are not what they should be
    │   ├── BadCapError
    │   └── UnknownVersionError
    ├── ShareError               this share will never be good (do not retry it; use another)
    │   ├── CorruptShareError
    │   └── ShareVersionError
    ├── PeerError                a server failed this time (another server, or later, may do)
    │   ├── RemoteProtocolError, ConnectionLostError, PeerTimeoutError, RemoteFailure, NoSpaceError …
    ├── NotEnoughSharesError, NotEnoughServersError, UncoordinatedWriteError, InconsistentEncodingError
    ├── NoSuchChildError, ChildExistsError, NotWriteableError, WrongKindError
    └── NodeDirectoryError, GridUnreachableError
"""

from __future__ import annotations

from attrs import define, field


class GridError(Exception):
    """Base of all errors the grid layer raises on purpose. Anything else that flies is a bug."""


class FormatError(GridError):
    """Bytes or text from a disk, a user or a peer do not parse. The text never repeats the input."""


class BadCapError(FormatError):
    """Text is not a capability of the kind asked for. Never repeats the text: a cap is a secret."""


@define
class UnknownVersionError(FormatError):
    """A share begins with a layout version we do not know. The caller makes a ShareVersionError of it."""

    version: int

    def __str__(self) -> str:
        return f"unknown share layout version {self.version}"


class ShareError(GridError):
    """One share is of no use, now and for ever: take another."""


@define
class CorruptShareError(ShareError):
    """A share's bytes fail a check. The share is reported to its server and another one used."""

    server: str  # the server's short name, fit for a log
    share_number: int
    reason: str

    def __str__(self) -> str:
        return f"corrupt share {self.share_number} on server {self.server}: {self.reason}"


@define
class ShareVersionError(ShareError):
    """A share is of a layout version we do not know: incompatible, not corrupt."""

    server: str
    share_number: int
    version: int

    def __str__(self) -> str:
        return f"share {self.share_number} on server {self.server} has unknown layout version {self.version}"


class PeerError(GridError):
    """A peer failed: this time. Another peer, or the same one later, may do."""


class RemoteProtocolError(PeerError):
    """A peer sent something its protocol does not allow. Its connection is of no use after this."""


class NegotiationError(PeerError):
    """A connection could not be agreed on (wrong identity, no common version, refused)."""


class ConnectionLostError(PeerError):
    """The connection ended while, or before, an answer was awaited."""


class PeerTimeoutError(PeerError):
    """A peer did not answer within its deadline."""


@define
class RemoteFailure(PeerError):
    """A peer answered a call with an error.

    `type_name` is the remote class's dotted name; compare `short_type`, its last component, since
    old peers use other module names.
    """

    type_name: str
    message: str

    @property
    def short_type(self) -> str:
        return self.type_name.rpartition(".")[2]

    def __str__(self) -> str:
        return f"remote {self.short_type}: {self.message}"


class Violation(PeerError):
    """A well-formed value that our own schema for that call does not accept."""


class NoSpaceError(PeerError):
    """A server refused a share for want of space."""


def refused_for_space(error: Exception) -> bool:
    """Whether a server said, in whichever way, that it has no room."""
    if isinstance(error, RemoteFailure):
        return "NoSpace" in error.type_name or "[Errno 28]" in error.message  # ENOSPC, as Python shows it
    return isinstance(error, NoSpaceError)


@define
class NotEnoughSharesError(GridError):
    """Too few good shares answered, so the file cannot be read now. The mount answers EIO.

    Trying again may help if any of `failures` is a PeerError, never if all are ShareErrors.
    """

    needed: int  # shares
    found: int  # shares
    failures: tuple[Exception, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        text = f"found {self.found} good shares of the {self.needed} needed"
        if self.failures:
            shown = "; ".join(str(failure) for failure in self.failures[:4])
            text += f" ({shown}{'; …' if len(self.failures) > 4 else ''})"
        return text


@define
class NotEnoughServersError(GridError):
    """Shares could be spread over too few servers (happiness not reached), so it does not count as stored.

    `refused_for_space` is true when servers that answered had no room: the mount then says ENOSPC.
    """

    happy: int  # distinct servers wanted
    reached: int  # distinct servers that would hold a share of their own
    connected: int  # servers we could ask
    refused_for_space: bool = False

    def __str__(self) -> str:
        cause = "servers have no space left" if self.refused_for_space else f"{self.connected} servers answered"
        return f"shares would reach {self.reached} servers, {self.happy} are required ({cause})"


@define
class UncoordinatedWriteError(GridError):
    """Another writer changed the mutable file between our reading and our writing it. Read again, then retry."""

    reason: str

    def __str__(self) -> str:
        return f"another writer was there first: {self.reason}"


class InconsistentEncodingError(GridError):
    """k good blocks decode to a segment whose hash is wrong: the uploader was broken. Nothing can help."""


@define
class NoSuchChildError(GridError):
    """A directory has no child of that name."""

    name: str

    def __str__(self) -> str:
        return f"no child named {self.name!r}"


@define
class ChildExistsError(GridError):
    """A directory already has a child of that name, and replacing was not asked for."""

    name: str

    def __str__(self) -> str:
        return f"a child named {self.name!r} already exists"


class NotWriteableError(GridError):
    """The cap held does not allow changing this (read-only cap, or an immutable thing). The seed's NotCapableError."""


class WrongKindError(GridError):
    """A cap is valid, but of another kind than the operation needs (a file where a directory is wanted, …)."""


class NodeDirectoryError(GridError):
    """The node directory is missing or its files cannot be used; the text names the file and what to do."""


class GridUnreachableError(GridError):
    """No introducer or server could be reached, or too few, within the deadline."""


def short_si(storage_index_text: str) -> str:
    """The first five characters of a storage index in base32: enough to find it again, no secret."""
    return storage_index_text[:5]
