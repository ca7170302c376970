"""What a storage server refuses, and under which name the refusal crosses the wire.

    StorageError
    ├── ConflictingWriteError, DataTooLargeError, UploadFinishedError    writing an immutable share
    ├── BadWriteEnablerError                                             writing a mutable slot
    ├── NoSpaceError                                                     a lease, a share or a hole does not fit
    ├── NoSuchShareError                                                 nothing is stored there
    ├── BadRequestError                                                  arguments out of bounds
    └── UnusableShareError                                               the file on disk is not what was asked for
        ├── UnknownImmutableContainerVersionError
        └── UnknownMutableContainerVersionError

`wire_name` is what a Foolscap peer is told; the HTTP front end chooses a status by class.
Source of the names: Tahoe-LAFS 1.20, as its peers see them.
"""

from __future__ import annotations

from typing import ClassVar

from attrs import define

from grid.errors import GridError


class StorageError(GridError):
    """Base of all that a storage server refuses on purpose."""

    wire_name: ClassVar[str] = "builtins.ValueError"


class ConflictingWriteError(StorageError):
    """Bytes of an immutable share were written before, and differently."""

    wire_name = "allmydata.interfaces.ConflictingWriteError"


@define
class DataTooLargeError(StorageError):
    """A write past what was allocated (immutable), or past what any share may hold (mutable)."""

    allocated: int  # bytes
    offset: int
    length: int

    wire_name: ClassVar[str] = "allmydata.interfaces.DataTooLargeError"

    def __str__(self) -> str:
        return f"({self.allocated}, {self.offset}, {self.length})"


class UploadFinishedError(StorageError):
    """The share was closed, aborted, or given up after a long silence."""

    wire_name = "builtins.AssertionError"


@define
class BadWriteEnablerError(StorageError):
    """A share of the slot was made with another write enabler; `node_id` tells which server it was made on."""

    node_id: str  # base32 of a tub id: public

    wire_name: ClassVar[str] = "allmydata.interfaces.BadWriteEnablerError"

    def __str__(self) -> str:
        return f"The write enabler was recorded by nodeid '{self.node_id}'."


class NoSpaceError(StorageError):
    """There is no room within the reserved space."""

    wire_name = "allmydata.interfaces.NoSpace"


class NoSuchShareError(StorageError):
    """No share of that number, or none at all, under this storage index."""

    wire_name = "builtins.KeyError"


class BadRequestError(StorageError):
    """An argument no honest client sends: a negative offset, too many vectors, a share number out of range."""

    wire_name = "builtins.AssertionError"


class UnusableShareError(StorageError):
    """The share's file on disk is broken, or of another kind than the call is about. It is left alone."""


class UnknownImmutableContainerVersionError(UnusableShareError):
    wire_name = "allmydata.storage.common.UnknownImmutableContainerVersionError"


class UnknownMutableContainerVersionError(UnusableShareError):
    wire_name = "allmydata.storage.common.UnknownMutableContainerVersionError"
