"""Edge metadata ↔ what stat shows.

A directory keeps a JSON object with each name. Beside Tahoe's own `tahoe` part (kept by the grid layer) and keys of
other programs (kept untouched), ours is the object under `tahoefs`; every key may be missing:

    mode      permission bits, 0o7777       type      "symlink", "fifo" or "socket"
    uid, gid  owner, where not the mount's  xattrs    {name: value in base64}
    mtime_ns, ctime_ns                      size      of the contents these were set for

Honoured from others: `no-write`, the top-level `mtime` and `ctime`, `tahoe.linkmotime`. An object from the grid was
written by anybody: whatever is out of shape or range counts as missing. Does no I/O.
"""

from __future__ import annotations

import base64
import binascii
import math
import stat
from collections.abc import Mapping
from typing import Any, Final

from attrs import frozen

KEY: Final = "tahoefs"
SYSTEM_KEY: Final = "tahoe"
ID_MAX: Final = (1 << 32) - 2  # 2^32-1 means "no change" to chown
TIME_NS_MAX: Final = (1 << 63) - 1
WRITE_BITS: Final = 0o222
PERMISSION_BITS: Final = 0o7777
NS_PER_S: Final = 10**9


@frozen
class Defaults:
    """What is shown for an edge that says nothing itself."""

    uid: int
    gid: int
    umask: int


def own_part(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    part = metadata.get(KEY)
    return part if isinstance(part, dict) else {}


def is_no_write(metadata: Mapping[str, Any]) -> bool:
    """Did another program forbid writing? Where `with_mode` set the key, the mode itself says who may write."""
    mode = _integer(own_part(metadata).get("mode"), PERMISSION_BITS)
    return metadata.get("no-write") is True and (mode is None or bool(mode & stat.S_IWUSR))


def is_replaced(metadata: Mapping[str, Any], size: int | None) -> bool:
    """Were the contents changed by a client that left our part as it was? Its times and type then mean nothing."""
    noted = own_part(metadata).get("size")
    return isinstance(noted, int) and size is not None and noted != size


def permissions(metadata: Mapping[str, Any], defaults: Defaults, *, directory: bool) -> int:
    mode = _integer(own_part(metadata).get("mode"), PERMISSION_BITS)
    if mode is None:
        mode = (0o777 if directory else 0o666) & ~defaults.umask
    return mode & ~WRITE_BITS if is_no_write(metadata) else mode


def owner(metadata: Mapping[str, Any], defaults: Defaults) -> tuple[int, int]:
    own = own_part(metadata)
    uid, gid = _integer(own.get("uid"), ID_MAX), _integer(own.get("gid"), ID_MAX)
    return defaults.uid if uid is None else uid, defaults.gid if gid is None else gid


def times_ns(metadata: Mapping[str, Any], size: int | None) -> tuple[int, int]:
    """(mtime, ctime) in nanoseconds; 0 where nobody noted one."""
    system = metadata.get(SYSTEM_KEY)
    linked = _seconds(system.get("linkmotime")) if isinstance(system, dict) else None
    own = own_part(metadata)
    if is_replaced(metadata, size):
        if linked is not None:
            return linked, linked
        own = {}
    mtime = _first(_integer(own.get("mtime_ns"), TIME_NS_MAX, signed=True), _seconds(metadata.get("mtime")), linked, 0)
    ctime = _first(
        _integer(own.get("ctime_ns"), TIME_NS_MAX, signed=True), linked, _seconds(metadata.get("ctime")), mtime
    )
    return mtime, ctime


def changed(metadata: Mapping[str, Any], *, now_ns: int, **changes: Any) -> dict[str, Any]:
    """The user part of `metadata` with `changes` made to our keys (None removes one), and ctime set to now."""
    result = {key: value for key, value in metadata.items() if key != SYSTEM_KEY}
    own = {**own_part(metadata), "ctime_ns": now_ns, **changes}
    result[KEY] = {key: value for key, value in own.items() if value is not None}
    return result


def beside(own: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Our part of `own`, and what other programs have noted in `others`: metadata that was kept back meets newer."""
    ours = (KEY, "no-write")
    theirs = {key: value for key, value in others.items() if key not in ours}
    return theirs | {key: own[key] for key in ours if key in own}


def with_mode(metadata: Mapping[str, Any], mode: int, *, now_ns: int, tell_others: bool) -> dict[str, Any]:
    """New permission bits. `tell_others`: also in the key that Tahoe's own SFTP front end goes by.

    That key makes other clients hand on only the read cap, so it is never set for what has a write cap.
    """
    result = changed(metadata, now_ns=now_ns, mode=mode & PERMISSION_BITS)
    if mode & stat.S_IWUSR:
        result.pop("no-write", None)
    elif tell_others:
        result["no-write"] = True
    return result


def for_mutable_file(metadata: Mapping[str, Any], defaults: Defaults, *, now_ns: int) -> dict[str, Any]:
    """What was noted of an immutable file, for a mutable one in its place: the same bits, but nothing that costs it its
    write cap, and no size, since that changes without the directory.
    """
    bits = permissions(metadata, defaults, directory=False) if metadata.get("no-write") is True else None
    result = changed(metadata, now_ns=now_ns, size=None, **({} if bits is None else {"mode": bits}))
    result.pop("no-write", None)
    return result


def xattrs(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The extended attributes users have set; what does not decode is left out."""
    stored = own_part(metadata).get("xattrs")
    found = {}
    for name, text in stored.items() if isinstance(stored, dict) else ():
        try:
            found[name] = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError, TypeError):
            continue
    return found


def with_xattrs(metadata: Mapping[str, Any], values: Mapping[str, bytes], *, now_ns: int) -> dict[str, Any]:
    encoded = {name: base64.b64encode(value).decode() for name, value in values.items()}
    return changed(metadata, now_ns=now_ns, xattrs=encoded or None)


def _integer(value: Any, limit: int, *, signed: bool = False) -> int | None:
    if type(value) is not int or value > limit or value < (-limit if signed else 0):
        return None
    return value


def _seconds(value: Any) -> int | None:
    """POSIX seconds, int or float, as nanoseconds."""
    if type(value) not in (int, float) or not math.isfinite(value):
        return None
    if type(value) is int:
        value_ns = value * NS_PER_S
    else:
        value_ns = round(value * 1e6) * 1000 if abs(value) < TIME_NS_MAX / NS_PER_S else TIME_NS_MAX + 1
    return value_ns if abs(value_ns) <= TIME_NS_MAX else None


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)
