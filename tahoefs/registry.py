"""Where a mount's control socket is: found from the mount point alone, without the network or the grid.

A daemon's socket lives in its node directory (`NODE/tahoefs/control/ID.sock`, mode 0600); a link to it, under the
same ID, stands in the user's run directory, so that `tahoefs status DIR` needs no `--node-dir`. ID is a
hash of the mount point's absolute path.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


def mount_id(mountpoint: Path) -> str:
    """Sixteen hex digits for an absolute mount point path."""
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]


def run_directory() -> Path:
    """The user's own directory of links, mode 0700; made when missing."""
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        path = Path(runtime) / "tahoefs"
    elif os.getuid() == 0:
        path = Path("/run/tahoefs")
    else:
        path = Path(f"/tmp/tahoefs-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{path} is not a private directory of yours; remove it, or set XDG_RUNTIME_DIR")
    return path


def absolute(mountpoint: str | Path) -> Path:
    """Absolute, links resolved in all but the last part: resolving that would ask the mount itself."""
    path = Path.cwd() / mountpoint
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


@contextlib.contextmanager
def registered(node_dir: Path, mountpoint: Path) -> Iterator[Path]:
    """The socket path for a daemon to bind; socket and link are removed at the end."""
    name = mount_id(mountpoint)
    directory = node_dir / "tahoefs" / "control"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket, link = directory / f"{name}.sock", run_directory() / name
    socket.unlink(missing_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(socket)
    try:
        yield socket
    finally:
        socket.unlink(missing_ok=True)
        link.unlink(missing_ok=True)


def node_socket(node_dir: Path) -> Path:
    """Where the process of `tahoefs run` answers, for a node directory's absolute path."""
    return node_dir / "tahoefs" / "control" / "node.sock"


@contextlib.contextmanager
def node_registered(node_dir: Path) -> Iterator[Path]:
    """The socket path for a node's process to bind; the socket is removed at the end."""
    socket = node_socket(node_dir)
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)
    try:
        yield socket
    finally:
        socket.unlink(missing_ok=True)


def find_socket(mountpoint: Path) -> Path | None:
    """The control socket of the daemon that serves `mountpoint`, or None."""
    link = run_directory() / mount_id(mountpoint)
    return link.resolve() if link.is_symlink() and link.exists() else None


class FoundMount(NamedTuple):
    mountpoint: Path
    socket: Path
    inside: tuple[str, ...]  # names from the mount point to the path that was asked for


def find_mount(path: str | Path) -> FoundMount | None:
    """The mount that `path` is in, or None.

    A link to somewhere inside is followed only if the path as it is written leads to no mount.
    """
    for resolved in (absolute(path), Path(path).resolve()):
        for folder in (resolved, *resolved.parents):
            if (socket := find_socket(folder)) is not None:
                return FoundMount(folder, socket, resolved.relative_to(folder).parts)
    return None


def all_sockets() -> list[Path]:
    """Sockets of all mounts of this user; links to daemons long dead are left out."""
    return sorted(link.resolve() for link in run_directory().iterdir() if link.is_symlink() and link.exists())
