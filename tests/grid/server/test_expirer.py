"""Lease expiry: what a real server decided, paced walks that go on after a stop, dry runs, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from grid.formats import base32
from grid.interfaces import LeaseSecrets, SlotSecrets, SlotWrite
from grid.server import expirer
from grid.server.expirer import CycleReport, Expirer, ExpiryPolicy
from grid.server.shares import LEASE_PERIOD_S
from grid.server.storage import StorageService
from tests.grid.server.stores import LEASES, MONTH, NOW, SECRETS, SI, Clock, files_in, serve, share_file, upload
from tests.vectors import section

CASES = section("storage.json", "gc.cases")


def policy_of(case: dict[str, Any]) -> ExpiryPolicy:
    return ExpiryPolicy(
        enabled=True,
        mode=case["mode"],
        override_lease_duration_s=case["override"],
        cutoff=case["cutoff"],
        kinds=frozenset(case["sharetypes"]),
    )


async def make(service: StorageService, kind: str, storage_index: bytes = SI, lease: int = 0) -> None:
    if kind == "immutable":
        await upload(service, storage_index, 0, b"data", lease)
    else:
        secrets = SlotSecrets(SECRETS.write_enabler, LEASES[lease])
        writes = {0: SlotWrite([], [(0, b"data")])}
        await service.slot_testv_and_readv_and_writev(storage_index, secrets, writes, [])


def contents(directory: Path) -> dict[str, bytes]:
    return {path: (directory / path).read_bytes() for path in files_in(directory)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['type']}-{case['mode']}-{case['age']}")
async def test_decisions_of_a_real_server(tmp_path: Path, case: dict[str, Any]) -> None:
    clock = Clock()
    clock.now = case["expires"] - LEASE_PERIOD_S
    async with serve(tmp_path, clock=clock) as service:
        await make(service, case["type"])
        clock.now = case["now"]
        report = await Expirer(service, policy_of(case)).run_cycle()
        left = case["file_left"]
        if case["mode"] == "age" and case["override"] is None and case["type"] in case["sharetypes"]:
            # there the real one never expires anything, against its own documentation
            assert left
            left = case["expires"] >= case["now"]
        assert (await service.share_numbers(SI) == {0}) is left
        assert (report.leases, report.leases_expired, report.shares_deleted) == (1, not left, not left)
        assert report.shares == {"immutable": 0, "mutable": 0} | {case["type"]: 1}
        assert (report.bytes_freed > 0) is not left


async def test_only_leases_that_are_over_go(tmp_path: Path) -> None:
    clock = Clock()
    async with serve(tmp_path, clock=clock) as service:
        for kind, storage_index in (("immutable", SI), ("mutable", b"slot" * 4)):
            await make(service, kind, storage_index)
            await make(service, kind, storage_index) if kind == "mutable" else None
        clock.now += 100
        for storage_index in (SI, b"slot" * 4):
            await service.add_lease(storage_index, LEASES[1])
        clock.now = NOW + MONTH + 50
        report = await Expirer(service, ExpiryPolicy(enabled=True)).run_cycle()
        assert (report.leases, report.leases_expired, report.shares_deleted) == (4, 2, 0)
        assert report.bytes_freed == 72
        assert share_file(service.store, SI, 0)[8:12] == b"\0\0\0\1"
        assert await service.read(SI, 0, 0, 10) == b"data"
        await service.renew_lease(SI, LEASES[1].renew)
        await service.renew_lease(b"slot" * 4, LEASES[1].renew)


async def test_two_leases_with_one_cancel_secret(tmp_path: Path) -> None:
    clock = Clock()
    async with serve(tmp_path, clock=clock) as service:
        await make(service, "immutable")
        await service.add_lease(SI, LeaseSecrets(LEASES[1].renew, LEASES[0].cancel))
        clock.now = NOW + MONTH + 1
        report = await Expirer(service, ExpiryPolicy(enabled=True)).run_cycle()
        assert (report.leases_expired, report.shares_deleted, report.corrupt) == (2, 1, [])


async def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    clock = Clock()
    async with serve(tmp_path, clock=clock) as service:
        await make(service, "immutable")
        await make(service, "mutable", b"slot" * 4)
        before = contents(tmp_path / "shares")
        clock.now = NOW + 2 * MONTH
        report = await Expirer(service, ExpiryPolicy(enabled=True, dry_run=True)).run_cycle()
        assert (report.leases_expired, report.shares_deleted, report.dry_run) == (2, 2, True)
        assert report.bytes_freed == 12 + 4 + 72 + 468 + 4 + 4
        assert contents(tmp_path / "shares") == before
        assert await service.share_numbers(SI) == {0}


async def test_damaged_shares_and_shares_without_a_lease_stay(tmp_path: Path) -> None:
    clock = Clock()
    async with serve(tmp_path, clock=clock) as service:
        await make(service, "immutable")
        bucket = trio.Path(service.store.bucket(SI))
        await (bucket / "1").write_bytes(b"garbage")
        await (bucket / "2").write_bytes(b"\0\0\0\2" + bytes(8) + b"no lease")
        await (bucket / "notes").write_bytes(b"")
        await (bucket.parent / "not-base32").mkdir()
        clock.now = NOW + 2 * MONTH
        report = await Expirer(service, ExpiryPolicy(enabled=True)).run_cycle()
        assert report.corrupt == [[base32.b2a(SI), 1]]
        assert (report.shares_without_lease, report.shares_deleted) == (1, 1)
        assert await service.share_numbers(SI) == {1, 2}


async def test_a_cycle_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expirer, "SLICE_S", 0.0)  # the state is kept after each bucket
    monkeypatch.setattr(expirer, "IDLE_PER_WORK", 0)
    clock = Clock()
    indexes = [bytes([place]) * 16 for place in range(0, 250, 10)]
    async with serve(tmp_path, clock=clock) as service:
        for storage_index in indexes:
            await make(service, "immutable", storage_index)
        clock.now = NOW + 2 * MONTH
        examined = 0
        with trio.CancelScope() as scope:
            first = Expirer(service, ExpiryPolicy(enabled=True, dry_run=True))
            real = first._examine

            def examine(storage_index: bytes, report: CycleReport) -> None:
                nonlocal examined
                examined += 1
                if examined == 10:
                    trio.from_thread.run_sync(scope.cancel)
                real(storage_index, report)

            monkeypatch.setattr(first, "_examine", examine)
            await first.run_cycle()
        assert scope.cancelled_caught
    async with serve(tmp_path, clock=clock) as service:
        second = Expirer(service, ExpiryPolicy(enabled=True, dry_run=True))
        before = second.report
        assert before is not None and 1 <= before.buckets < len(indexes)
        report = await second.run_cycle()
        # at most the bucket it was stopped in is looked at twice
        assert report.buckets == len(indexes) and report.leases_expired == len(indexes)
        assert Expirer(service, ExpiryPolicy()).history == [report]


async def test_when_it_runs(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    autojump_clock.autojump_threshold = 0.2  # threads work in real time
    began = autojump_clock.current_time()
    async with serve(tmp_path, clock=lambda: NOW) as service, trio.open_nursery() as nursery:
        await make(service, "immutable")
        service.store.clock = lambda: NOW + autojump_clock.current_time() - began
        subject = Expirer(service, ExpiryPolicy(enabled=True))
        await nursery.start(subject.run)
        await trio.sleep(5 * 60)
        assert len(subject.history) == 0
        await trio.sleep(2 * 60)
        assert len(subject.history) == 1
        await trio.sleep(11 * 3600)
        assert len(subject.history) == 1
        await trio.sleep(3600)
        assert len(subject.history) == 2
        nursery.cancel_scope.cancel()


async def test_off_by_default(tmp_path: Path) -> None:
    async with serve(tmp_path) as service:
        await Expirer(service, ExpiryPolicy()).run()
        assert not (await trio.Path(tmp_path / expirer.STATE_FILE).exists())


def test_a_cutoff_needs_a_date() -> None:
    with pytest.raises(ValueError, match="date"):
        ExpiryPolicy(mode="cutoff-date")


GOOD = {
    "version": 1,
    "last_start": NOW,
    "prefix": "aa",
    "bucket": "aaaa",
    "report": {"started": NOW, "buckets": 3},
    "history": [],
}


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5), st.data())
def test_a_bad_state_file_is_a_fresh_start(
    tmp_path_factory: pytest.TempPathFactory, value: object, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / expirer.STATE_FILE
    path.write_text(json.dumps(GOOD))
    state = expirer._load(path)
    assert state.report is not None and state.report.buckets == 3
    key = data.draw(st.sampled_from([*GOOD, "unknown"]))
    broken = dict(GOOD) | {key: value}
    if data.draw(st.booleans()):
        broken = dict(GOOD) | {"report": {"started": NOW, data.draw(st.sampled_from(["buckets", "shares"])): value}}
    path.write_text(json.dumps(broken))
    state = expirer._load(path)
    assert isinstance(state.prefix, str) and (state.report is None or isinstance(state.report.buckets, int))
    path.write_bytes(b"\xff{")
    assert expirer._load(path).report is None
