"""MDMF published and changed in place: byte-exact shares, every change like a bytearray's, and how little is moved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from grid.formats.mutable_share import parse_header
from grid.operations.changes import Changes, Step, plan
from grid.operations.mdmf_update import prepare_update
from grid.operations.mutable_encode import prepare_mdmf
from grid.operations.retrieve import MutableVersion
from grid.operations.servermap import MapMode, MapRequest, update_servermap
from tests import vectors
from tests.grid.operations import mutable_grid as grid
from tests.memory_server import MemoryBroker
from tests.vectors import name_of

MDMF = [vector for vector in grid.files() if vector["format"] == "MDMF"]
UPDATES = [vector for vector in MDMF if "update" in vector]


def given_salts(vector: dict[str, Any], segments: list[int]) -> Callable[[int], bytes]:
    salts: Iterator[bytes] = iter([bytes.fromhex(vector["salts"][segment]) for segment in segments])
    return lambda length: next(salts)


@pytest.mark.parametrize("vector", MDMF, ids=name_of)
async def test_whole_shares_are_byte_for_byte_tahoes(vector: dict[str, Any]) -> None:
    contents = grid.contents_of(vector)

    async def read(offset: int, length: int) -> bytes:
        return contents[offset : offset + length]

    encoded = await prepare_mdmf(
        read,
        len(contents),
        grid.keys(),
        seqnum=vector["seqnum"],
        k=vector["k"],
        n=vector["n"],
        random_bytes=given_salts(vector, list(range(len(vector["salts"])))),
        segment_size=vector["segment_size"],
        signature=bytes.fromhex(vector["signature"]),
    )
    digests = [hashlib.sha256(encoded.shares[number]).hexdigest() for number in range(vector["n"])]
    assert digests == vector["share_sha256"]


@pytest.mark.parametrize("vector", UPDATES, ids=name_of)
async def test_updates_leave_shares_byte_for_byte_as_tahoes(vector: dict[str, Any]) -> None:
    """The same change to the same shares gives the same bytes up to EOF, though ours writes fewer of them."""
    update = vector["update"]
    (base,) = vectors.section("formats.json", "mutable.files", name=update["base"])
    broker = MemoryBroker(10)
    shares = grid.shares_of(base)
    grid.place(broker, shares)
    servermap = await update_servermap(broker, MapRequest.of_cap(grid.mdmf_cap(), 3, 10), MapMode.WRITE)
    header = servermap.best()
    assert header is not None
    version = MutableVersion(servermap, header, storage_index=grid.storage_index(), readkey=grid.keys().readkey)
    changes = Changes.of_bytes(update["offset"], bytes.fromhex(update["data"]))
    (step,) = plan(header.segmentation, header.n, changes)
    assert step == Step(update["resalted_segments"], vector["length"])
    prepared = await prepare_update(
        version,
        changes,
        step,
        grid.keys(),
        seqnum=vector["seqnum"],
        final_size=step.size,
        random_bytes=given_salts(vector, update["resalted_segments"]),
        signature=bytes.fromhex(vector["signature"]),
    )
    assert sorted(prepared.numbers) == sorted(shares)
    for number, share in shares.items():
        patched = bytearray(share)
        for offset, data in prepared.writes(number):
            patched.extend(bytes(max(0, offset - len(patched))))
            patched[offset : offset + len(data)] = data
        eof = parse_header(patched).offsets.eof
        assert hashlib.sha256(patched[:eof]).hexdigest() == vector["share_sha256"][number]
