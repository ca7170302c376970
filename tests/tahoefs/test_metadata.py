"""Edge metadata: what stat shows of it, whatever it holds, and which kind of file a target is."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grid.formats.caps import LiteralCap, UnknownCap
from tahoefs import metadata as edge
from tahoefs.targets import Kind, kind_of

DEFAULTS = edge.Defaults(uid=1000, gid=1001, umask=0o027)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["tahoefs", "tahoe", "mtime", "ctime", "no-write", "mode", "uid", "gid", "size", "type", "xattrs"]
)
HOSTILE = st.dictionaries(
    KEYS | st.text(max_size=4),
    JSON | st.dictionaries(KEYS | st.sampled_from(["mtime_ns", "linkmotime"]), JSON),
    max_size=5,
)


@settings(max_examples=200)
@given(HOSTILE)
def test_anything_in_a_directory_gives_a_stat_that_the_kernel_takes(metadata: dict[str, Any]) -> None:
    mode = edge.permissions(metadata, DEFAULTS, directory=False)
    uid, gid = edge.owner(metadata, DEFAULTS)
    mtime, ctime = edge.times_ns(metadata, 5)
    assert 0 <= mode <= 0o7777
    assert 0 <= uid < 1 << 32 and 0 <= gid < 1 << 32
    assert abs(mtime) < 1 << 63 and abs(ctime) < 1 << 63
    assert isinstance(edge.xattrs(metadata), dict)
    assert kind_of(LiteralCap(b"12345"), metadata) in Kind


@settings(max_examples=100)
@given(HOSTILE)
def test_a_change_keeps_what_is_others(metadata: dict[str, Any]) -> None:
    changed = edge.changed(metadata, now_ns=7, mode=0o640)
    others = {key: value for key, value in metadata.items() if key not in ("tahoefs", "tahoe")}
    assert {key: value for key, value in changed.items() if key != "tahoefs"} == others
    assert (changed["tahoefs"]["mode"], changed["tahoefs"]["ctime_ns"]) == (0o640, 7)


def test_metadata_that_was_kept_back_meets_what_others_noted_since() -> None:
    kept = {"old": 1, "no-write": True, "tahoefs": {"mode": 0o444}}
    newer = {"new": 2, "tahoefs": {"mode": 0o644}, "tahoe": {"linkmotime": 5}}
    assert edge.beside(kept, newer) == newer | {"no-write": True, "tahoefs": {"mode": 0o444}}
    assert edge.beside({}, kept) == {"old": 1}


@given(st.dictionaries(st.text(max_size=20), st.binary(max_size=100), max_size=4))
def test_extended_attributes_survive_json(values: dict[str, bytes]) -> None:
    stored = json.loads(json.dumps(edge.with_xattrs({"k": 1}, values, now_ns=1)))
    assert edge.xattrs(stored) == values
    assert stored["k"] == 1


def test_defaults_when_nothing_is_noted() -> None:
    assert edge.permissions({}, DEFAULTS, directory=False) == 0o640
    assert edge.permissions({}, DEFAULTS, directory=True) == 0o750
    assert edge.owner({}, DEFAULTS) == (1000, 1001)
    assert edge.times_ns({}, 5) == (0, 0)


@pytest.mark.parametrize(
    ("metadata", "times"),
    [
        ({"tahoe": {"linkmotime": 10.25}}, (10_250_000_000, 10_250_000_000)),
        ({"mtime": 3, "tahoe": {"linkmotime": 10}}, (3_000_000_000, 10_000_000_000)),
        ({"mtime": 3, "ctime": 4.5}, (3_000_000_000, 4_500_000_000)),
        ({"mtime": 3, "tahoefs": {"mtime_ns": 1, "ctime_ns": 2}}, (1, 2)),
        ({"tahoe": {"linkmotime": 9}, "tahoefs": {"mtime_ns": 1, "ctime_ns": 2, "size": 5}}, (1, 2)),
        ({"tahoe": {"linkmotime": 9}, "tahoefs": {"mtime_ns": 1, "size": 4}}, (9_000_000_000, 9_000_000_000)),
        ({"mtime": True, "tahoe": {"linkmotime": float("nan")}}, (0, 0)),
        ({"mtime": 10**30}, (0, 0)),
    ],
    ids=["link", "own-mtime", "backup", "ours", "ours-same-size", "replaced-by-another", "nonsense", "out-of-range"],
)
def test_which_time_is_shown(metadata: dict[str, Any], times: tuple[int, int]) -> None:
    assert edge.times_ns(metadata, 5) == times


def test_no_write_takes_the_write_bits_away_and_chmod_sets_it() -> None:
    assert edge.permissions({"no-write": True, "tahoefs": {"mode": 0o666}}, DEFAULTS, directory=False) == 0o444
    assert edge.is_no_write({"no-write": True}) and not edge.is_no_write({"no-write": False})
    protected = edge.with_mode({"other": 1}, 0o444, now_ns=1, tell_others=True)
    assert protected["no-write"] is True and protected["other"] == 1
    assert "no-write" not in edge.with_mode(protected, 0o644, now_ns=2, tell_others=True)
    group = edge.with_mode({}, 0o060, now_ns=1, tell_others=True)
    assert group["no-write"] is True and not edge.is_no_write(group)
    assert edge.permissions(group, DEFAULTS, directory=False) == 0o060
    # A mutable file keeps its write cap: other clients would store the read cap only, for good.
    assert "no-write" not in edge.with_mode({}, 0o444, now_ns=1, tell_others=False)


def test_a_link_that_another_client_overwrote_is_a_file_again() -> None:
    link = edge.changed({}, now_ns=1, type="symlink", size=6)
    assert kind_of(LiteralCap(b"target"), link) is Kind.SYMLINK
    assert kind_of(LiteralCap(b"something else"), link) is Kind.FILE
    assert kind_of(UnknownCap(None, "ro.x", None), link) is Kind.UNKNOWN
