"""Calls that Python does not have, made through libc; and other people to make calls as."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2
STRANGER, GUEST = 54321, 54322  # users (with a group of the same number) that this machine does not know

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = _libc.readdir.restype = ctypes.c_void_p
_libc.telldir.restype = ctypes.c_long
_libc.getxattr.restype = _libc.listxattr.restype = ctypes.c_ssize_t

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


class _Entry(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("length", ctypes.c_ushort),
        ("type", ctypes.c_ubyte),
        ("name", ctypes.c_char * 256),
    )


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def renameat2(old: Path | str, new: Path | str, flags: int) -> None:
    _checked(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    _checked(_libc.fallocate(descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length)))


def getxattr_into(path: Path, name: bytes, room: int) -> int:
    """Bytes of the value, with a buffer of `room` bytes."""
    return _checked(_libc.getxattr(os.fsencode(path), name, ctypes.create_string_buffer(room), ctypes.c_size_t(room)))


def listxattr_into(path: Path, room: int) -> int:
    return _checked(_libc.listxattr(os.fsencode(path), ctypes.create_string_buffer(room), ctypes.c_size_t(room)))


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Seconds and nanoseconds as they are, however impossible."""
    times = (ctypes.c_long * 4)(*atime, *mtime)
    _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0))


class Listing:
    """A directory as opendir(3) gives it."""

    def __init__(self, path: Path) -> None:
        self._stream = _libc.opendir(os.fsencode(path))
        if not self._stream:
            _checked(-1)
        self._stream = ctypes.c_void_p(self._stream)

    def __iter__(self) -> Iterator[str]:
        while entry := _libc.readdir(self._stream):
            yield os.fsdecode(_Entry.from_address(entry).name)

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, place: int) -> None:
        _libc.seekdir(self._stream, ctypes.c_long(place))

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        _libc.closedir(self._stream)


@contextmanager
def listing(path: Path) -> Iterator[Listing]:
    stream = Listing(path)
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def opened(path: Path | str, flags: int = os.O_RDWR, mode: int = 0o644) -> Iterator[int]:
    descriptor = os.open(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def outcome(call: Callable[[], object]) -> str:
    """The name of the errno a call ends with, or "OK"."""
    try:
        call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "OK"


def as_user(place: Path, call: Callable[[], object], uid: int = STRANGER, groups: tuple[int, ...] = ()) -> str:
    """The `outcome` of a call made in `place` by somebody else, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(place)  # the way here may be closed to others
            os.umask(0o022)
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            call()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
        except BaseException:  # noqa: BLE001  a copy of the test run must not go on by itself
            os._exit(254)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return errno.errorcode.get(code, str(code)) if code else "OK"
