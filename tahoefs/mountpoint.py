"""Is this a place to mount on? And undoing a mount: the few things done outside our own process.

The kernel's table (`/proc/self/mountinfo`) tells what is mounted where. A mount of ours whose daemon was killed
answers "transport endpoint is not connected" for ever; it is detached before mounting there again.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

FUSE_TYPE: Final = "fuse.tahoefs"
UNMOUNT_TIMEOUT_S: Final = 30.0


class MountPointError(Exception):
    """The mount point cannot be used; the text says why and what to do."""


def filesystem_at(path: Path) -> str | None:
    """The type of what is mounted exactly at `path` (topmost), or None."""
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        fields = line.split(b" ")
        where = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), fields[4])
        if where == os.fsencode(path):
            found = fields[fields.index(b"-") + 1].decode()
    return found


def prepare(path: Path) -> None:
    """Make sure `path` is an empty directory that we may mount on. Raises MountPointError."""
    mounted = filesystem_at(path)
    if mounted == FUSE_TYPE and is_dead(path):
        unmount(path, lazy=True)
        mounted = filesystem_at(path)
    if mounted is not None:
        hint = f"; 'tahoefs umount {path}' undoes it" if mounted == FUSE_TYPE else ""
        raise MountPointError(f"{path}: something is mounted there already ({mounted}){hint}")
    try:
        entries = os.listdir(path)  # noqa: PTH208 only the first error matters
    except FileNotFoundError:
        raise MountPointError(f"{path}: no such directory; make it with 'mkdir {path}'") from None
    except NotADirectoryError:
        raise MountPointError(f"{path}: not a directory") from None
    except PermissionError:
        raise MountPointError(f"{path}: permission denied") from None
    if entries:
        raise MountPointError(f"{path}: not empty; mount on an empty directory")
    if os.getuid() != 0 and not os.access(path, os.W_OK):
        raise MountPointError(f"{path}: not writable by you, so it cannot be mounted on")
    if not Path("/dev/fuse").exists():
        raise MountPointError(
            "/dev/fuse is missing: load the fuse module ('modprobe fuse'), or give the container /dev/fuse"
        )
    if os.getuid() != 0 and shutil.which("fusermount3") is None:
        raise MountPointError("fusermount3 is missing: install the fuse3 package")


def unmount(path: Path, *, lazy: bool = False) -> None:
    """Unmount `path`. Raises MountPointError when it is in use, not mounted, or not ours to unmount."""
    if os.getuid() == 0 or shutil.which("fusermount3") is None:
        command = ["umount", *(["-l"] if lazy else []), "--", str(path)]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(path)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=UNMOUNT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise MountPointError(f"{path}: unmounting did not end within {UNMOUNT_TIMEOUT_S:g} s") from None
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "unmounting failed"
        if "busy" in reason:
            raise MountPointError(f"{path}: in use; close the programs that have files open there ('fuser -vm {path}')")
        raise MountPointError(f"{path}: {reason}")


def is_dead(path: Path) -> bool:
    """A mount whose daemon was killed: the kernel answers ENOTCONN in its place."""
    try:
        os.statvfs(path)  # which is never answered from a cache, as stat() is
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False
