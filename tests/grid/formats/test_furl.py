"""FURLs against Foolscap's parser."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import FormatError
from grid.formats.base32 import ALPHABET
from grid.formats.furl import TCP_HINTS_MAX, Furl
from tests.vectors import section

FURLS = [vector for vector in section("foolscap.json", "furls") if "furl" in vector]
HINTS = [vector for vector in section("foolscap.json", "furls") if "hint" in vector]


def test_there_are_vectors_of_each_sort() -> None:
    assert len([vector for vector in FURLS if "error" in vector]) == 5
    assert len(FURLS) + len(HINTS) == 23


@pytest.mark.parametrize("vector", FURLS, ids=lambda vector: vector["furl"])
def test_parsing_is_foolscaps(vector: dict[str, Any]) -> None:
    if "error" in vector:
        with pytest.raises(FormatError) as caught:
            Furl.parse(vector["furl"])
        assert vector["furl"] not in str(caught.value)
    else:
        furl = Furl.parse(vector["furl"])
        assert [furl.tub_id, list(furl.hints), furl.name] == vector["parsed"]
        assert Furl.parse(str(furl)) == furl


@pytest.mark.parametrize("vector", HINTS, ids=lambda vector: vector["hint"])
def test_hints_are_understood_as_foolscap_does(vector: dict[str, str]) -> None:
    hosts = [host for host, _ in Furl("gaa", (vector["hint"],), "n").tcp_hints()]
    port_is_possible = int(vector["hint"].rpartition(":")[2]) <= 65535
    usable = not vector["host_header"].startswith("rejected") and port_is_possible
    assert hosts == ([vector["host_header"]] if usable else [])


def test_a_nodes_own_furl() -> None:
    vector = section("foolscap.json", "identity")
    furl = Furl.parse(vector["furl"] + "\n")
    assert furl.tub_id == vector["tubid"]
    assert furl.tub_id_bytes.hex() == vector["sha1_der"]
    assert furl.tcp_hints() == [("127.0.0.1", 12345), ("example.org", 80)]
    assert str(furl) == vector["furl"]
    assert furl.name not in repr(furl)


def test_usable_hints_are_few_distinct_and_in_order() -> None:
    hints = ["h:1", "tcp:h:1", "tor:h:1", "h:0", "h:65536", "tcp:12345", *(f"tcp:h:{port}" for port in range(2, 40))]
    places = Furl("gaa", tuple(hints), "n").tcp_hints()
    assert places[:3] == [("h", 1), ("tcp", 12345), ("h", 2)]
    assert len(places) == TCP_HINTS_MAX


def test_a_short_tub_id_is_no_tubs() -> None:
    with pytest.raises(FormatError, match="32 characters"):
        _ = Furl.parse("pb://gaa@h:1/n").tub_id_bytes
    with pytest.raises(FormatError):
        _ = Furl.parse(f"pb://{'A' * 32}@h:1/n").tub_id_bytes


_hint = st.text(st.characters(exclude_characters=",/\n"), min_size=1, max_size=12)
_furls = st.builds(
    Furl,
    st.text(ALPHABET, min_size=1, max_size=32),
    st.lists(_hint, max_size=4).map(tuple),
    st.text(st.characters(exclude_characters="\n"), min_size=1, max_size=40).filter(lambda name: "pb://" not in name),
)


@given(_furls)
def test_there_and_back(furl: Furl) -> None:
    assert Furl.parse(str(furl)) == furl
    furl.tcp_hints()


@given(st.text(max_size=40) | st.text("pb:/@,tcp127.a[]%\n", max_size=60).map(lambda text: "pb://" + text))
def test_garbage_raises_the_named_error_only(text: str) -> None:
    try:
        furl = Furl.parse(text)
    except FormatError:
        return
    furl.tcp_hints()
    assert Furl.parse(str(furl)) == furl


def test_a_furl_may_not_be_endless() -> None:
    with pytest.raises(FormatError, match="characters"):
        Furl.parse("pb://gaa@" + "h:1," * 5000 + "h:1/n")
