"""What tests of mounting share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HELPER = Path("/sbin/mount.tahoefs")


@pytest.fixture
def helper_installed() -> Iterator[None]:
    """mount(8) looks in /sbin alone."""
    if os.getuid() != 0:
        pytest.skip("only root can install /sbin/mount.tahoefs")
    program = Path(sys.executable).with_name("mount.tahoefs")
    if not program.exists():
        pytest.skip("mount.tahoefs is not installed beside this Python")
    if HELPER.exists():
        yield
        return
    HELPER.unlink(missing_ok=True)  # a link to nowhere
    HELPER.symlink_to(program)
    try:
        yield
    finally:
        HELPER.unlink()
