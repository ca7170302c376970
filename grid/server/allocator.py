"""How a storage server keeps its memory. glibc only; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

KEPT_BYTES: Final = 16 << 20  # free at the top of the heap, and not given back to the system
MAPPED_BYTES_MIN: Final = 8 << 20  # larger blocks are mapped for themselves, and unmapped when they are freed

_M_TRIM_THRESHOLD: Final = -1  # of mallopt()
_M_MMAP_THRESHOLD: Final = -3


def keep_freed_memory() -> None:
    """Shares pass through in blocks of up to a few MiB, made and freed all the time. Left to itself, glibc gives each
    back to the system when it is free, and gets it again as pages to be cleared one by one: up to a third of all the
    time a transfer took, or nothing, as chance would have it.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES_MIN)
