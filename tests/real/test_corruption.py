"""One byte flipped in each field of share files on disk, on as many servers as may fail: content is still right.

With one share more it is EIO, never wrong bytes. What was found is in the log, with server and share number. A file for
each field, and all of them in one mount, since mounting takes longer than reading.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.real.damage import copies_of, field_flipped
from tests.real.mounting import Mounter
from tests.real.sample_tree import content
from tests.real.tahoe_grid import SERVERS, TahoeGrid

pytestmark = [pytest.mark.interop, pytest.mark.mount]

UNCACHED = "cache_size=3M"  # too little for a cache on disk: what was read once is fetched again
SPARE = 7  # n - k
# What a reader meets of each kind of share.
CHK_FIELDS = ("version", "data_offset", "data", "crypttext_hashes", "block_hashes", "share_hashes", "ueb")
SDMF_FIELDS = ("seqnum", "root_hash", "salt", "signature", "share_hashes", "block_hashes", "data", "offset_chain")


def fatal(field: str) -> int:
    """So many damaged shares are too many.

    The ciphertext tree is the same in every share, so for that one good copy is enough, and all must be damaged.
    """
    return SERVERS if field == "crypttext_hashes" else SPARE + 1


def test_chk(real_grid: TahoeGrid, root_cap: str, mounted: Mounter, node_dir: Path) -> None:
    """n-k damaged: right. One more: EIO, and the log names a damaged share, since three good ones do not exist."""
    contents = {field: content(2_200_000, number) for number, field in enumerate(CHK_FIELDS)}
    copies = {field: copies_of(real_grid, real_grid.put_at(root_cap, field, data)) for field, data in contents.items()}
    for field in CHK_FIELDS:
        field_flipped(field, *range(SPARE))(real_grid, copies[field])
    with mounted(root_cap, UNCACHED) as mount:
        for field, data in contents.items():
            assert (mount.path / field).read_bytes() == data, field
    for field in CHK_FIELDS:
        field_flipped(field, *range(SPARE, fatal(field)))(real_grid, copies[field])
    with mounted(root_cap, UNCACHED) as mount:
        for field in CHK_FIELDS:
            said = len(mount.log(node_dir))
            with pytest.raises(OSError, match="Input/output error"):
                (mount.path / field).read_bytes()
            log = mount.log(node_dir)[said:]
            assert any(re.search(rf"share {n} on server \w{{8}}", log) for n in range(fatal(field))), (field, log)


def test_sdmf_and_directory(real_grid: TahoeGrid, mounted: Mounter) -> None:
    """The same for mutable files, for the directories they are in, and for the one that is the mount's root."""
    contents = {field: content(60_000, number) for number, field in enumerate(SDMF_FIELDS)}
    directories = {}
    damaged = []
    for field, data in contents.items():
        file = real_grid.put(data, "SDMF")
        directory = real_grid.mkdir_with_children({"file": ["filenode", {"rw_uri": file, "metadata": {}}]})
        directories[field] = ["dirnode", {"rw_uri": directory, "metadata": {}}]
        damaged += [(file, field), (directory, field)]
    root = real_grid.mkdir_with_children(directories)
    damaged.append((root, "root_hash"))
    for cap, field in damaged:
        field_flipped(field, *range(SPARE))(real_grid, copies_of(real_grid, cap))
    with mounted(root, "ro", UNCACHED) as mount:
        for field, data in contents.items():
            assert (mount.path / field / "file").read_bytes() == data, field


def test_sdmf_with_too_many_damaged_shares(real_grid: TahoeGrid, root_cap: str, mounted: Mounter) -> None:
    cap = real_grid.put_at(root_cap, "file", content(60_000, 52), "SDMF")
    field_flipped("data", *range(SPARE + 1))(real_grid, copies_of(real_grid, cap))
    with mounted(root_cap, "ro", UNCACHED) as mount, pytest.raises(OSError, match="Input/output error"):
        (mount.path / "file").read_bytes()
