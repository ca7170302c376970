"""A directory's pending changes over its listing: against a dict; and what another writer does to them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.directories import Change, Directory, Kind, name_with
from cache.ordering import may_go
from grid.formats.caps import Cap, DirectoryCap, LiteralCap, SDMFWriteCap
from grid.formats.directory import DirEntry

ROOT = DirectoryCap(SDMFWriteCap(bytes(16), bytes(32)))
names = st.sampled_from("abc")
values = st.binary(min_size=1, max_size=1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), names, values),
        st.tuples(st.just("drop"), names, st.just(b"")),
        st.tuples(st.just("describe"), names, values),
        st.tuples(st.sampled_from(["send", "fail", "arrive"]), st.just(""), st.just(b"")),
    ),
    max_size=30,
)


def lit(data: bytes) -> Cap:
    return LiteralCap(data)


def directory(**names: bytes) -> Directory:
    made = Directory(ROOT)
    made.rebase(ROOT, b"1", {name: DirEntry(name, lit(data), {}) for name, data in names.items()}, 0.0)
    return made


def publish(grid: dict[str, DirEntry], batch: list[Change]) -> dict[Change, bool]:
    outcomes = {}
    for change in batch:
        new, outcomes[change] = change.apply(grid.get(change.name))
        if new is None:
            grid.pop(change.name, None)
        else:
            grid[change.name] = new
    return outcomes


@settings(max_examples=300)
@given(st.dictionaries(names, values), steps)
def test_the_view_is_a_dict_and_arrives_as_it_is(base: dict[str, bytes], todo: list[tuple[str, str, bytes]]) -> None:
    """With publishes that work, and publishes that fail though they were done."""
    ours = directory(**base)
    grid = dict(ours.base)
    model: dict[str, tuple[bytes, Any]] = {name: (data, None) for name, data in base.items()}
    in_flight: list[Change] = []
    generation = ours.generation
    for position, (what, name, data) in enumerate(todo):
        if what == "put":
            ours.put(name, lit(data), {"v": data.hex()}, position, 1.0)
            model[name] = (data, data.hex())
        elif what == "drop" and name in model:
            ours.drop(name, position, 1.0)
            del model[name]
        elif what == "describe" and name in model:
            ours.describe(name, {"v": data.hex()}, position, 1.0)
            model[name] = (model[name][0], data.hex())
        elif what == "send" and not in_flight:
            in_flight = list(ours.changes.values())
            for change in in_flight:
                change.sent = True
        elif what in ("fail", "arrive") and in_flight:
            outcomes = publish(grid, in_flight)
            assert all(outcomes.values()), "nobody else wrote"
            if what == "arrive":
                for change in in_flight:
                    ours.take_away(change)
                assert not any(conflict for _, conflict in ours.rebase(ROOT, b"%d" % position, dict(grid), 0.0))
            in_flight = []
        seen = {name: (entry.target, entry.metadata.get("v")) for name, entry in ours.entries().items()}
        assert seen == {name: (lit(data), v) for name, (data, v) in model.items()}
        assert all((ours.get(name) is None) == (name not in model) for name in "abc")
        assert ours.generation >= generation
        generation = ours.generation
    outcomes = publish(grid, in_flight)
    outcomes |= publish(grid, list(ours.changes.values()))
    assert all(outcomes.values())
    assert {name: (entry.cap, entry.metadata.get("v")) for name, entry in grid.items()} == {
        name: (lit(data), v) for name, (data, v) in model.items()
    }


def test_what_the_grid_never_heard_of_vanishes() -> None:
    ours = directory()
    change, _ = ours.put("a", lit(b"1"), {}, 1, 1.0)
    assert ours.drop("a", 2, 1.0) == (None, change) and ours.changes == {}


def test_what_was_sent_must_be_removed_again() -> None:
    ours = directory()
    change, _ = ours.put("a", lit(b"1"), {}, 1, 1.0)
    change.sent = True
    removal, old = ours.drop("a", 2, 1.0)
    assert old is change and removal is not None and removal.position == 1
    assert removal.apply(DirEntry("a", lit(b"1"), {})) == (None, True)
    theirs = DirEntry("a", lit(b"theirs"), {})
    assert removal.apply(theirs) == (theirs, False)


def test_keys_that_we_left_alone_are_as_others_set_them() -> None:
    """Also after a change that may have arrived or not, and one that was written over what is there."""
    base = {"kept": 1, "removed": 1, "ours": 1, "tahoe": {"linkcrtime": 5.0}}
    theirs = {"kept": 2, "removed": 2, "ours": 2, "new": 2, "tahoe": {"linkcrtime": 5.0, "linkmotime": 6.0}}
    ours = Directory(ROOT)
    ours.rebase(ROOT, b"1", {name: DirEntry(name, lit(b"1"), base) for name in "ab"}, 0.0)
    wanted = {"kept": 1, "ours": 3}
    merged = {"kept": 2, "ours": 3, "new": 2, "tahoe": {"linkcrtime": 5.0, "linkmotime": 9.0}}
    for change in (ours.describe("a", wanted, 1, 9.0)[0], ours.put("b", lit(b"2"), wanted, 2, 9.0)[0]):
        new, done = change.apply(DirEntry(change.name, lit(b"1"), theirs))
        assert done and new is not None and new.metadata == merged
        change.sent = True
        back, _ = ours.describe(change.name, {"kept": 1, "removed": 1, "ours": 1}, 4, 9.0)
        again, _ = back.apply(new)  # ours is 3 there by our own doing
        assert again is not None and {key: again.metadata.get(key) for key in base if key != "tahoe"} == {
            "kept": 2,
            "removed": 1,
            "ours": 1,
        }
    ours.rebase(ROOT, b"2", {name: DirEntry(name, lit(b"1"), theirs) for name in "ab"}, 0.0)
    shown = ours.get("a")
    assert shown is not None and (shown.metadata["kept"], shown.metadata["new"], shown.metadata["ours"]) == (2, 2, 1)


def test_a_snapshot_of_the_view_stays_as_it_is() -> None:
    ours = directory(a=b"1")
    before = ours.entries()
    ours.put("b", lit(b"2"), {}, 1, 1.0)
    assert set(before) == {"a"} and set(ours.entries()) == {"a", "b"}


def test_rebase_tells_conflicts_from_what_is_void() -> None:
    ours = directory(gone=b"1", replaced=b"1", described=b"1", same=b"1", mine=b"1")
    ours.drop("gone", 1, 1.0)
    replaced, _ = ours.put("replaced", lit(b"ours"), {}, 2, 1.0)
    described, _ = ours.describe("described", {"x": 1}, 3, 1.0)
    ours.put("same", lit(b"2"), {}, 4, 1.0)
    added, _ = ours.put("added", lit(b"ours"), {}, 5, 1.0)
    ours.put("mine", lit(b"ours"), {}, 6, 1.0)
    theirs = {"replaced": b"t", "described": b"t", "same": b"2", "added": b"t"}  # and mine was removed
    odd = ours.rebase(ROOT, b"2", {name: DirEntry(name, lit(data), {}) for name, data in theirs.items()}, 9.0)
    assert {(change.name, conflict) for change, conflict in odd} == {
        ("gone", False),
        ("replaced", True),
        ("described", False),
        ("added", True),
    }
    assert {replaced, described, added} < {change for change, _ in odd}
    assert ours.loaded_at == 9.0
    assert ours.rebase(ROOT, b"2", {}, 10.0) == []  # the same version says nothing new


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("a.txt", True, "a (x).txt"),
        ("a.txt", False, "a.txt (x)"),
        (".bashrc", True, ".bashrc (x)"),
        ("...", True, "... (x)"),
        ("a.tar.gz", True, "a.tar (x).gz"),
        ("n." + "e" * 40, True, "n." + "e" * 40 + " (x)"),
        ("é" * 127, True, "é" * 125 + " (x)"),
        ("é" * 120 + ".text", True, "é" * 123 + ".text"),
    ],
)
def test_names_of_conflict_copies(name: str, split: bool, expected: str) -> None:
    found = name_with(name, "x", split=split)
    assert len(found.encode()) <= 255
    if name.endswith(".text"):
        assert found.endswith(" (x).text")
    else:
        assert found == expected


def test_free_names() -> None:
    ours = directory(**{"a (x)": b"1"})
    ours.put("a", lit(b"1"), {}, 1, 1.0)
    assert ours.free_name("a", "x") == "a (x 2)"


def test_order_of_a_rename_across_directories() -> None:
    src, dst = directory(a=b"1"), directory()
    link, _ = dst.put("b", lit(b"1"), {}, 1, 1.0)
    removal, _ = src.drop("a", 1, 1.0, after={link})
    assert removal is not None and removal.kind is Kind.REMOVE
    assert may_go(link) and not may_go(removal) and link.waiting == {removal}
    moved, _ = dst.put("c", lit(b"1"), {}, 2, 1.0)  # the new name is renamed again
    assert link.hand_on(moved) == [removal]
    link.done = True
    assert not may_go(removal) and moved.waiting == {removal}
    moved.done = True
    assert may_go(removal)


def test_order_through_a_new_directory() -> None:
    src, parent, new = directory(a=b"1"), directory(), Directory(None)
    inside, _ = new.put("a", lit(b"1"), {}, 1, 1.0)
    link, _ = parent.put("new", new, {}, 1, 1.0)
    new.links.add(link)
    removal, _ = src.drop("a", 2, 1.0, after={inside})
    assert removal is not None and may_go(inside) and not may_go(link) and not may_go(removal)
    inside.done = True
    new.rebase(ROOT, None, {}, 0.0)
    assert may_go(link) and not may_go(removal)  # published, but nobody could find it
    new.links.clear()
    link.done = new.linked = True
    assert may_go(removal)


def test_circles_are_cut() -> None:
    one, two = directory(a=b"1"), directory(b=b"2")
    a, _ = one.put("a", lit(b"2"), {}, 1, 1.0)
    b, _ = two.put("b", lit(b"1"), {}, 1, 1.0)
    a.wait_for([b])
    b.wait_for([a])
    assert may_go(a) and may_go(b)
    here, _ = one.put("x", lit(b"1"), {}, 2, 1.0)
    here.wait_for([a])
    assert may_go(here)
