"""How far the journal had got, noted beside it: what SQLite drops at opening, because it is damaged, is noticed so.

    mark    written u64 | flushed u64 | run of the machine 16 | CRC-32 of these u32     big-endian, overwritten in place

`written` and `flushed` are numbers of groups of rows, which the database counts too, as part of each group. A mark is
never synced by itself. When only the process died, what it wrote last is there: everything up to `written` must be.
When the machine stopped, the mark may be an older one than the database, but what was flushed before it was noted was
on the disk by then: everything up to `flushed` must be. A mark that cannot be read says nothing.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Final

_MARK: Final = struct.Struct(">QQ16s")
_CRC: Final = struct.Struct(">I")


class JournalMark:
    """`run`: 16 bytes, others each time the machine was started. Not safe for several threads at a time."""

    def __init__(self, path: Path, run: bytes) -> None:
        """Raises OSError."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._run = run
        written, self.flushed, found_run = self._read()
        self.kept = max(self.flushed, written if found_run == run else 0)  # groups that were there for good

    def _read(self) -> tuple[int, int, bytes]:
        data = os.pread(self._fd, _MARK.size + _CRC.size, 0)
        mark = data[: _MARK.size]
        if len(data) != _MARK.size + _CRC.size or _CRC.unpack(data[_MARK.size :]) != (zlib.crc32(mark),):
            return 0, 0, b""
        written, flushed, run = _MARK.unpack(mark)
        return written, flushed, run

    def note(self, written: int, flushed: int | None = None) -> None:
        """`flushed`: None for what it was. Raises OSError."""
        self.flushed = min(self.flushed if flushed is None else flushed, written)
        mark = _MARK.pack(written, self.flushed, self._run)
        os.pwrite(self._fd, mark + _CRC.pack(zlib.crc32(mark)), 0)

    def close(self) -> None:
        os.close(self._fd)
