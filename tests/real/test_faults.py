"""Servers lost and hung, before and during reads and writes; too few of them; and what is left behind."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from tests.real.mounting import Mounter, tahoefs
from tests.real.sample_tree import content
from tests.real.tahoe_grid import TahoeGrid, wait_until

pytestmark = [pytest.mark.interop, pytest.mark.mount]

HUNG_READ_S = 3.0  # promised: one hung server delays a read by less


def test_three_servers_lost_before_a_write(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Happiness is seven: with seven servers left a write succeeds, and the real client reads it."""
    data = content(2_000_000, 21)
    with mounted(root_cap) as mount, real_grid.without([0, 1, 2]):
        (mount.path / "file").write_bytes(data)
        mount.sync()
        assert real_grid.get(root_cap, "file") == data


def test_three_servers_lost_during_a_write(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Servers die while shares are being pushed; the upload goes on with the others."""
    data = content(24_000_000, 22)
    with mounted(root_cap) as mount:
        (mount.path / "file").write_bytes(data)
        wait_until(lambda: any(real_grid.servers[7].path.glob("storage/shares/incoming/*/*/*")), "a push under way", 60)
        with real_grid.without([7, 8, 9]):
            mount.sync()
            assert real_grid.get(root_cap, "file") == data


def test_seven_servers_lost_during_a_read(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Any three shares are enough, also when they are not the three the read began with."""
    data = content(20_000_000, 23)
    real_grid.put_at(root_cap, "file", data)
    with mounted(root_cap, "cache_size=1M") as mount, (mount.path / "file").open("rb", buffering=0) as file:
        received = bytearray(file.read(3_000_000))
        with real_grid.without(range(7)):
            while piece := file.read(1 << 20):
                received += piece
        assert bytes(received) == data


def test_eight_servers_lost(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """A read is EIO within its deadline, sync says why, nothing is half-linked; when they return, all is well."""
    data = content(2_000_000, 24)
    real_grid.put_at(root_cap, "stored", data)
    with mounted(root_cap, "timeout=20") as mount:
        with real_grid.without(range(8)):
            mount.wait_servers(2)
            started = time.monotonic()
            with pytest.raises(OSError, match="Input/output error") as failure:
                (mount.path / "stored").read_bytes()
            assert failure.value.errno == errno.EIO
            assert time.monotonic() - started < 25
            (mount.path / "new").write_bytes(content(1_000_000, 25))
            refused = tahoefs("sync", mount.path, "--timeout", "5", check=False)
            assert refused.returncode != 0
            assert len(refused.stderr.strip().splitlines()) == 1
            wait_until(lambda: mount.status()["errors"], "the failure in the status", 60)
            assert mount.status()["pending"]["files"] == 1
        assert set(real_grid.json(root_cap)[1]["children"]) == {"stored"}
        mount.wait_servers(10)
        mount.sync()
        assert (mount.path / "stored").read_bytes() == data
    assert real_grid.get(root_cap, "new") == content(1_000_000, 25)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_hung_server_delays_a_read_little(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, when: str) -> None:
    """SIGSTOP: TCP stays up, nothing answers. Whichever server it is, another share is asked for."""
    data = content(5_000_000, 26)
    real_grid.put_at(root_cap, "first", data)
    real_grid.put_at(root_cap, "second", data[::-1])
    with mounted(root_cap, "cache_size=1M") as mount:
        usual = _timed_read(mount.path / "first", data)
        if when == "during":
            with (mount.path / "second").open("rb", buffering=0) as file:
                assert file.read(1000) == data[::-1][:1000]
        for number in range(3):  # which servers hold the shares in use is not known: hang each in turn
            with real_grid.hung([number]):
                assert _timed_read(mount.path / "second", data[::-1]) < usual + HUNG_READ_S
            drop_page_cache(mount.path / "second")


def drop_page_cache(path: Path) -> None:
    """So that the next read reaches the daemon again."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed_read(path: Path, expected: bytes) -> float:
    started = time.monotonic()
    assert path.read_bytes() == expected
    return time.monotonic() - started


def test_a_hung_server_does_not_stop_writes(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    data = content(300_000, 27)
    with mounted(root_cap) as mount, real_grid.hung([4]):
        (mount.path / "file").write_bytes(data)
        mount.sync()
        assert (mount.path / "file").read_bytes() == data


def test_an_interrupted_reader_leaves_the_mount_alive(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    """Readers that go away while a read is under way do not disturb others."""
    data = content(8_000_000, 28)
    real_grid.put_at(root_cap, "file", data)
    with mounted(root_cap) as mount:
        results: list[bytes] = []

        def read() -> None:
            results.append((mount.path / "file").read_bytes())

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [data] * 4
