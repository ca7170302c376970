"""Netstrings against the vectors of Tahoe-LAFS 1.20."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grid.errors import FormatError
from grid.formats.netstring import netstring, read_netstring
from tests.vectors import name_of, section


@pytest.mark.parametrize("vector", section("formats.json", "netstring.encode"), ids=name_of)
def test_written_and_read(vector: dict[str, str]) -> None:
    data, text = bytes.fromhex(vector["bytes"]), bytes.fromhex(vector["netstring"])
    assert netstring(data) == text
    assert read_netstring(text) == (data, len(text))


def _read_all(data: bytes, count: int, trailer: bytes | None) -> list[bytes]:
    """As the vectors want it: exactly `count`, and then nothing but the trailer when one is asked for."""
    values, position = [], 0
    for _ in range(count):
        value, position = read_netstring(data, position)
        values.append(bytes(value))
    if trailer is not None and data[position:] != trailer:
        raise FormatError("trailing bytes")
    return values


@pytest.mark.parametrize("vector", section("formats.json", "netstring.errors"), ids=name_of)
def test_what_tahoe_refuses_is_refused(vector: dict[str, Any]) -> None:
    trailer = None if vector["required_trailer"] is None else bytes.fromhex(vector["required_trailer"])
    with pytest.raises(FormatError):
        _read_all(bytes.fromhex(vector["input"]), vector["count"], trailer)


@pytest.mark.parametrize("vector", section("formats.json", "netstring.tolerated"), ids=name_of)
def test_of_what_tahoe_tolerates_only_leading_zeros_are_read(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["input"])
    if vector["name"] == "leading-zero":
        assert _read_all(data, 1, b"") == [bytes.fromhex(value) for value in vector["values"]]
    else:
        with pytest.raises(FormatError):
            read_netstring(data)


@given(st.lists(st.binary(max_size=20), max_size=5), st.binary(max_size=3))
def test_one_after_another(values: list[bytes], before: bytes) -> None:
    data, position = memoryview(before + b"".join(map(netstring, values))), len(before)
    for value in values:
        found, position = read_netstring(data, position)
        assert found == value
    assert position == len(data)


@given(st.binary(max_size=40))
@example(b"99999999999999999999999999999999:")
@example(b"18446744073709551616:x,")
@example(b"-1:,")
@example("١:a,".encode())
def test_garbage_raises_the_named_error_only(data: bytes) -> None:
    try:
        value, position = read_netstring(data)
    except FormatError:
        return
    assert data[:position].endswith(b":" + bytes(value) + b",")
