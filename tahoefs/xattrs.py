"""Extended attributes: those users set, and `user.tahoe.*`, which tell what is stored and where.

Users' attributes live in the edge's metadata, so they are published with the directory: the values of one file have
together at most what the kernel allows for a single one, its names less. `user.tahoe.*` answer when asked for by name
and are left out of lists, so that `cp -a` and `rsync -X` do not carry caps about. They cannot be set.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, Final

from grid.formats.base32 import b2a
from tahoefs import metadata as edge
from tahoefs.errnos import FSError
from tahoefs.interfaces import Target
from tahoefs.targets import cap_of, is_cap, is_directory

OURS: Final = b"user.tahoe."
USERS: Final = b"user."
VALUES_BYTES_MAX: Final = 64 << 10  # of one file together; also what the kernel lets a single value have
NAMES_BYTES_MAX: Final = 8 << 10  # of one file together
NO_DATA: Final = errno.ENODATA


def is_ours(name: bytes) -> bool:
    return name.startswith(OURS)


def is_users(name: bytes) -> bool:
    return name.startswith(USERS) and not is_ours(name)


def get_users(metadata: Mapping[str, Any], name: bytes) -> bytes:
    """Raises ENODATA; EOPNOTSUPP for ACLs, which are not applied, so that nobody believes they are.

    Others (`security.*` is asked for at every write) just are not there.
    """
    if name.startswith(b"system."):
        raise FSError(errno.EOPNOTSUPP)
    value = edge.xattrs(metadata).get(_text(name)) if metadata else None
    if value is None:
        raise FSError(NO_DATA)
    return value


def with_users(values: Mapping[str, bytes], name: bytes, value: bytes) -> dict[str, bytes]:
    """`values` with one more. Raises EPERM (ours), EOPNOTSUPP (no user attribute), EINVAL (no name), ENOSPC."""
    _require_users(name)
    result = {**values, _text(name): value}
    if sum(map(len, result.values())) > VALUES_BYTES_MAX or sum(len(key.encode()) for key in result) > NAMES_BYTES_MAX:
        raise FSError(errno.ENOSPC)
    return result


def without_users(values: Mapping[str, bytes], name: bytes) -> dict[str, bytes]:
    """`values` without it. Raises ENODATA, EPERM, EOPNOTSUPP, EINVAL."""
    _require_users(name)
    if _text(name) not in values:
        raise FSError(NO_DATA)
    return {key: value for key, value in values.items() if key != _text(name)}


def describe(target: Target, name: bytes, *, show_caps: bool, show_write_cap: bool) -> bytes:
    """The value of `user.tahoe.…` for a target. ENODATA: unknown, or not there yet; EACCES: not for this caller."""
    word = name[len(OURS) :]
    cap = cap_of(target)
    if word == b"state":
        return _state(target).encode()
    if word == b"kind":
        return (cap.kind if cap is not None else "dir" if is_directory(target) else "pending").encode()
    if word not in (b"cap", b"readcap", b"verifycap", b"storage-index") or cap is None:
        raise FSError(NO_DATA)
    if word == b"storage-index":
        storage_index = cap.storage_index
        if storage_index is None:
            raise FSError(NO_DATA)
        return b2a(storage_index).encode()
    if not show_caps:
        raise FSError(errno.EACCES)
    if word == b"cap":
        shown = cap if show_write_cap else cap.readonly
    else:
        shown = cap.readonly if word == b"readcap" else cap.verifier
    if shown is None:
        raise FSError(NO_DATA)
    return shown.to_string().encode()


def _state(target: Target) -> str:
    if is_cap(target):
        return "stored"
    if is_directory(target):
        return "stored" if target.cap is not None else "pending"
    state: str = target.state
    return state


def _require_users(name: bytes) -> None:
    if is_ours(name):
        raise FSError(errno.EPERM)
    if not is_users(name):
        raise FSError(errno.EOPNOTSUPP)
    if name == USERS:
        raise FSError(errno.EINVAL)


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FSError(errno.EILSEQ) from None
