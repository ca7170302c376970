"""Telling targets apart: the only place that looks inside what a name refers to.

A target is a cap, a pending file or a directory (see `interfaces.py`). What kind of file it is shown as depends on the
edge's metadata too: a symbolic link, a FIFO and a socket are small files whose metadata says so.
"""

from __future__ import annotations

import enum
import stat
from collections.abc import Mapping
from typing import Any, Final

from grid.formats import caps
from tahoefs import metadata as edge
from tahoefs.interfaces import Target

# What can stand behind a name that we can read, for files; everything else is shown, kept and moved, but never opened.
READABLE_FILES: Final = (
    caps.CHKReadCap,
    caps.LiteralCap,
    caps.SDMFReadCap,
    caps.SDMFWriteCap,
    caps.MDMFReadCap,
    caps.MDMFWriteCap,
)
# Foreign contents that our metadata calls a link are believed only up to this size: the kernel takes no longer target.
SYMLINK_BYTES_MAX: Final = 4095


class Kind(enum.Enum):
    """What a name is shown as; the value is the type part of its mode."""

    FILE = stat.S_IFREG
    DIRECTORY = stat.S_IFDIR
    SYMLINK = stat.S_IFLNK
    FIFO = stat.S_IFIFO
    SOCKET = stat.S_IFSOCK
    UNKNOWN = 0  # a cap this program cannot read: a file without any permission


SPECIAL: Final = {"symlink": Kind.SYMLINK, "fifo": Kind.FIFO, "socket": Kind.SOCKET}
TYPE_NAMES: Final = {kind: name for name, kind in SPECIAL.items()}


def kind_of(target: Target, metadata: Mapping[str, Any]) -> Kind:
    if is_directory(target):
        return Kind.DIRECTORY
    if is_unreadable(target):
        return Kind.UNKNOWN
    special = SPECIAL.get(str(edge.own_part(metadata).get("type")), Kind.FILE)
    size = known_size(target)
    if special is not Kind.FILE and (size is None or size > SYMLINK_BYTES_MAX or edge.is_replaced(metadata, size)):
        return Kind.FILE  # another client put other contents under this name and left our metadata there
    return special


def is_directory(target: Target) -> bool:
    if isinstance(target, caps.DirectoryCap):
        return not target.is_verifier
    return hasattr(target, "entries")


def is_cap(target: Target) -> bool:
    return hasattr(target, "is_readonly")


def is_unreadable(target: Target) -> bool:
    return is_cap(target) and not isinstance(target, READABLE_FILES) and not is_directory(target)


def is_mutable_file(target: Target) -> bool:
    return is_cap(target) and not target.is_directory and bool(target.is_mutable)


def will_be_mutable(target: Target) -> bool:
    """The same of a file on its way too, which may become one."""
    return is_mutable_file(target) or getattr(target, "mutable", "none") != "none"


def known_size(target: Target) -> int | None:
    """Bytes, without asking anybody; None for mutable files (and for what has no size)."""
    if is_directory(target) or is_unreadable(target):
        return 0
    size: int | None = target.size
    return size


def cap_of(target: Target) -> caps.Cap | None:
    """The cap of a target, or None while it has none."""
    cap: caps.Cap | None = target if is_cap(target) else target.cap
    return cap


def same_contents(one: Target, other: Target) -> bool:
    """Do both refer to the same bytes, now and for ever? (For mutable things: to the same object.)"""
    if one is other:
        return True
    first, second = cap_of(one), cap_of(other)
    return first is not None and first == second


def failed(target: Target) -> bool:
    """Was this file's upload given an error that still stands?"""
    return not is_cap(target) and getattr(target, "state", None) == "failed"
