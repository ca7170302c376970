"""That freed memory is kept. In a process of its own: it is set once, for good."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BLOCKS, BLOCK_BYTES, PAGE_BYTES = 200, 1 << 20, 4096

PROGRAM = f"""
import resource
from grid.server.allocator import keep_freed_memory
keep_freed_memory()
sizes = [{BLOCK_BYTES} + 4096 * (number % 7) for number in range({BLOCKS})]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in sizes:
    first, second = bytearray(size), bytearray(size)
    del first, second
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_blocks_are_made_of_the_same_pages_again() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * BLOCK_BYTES // PAGE_BYTES  # else each block is mapped anew: 400 times as many
