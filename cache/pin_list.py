"""Which paths of a mounted tree are pinned, and how far each was when somebody looked last.

    <state_dir>/pins/<prefix of the root's storage index>.pins    JSON, sealed under a key that follows from the root's
                                                                  read key; replaced as a whole
                                                         .turn    flock: over one change of it
                                                         .keeper  flock: by the process that keeps what is pinned

So a mount of this root from this node directory finds its pins again, read-only ones too, and nobody else learns a name
from them. Of several mounts of one root one keeps the pins for all. Directories are 0700, files 0600. Plain blocking
code, for worker threads.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs
from attrs import define

from grid.atomic_file import replace_file
from grid.crypto import KEY_BYTES, NONCE_BYTES, seal, unseal
from grid.errors import FormatError
from grid.formats.hashutil import tagged_hash

log = logging.getLogger(__name__)

PINS_MAX: Final = 1000  # of one root
LIST_BYTES_MAX: Final = 64 << 20
_KEY_TAG: Final = b"tahoefs_pins_key_v1"
_CONTEXT: Final = b"tahoefs pins v1"

CHECKING: Final = "checking"  # it is not known yet what there is
FETCHING: Final = "fetching"
COMPLETE: Final = "complete"
INCOMPLETE: Final = "incomplete"  # something of it cannot be had now; `message` says why
WAITING: Final = "waiting"  # for the grid
FULL: Final = "full"  # it does not fit
MISSING: Final = "missing"  # nothing stands at its path

Path_ = tuple[str, ...]  # names from the root on


@define
class Pin:
    """One pinned path, and what was wanted and held of what is there."""

    path: Path_
    asked: int = 0  # how often somebody asked for it
    looks: int = 0  # how often it was looked through to the end
    state: str = CHECKING
    message: str | None = None
    files: int = 0
    files_held: int = 0
    bytes: int = 0  # as programs read them
    bytes_held: int = 0

    @property
    def settled(self) -> bool:
        return self.state not in (CHECKING, FETCHING)

    def status(self) -> dict[str, Any]:
        """For people and JSON."""
        return {
            "path": "/" + "/".join(self.path),
            "state": self.state,
            "files": self.files,
            "files_held": self.files_held,
            "bytes": self.bytes,
            "bytes_held": self.bytes_held,
            "message": self.message,
        }


class PinList:
    """`pins` is what the file said when it was read last."""

    def __init__(self, state_dir: Path, name: str, read_key: bytes) -> None:
        self.pins: dict[Path_, Pin] = {}
        self._path = state_dir / "pins" / f"{name}.pins"
        self._key = tagged_hash(_KEY_TAG, read_key)[:KEY_BYTES]
        self._seen: tuple[int, int] | None = None
        self._keeper_fd = -1

    def close(self) -> None:
        if self._keeper_fd >= 0:
            os.close(self._keeper_fd)
            self._keeper_fd = -1

    def load(self) -> bool:
        """Read the file if it is another than last time. Returns whether it was. Raises OSError."""
        if (signature := self._signature()) == self._seen:
            return False
        self._seen, self.pins = signature, self._read()
        return True

    def change(self, change: Callable[[dict[Path_, Pin]], None]) -> None:
        """Have `change` applied to what the file says now. Raises OSError, and what `change` raises."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._turn():
            pins = self._read()
            change(pins)
            plain = json.dumps([attrs.asdict(pin) for pin in pins.values()]).encode()
            replace_file(self._path, seal(self._key, secrets.token_bytes(NONCE_BYTES), plain, _CONTEXT))
            self._seen, self.pins = self._signature(), pins

    def try_to_keep(self) -> bool:
        """Be the process that keeps these pins, unless there are none or another one is. Raises OSError."""
        if self._keeper_fd < 0 and self._path.exists():
            self._keeper_fd = _lock(self._path.with_suffix(".keeper"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self._keeper_fd >= 0

    def _signature(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def _read(self) -> dict[Path_, Pin]:
        try:
            with self._path.open("rb") as file:
                rows = json.loads(unseal(self._key, file.read(LIST_BYTES_MAX), _CONTEXT))
            pins = [Pin(**row | {"path": tuple(row["path"])}) for row in rows]
        except FileNotFoundError:
            return {}
        except (FormatError, ValueError, TypeError, KeyError, RecursionError):
            aside = self._path.with_suffix(".damaged")
            log.error("the list of pins cannot be read and was set aside, as %s: pin anew", aside)
            self._path.replace(aside)
            return {}
        return {pin.path: pin for pin in pins}

    @contextmanager
    def _turn(self) -> Iterator[None]:
        fd = _lock(self._path.with_suffix(".turn"), fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(fd)


def _lock(path: Path, how: int) -> int:
    """The descriptor that holds it; -1 if another has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
    except BlockingIOError:
        os.close(fd)
        return -1
    except BaseException:
        os.close(fd)
        raise
    return fd
