"""What the system lets a program of ours use."""

from __future__ import annotations

import resource
from typing import Final

OPEN_FILES: Final = 65_536  # descriptors: a connection takes up to two, and there are thousands of servers and clients


def allow_open_files() -> None:
    """Ask for as many as the system grants anybody. Shells and systemd start with 1,024, because of select()."""
    granted, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if granted != resource.RLIM_INFINITY and granted < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
