"""Random calls on a real mount over the real workspace, and on the local disk: same answers, same tree, also on the
grid for another client, and after mounting again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tahoefs.mounts import MemoryMount, memory_mount, needs_fuse
from tests.tahoefs.posix_machine import digests, run_machine

EXAMPLES = 1500 if os.environ.get("TAHOEFS_SOAK") else 20
STEPS = 60


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[MemoryMount]:
    with memory_mount(tmp_path / "mnt", "--real") as mounted:
        yield mounted


@needs_fuse
def test_a_mount_answers_as_the_local_disk_does(mount: MemoryMount, tmp_path: Path) -> None:
    base = tmp_path / "local"
    base.mkdir()
    run_machine(mount, base, examples=EXAMPLES, steps=STEPS)
    mount.stop()
    assert mount.counts["tree"] == digests(base)
    assert (mount.counts["faults"], mount.counts["handles"]) == (0, 0)
