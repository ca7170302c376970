"""What a helper answers: there and back, the golden answer of a real one, and nonsense."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import RemoteProtocolError
from grid.formats.cap_kinds import CHKVerifyCap
from grid.formats.ueb import read_unproven
from grid.wire.failures import UPLOAD_RESULTS_TYPE, Copyable
from grid.wire.helper_results import HelperResults, results_to_send
from tests.vectors import section

VECTOR: dict[str, Any] = section("formats.json", "chk")[0]
UEB = bytes.fromhex(VECTOR["ueb"])
EXTENSION = read_unproven(UEB)
SHAREMAP = {0: frozenset({"v0-a", "v0-b"}), 2: frozenset({"v0-a"})}
ORDER = [
    *("timings", "sharemap", "servermap", "file_size", "ciphertext_fetched", "uri"),
    *("preexisting_shares", "pushed_shares", "uri_extension_hash", "uri_extension_data"),
]


@pytest.mark.parametrize("uploaded", [True, False])
def test_there_and_back(uploaded: bool) -> None:
    verify_cap = CHKVerifyCap(b"s" * 16, b"h" * 32, EXTENSION.k, EXTENSION.n, EXTENSION.size) if uploaded else None
    sent = results_to_send(EXTENSION, b"h" * 32, SHAREMAP, pushed=1, preexisting=2, verify_cap=verify_cap)
    assert [name.decode() for name in sent.attributes][:10] == ORDER
    assert sent.attributes[b"servermap"] == ({b"v0-a": {0, 2}, b"v0-b": {0}} if uploaded else {})
    got = HelperResults.parse(sent)
    assert (got.ueb_hash, got.k, got.n, got.size) == (b"h" * 32, EXTENSION.k, EXTENSION.n, EXTENSION.size)
    assert (got.sharemap, got.pushed_shares, got.preexisting_shares) == (SHAREMAP, 1, 2)


def test_the_uri_extension_is_told_as_tahoe_does() -> None:
    """Numbers as numbers, all else as bytes, keys as text."""
    told = results_to_send(EXTENSION, b"h" * 32, {}).attributes[b"uri_extension_data"]
    expected = {
        key: bytes.fromhex(value) if key.endswith("hash") else value.encode() if isinstance(value, str) else value
        for key, value in VECTOR["ueb_fields"].items()
    }
    assert told == expected


GOOD: dict[bytes, Any] = dict(results_to_send(EXTENSION, b"h" * 32, SHAREMAP).attributes)


@pytest.mark.parametrize(
    "changes",
    [
        {b"uri_extension_hash": b"short"},
        {b"uri_extension_hash": None},
        {b"uri_extension_data": []},
        {b"uri_extension_data": {"size": True}},
        {b"sharemap": None},
        {b"sharemap": {number: set() for number in range(300)}},
        {b"pushed_shares": -1},
        {b"preexisting_shares": "many"},
    ],
)
def test_nonsense(changes: dict[bytes, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        HelperResults.parse(Copyable(UPLOAD_RESULTS_TYPE, GOOD | changes))


def test_what_does_not_fit_in_a_sharemap_is_left_out() -> None:
    """Helpers before 1.3 told texts for people."""
    sharemap = {0: {b"v0-a", 7, b"x" * 1000}, "one": {b"v0-a"}, 2: "somewhere", 3: {b"v0-b"}}
    got = HelperResults.parse(Copyable(UPLOAD_RESULTS_TYPE, GOOD | {b"sharemap": sharemap, b"new": object()}))
    assert got.sharemap == {0: frozenset({"v0-a"}), 3: frozenset({"v0-b"})}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.binary(max_size=40) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*GOOD]), VALUES, max_size=6))
def test_only_the_named_error_escapes(changes: dict[bytes, Any]) -> None:
    try:
        HelperResults.parse(Copyable(UPLOAD_RESULTS_TYPE, GOOD | changes))
    except RemoteProtocolError:
        return
