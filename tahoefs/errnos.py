"""The one table: from an error to the errno a program gets, and to the exit code a command ends with.

Everything the grid layer raises on purpose stands here (a test shows that the table is complete). What does not is a
bug: it is answered EIO, counted, and logged with its traceback by whoever caught it.
"""

from __future__ import annotations

import errno
from typing import Final

import trio

from cache import FileTooLargeError, PinsFullError, SpoolFullError
from grid import errors
from tahoefs.failures import leaf_error
from tahoefs.options import OptionError

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
EXIT_NOT_ALLOWED: Final = 4
EXIT_DAMAGED: Final = 5

# Of the local disk's own errors, those that mean to a program what they mean to us. The rest are our own affair: EIO.
LOCAL_ERRNOS_SHOWN: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE})


class FSError(Exception):
    """A file system call is answered with this errno, on purpose."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.errno = number


# error → (errno, exit code). The nearest class in the error's family counts.
_TABLE: Final[dict[type[BaseException], tuple[int, int]]] = {
    errors.GridError: (errno.EIO, EXIT_FAILED),
    errors.FormatError: (errno.EIO, EXIT_DAMAGED),
    errors.BadCapError: (errno.EIO, EXIT_NOT_ALLOWED),
    errors.UnknownVersionError: (errno.EIO, EXIT_DAMAGED),
    errors.ShareError: (errno.EIO, EXIT_DAMAGED),
    errors.CorruptShareError: (errno.EIO, EXIT_DAMAGED),
    errors.ShareVersionError: (errno.EIO, EXIT_DAMAGED),
    errors.PeerError: (errno.EIO, EXIT_UNREACHABLE),
    errors.RemoteProtocolError: (errno.EIO, EXIT_UNREACHABLE),
    errors.NegotiationError: (errno.EIO, EXIT_UNREACHABLE),
    errors.ConnectionLostError: (errno.EIO, EXIT_UNREACHABLE),
    errors.PeerTimeoutError: (errno.EIO, EXIT_UNREACHABLE),
    errors.RemoteFailure: (errno.EIO, EXIT_UNREACHABLE),
    errors.Violation: (errno.EIO, EXIT_UNREACHABLE),
    errors.NoSpaceError: (errno.ENOSPC, EXIT_UNREACHABLE),
    errors.NotEnoughSharesError: (errno.EIO, EXIT_DAMAGED),  # exit code: see exit_code_of
    errors.NotEnoughServersError: (errno.EIO, EXIT_UNREACHABLE),  # errno: see errno_of
    errors.UncoordinatedWriteError: (errno.EIO, EXIT_FAILED),
    errors.InconsistentEncodingError: (errno.EIO, EXIT_DAMAGED),
    errors.NoSuchChildError: (errno.ENOENT, EXIT_FAILED),
    errors.ChildExistsError: (errno.EEXIST, EXIT_FAILED),
    errors.NotWriteableError: (errno.EACCES, EXIT_NOT_ALLOWED),
    errors.WrongKindError: (errno.EINVAL, EXIT_NOT_ALLOWED),
    errors.NodeDirectoryError: (errno.EIO, EXIT_FAILED),
    errors.GridUnreachableError: (errno.EIO, EXIT_UNREACHABLE),
    SpoolFullError: (errno.ENOSPC, EXIT_FAILED),
    FileTooLargeError: (errno.EFBIG, EXIT_FAILED),
    PinsFullError: (errno.ENOSPC, EXIT_FAILED),
    trio.TooSlowError: (errno.EIO, EXIT_UNREACHABLE),
    MemoryError: (errno.ENOMEM, EXIT_FAILED),
    OptionError: (errno.EINVAL, EXIT_USAGE),
}


def is_expected(error: BaseException) -> bool:
    """Is this an error somebody raises on purpose (or the local disk's), rather than a bug?"""
    error = leaf_error(error)
    return isinstance(error, FSError | OSError) or _row(error) is not None


def errno_of(error: BaseException) -> int:
    """The errno a program gets for `error`; EIO when nothing better is known."""
    error = leaf_error(error)
    if isinstance(error, FSError):
        return error.errno
    if isinstance(error, OSError):
        return error.errno if error.errno in LOCAL_ERRNOS_SHOWN else errno.EIO
    if isinstance(error, errors.NotEnoughServersError) and error.refused_for_space:
        return errno.ENOSPC
    row = _row(error)
    return row[0] if row else errno.EIO


def exit_code_of(error: BaseException) -> int:
    """The exit code a command ends with when `error` stopped it: 1 to 5, see the README."""
    error = leaf_error(error)
    if isinstance(code := getattr(error, "exit_code", None), int):
        return code  # raised by a command, which knows better
    if isinstance(error, errors.NotEnoughSharesError) and any(
        isinstance(failure, errors.PeerError | trio.TooSlowError) for failure in error.failures
    ):
        return EXIT_UNREACHABLE  # another time, or with more servers up, it may do
    row = _row(error)
    return row[1] if row else EXIT_FAILED


def _row(error: BaseException) -> tuple[int, int] | None:
    return next((_TABLE[family] for family in type(error).__mro__ if family in _TABLE), None)
