"""A program of ours may have many files open, whatever the shell it was started from thinks."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
granted, most, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (granted, most))
from tahoefs import limits
limits.OPEN_FILES = wanted
limits.allow_open_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("granted", "most", "wanted", "then"),
    [(256, 300, 1000, 300), (300, 300, 1000, 300), (256, 300, 280, 280), (256, 300, 200, 256)],
)
def test_as_many_as_are_wanted_and_granted(granted: int, most: int, wanted: int, then: int) -> None:
    command = [sys.executable, "-c", CHILD, str(granted), str(most), str(wanted)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert told.split() == [str(then), str(most)]
