"""Base32 against the vectors of Tahoe-LAFS 1.20."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import FormatError
from grid.formats.base32 import ALPHABET, a2b, b2a
from tests.vectors import name_of, section

WORDS = section("formats.json", "base32.encode") + section("storage.json", "hash.base32")


@pytest.mark.parametrize("vector", WORDS, ids=name_of)
def test_text_and_bytes(vector: dict[str, str]) -> None:
    data = bytes.fromhex(vector["bytes"])
    assert b2a(data) == vector["text"]
    assert a2b(vector["text"]) == data


@pytest.mark.parametrize("vector", section("storage.json", "hash.si_dir"))
def test_storage_index_as_text(vector: dict[str, str]) -> None:
    assert b2a(bytes.fromhex(vector["si"])) == vector["si_b32"]


@pytest.mark.parametrize("text", section("formats.json", "base32.reject_by_decoder"))
def test_what_tahoe_refuses_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        a2b(text)


@pytest.mark.parametrize("vector", section("formats.json", "base32.accepted_by_decoder_with_spare_bits_set"))
def test_spare_bits_are_refused_though_tahoe_drops_them(vector: dict[str, str]) -> None:
    with pytest.raises(FormatError, match="spare bits"):
        a2b(vector["text"])
    assert b2a(bytes.fromhex(vector["bytes"])) != vector["text"]


def test_last_characters() -> None:
    allowed = section("formats.json", "base32.last_char_allowed_in_caps")
    for bytes_left, characters in ((1, 2), (2, 4), (3, 5), (4, 7)):
        good = set()
        for last in ALPHABET:
            try:
                a2b("a" * (characters - 1) + last)
                good.add(last)
            except FormatError:
                pass
        key = next(key for key in allowed if key.startswith(str(bytes_left)))
        assert good == set(allowed[key])


@given(st.binary(max_size=70))
def test_there_and_back(data: bytes) -> None:
    assert a2b(b2a(data)) == data
    assert len(b2a(data)) == -(-8 * len(data) // 5)


@given(st.text(max_size=20) | st.text(alphabet=ALPHABET + "_- +0189A=\n\u0661", max_size=20))
def test_any_text_is_decoded_exactly_or_refused(text: str) -> None:
    try:
        data = a2b(text)
    except FormatError as error:
        assert len(text) < 3 or text not in str(error)
    else:
        assert b2a(data) == text
