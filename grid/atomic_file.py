"""Small files that are replaced whole: a reader sees the old contents or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def replace_file(path: Path, contents: bytes, *, mode: int = 0o600) -> None:
    """Give `path` these contents by way of a temporary file beside it, on disk before the rename. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    # O_EXCL and the mode at creation: there is no moment in which others could open it
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def create_file(path: Path, contents: bytes, *, mode: int = 0o600) -> None:
    """Make `path` with these contents if nobody made it first. Raises FileExistsError, OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    replace_file(temporary, contents, mode=mode)
    try:
        path.hardlink_to(temporary)  # unlike a rename it does not replace: of two programs one wins, both then agree
    finally:
        temporary.unlink()
