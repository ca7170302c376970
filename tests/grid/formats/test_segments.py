"""Segment arithmetic against Tahoe-LAFS 1.20's, and against itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grid.errors import FormatError
from grid.formats.segments import Segmentation, choose_segment_size, div_ceil, round_up
from tests.vectors import section


@pytest.mark.parametrize("vector", section("formats.json", "segment_rules"), ids=lambda v: f"{v['size']}-{v['k']}")
def test_arithmetic_is_tahoes(vector: dict[str, int]) -> None:
    found = Segmentation.for_upload(vector["size"], vector["k"], vector["max_segment_size"])
    assert found.segment_size == vector["segment_size"]
    assert found.num_segments == vector["num_segments"]
    assert found.tail_size == vector["tail_size"]
    assert found.tail_padded == vector["padded_tail"]
    assert found.block_size == vector["block_size"]
    assert found.tail_block_size == vector["tail_block_size"]
    assert found.share_data_size == vector["share_data_size"]


@pytest.mark.parametrize("vector", section("formats.json", "chk"), ids=lambda v: v["name"])
def test_arithmetic_of_whole_files(vector: dict[str, int]) -> None:
    size = vector["plaintext"]["length"]
    found = Segmentation.for_upload(size, vector["k"], vector["max_segment_size"])
    names = ("segment_size", "num_segments", "block_size", "share_data_size")
    assert {name: getattr(found, name) for name in names} == {name: vector[name] for name in names}


@given(st.integers(1, 100_000), st.integers(1, 256), st.integers(1, 5000))
def test_segments_and_blocks_cover_everything_once(size: int, k: int, max_segment_size: int) -> None:
    layout = Segmentation.for_upload(size, k, max_segment_size)
    segments = range(layout.num_segments)
    assert sum(map(layout.segment_bytes, segments)) == size
    assert sum(map(layout.block_bytes, segments)) == layout.share_data_size == div_ceil(size, k)
    for segment in {0, layout.num_segments // 2, layout.num_segments - 1}:
        start, length = layout.segment_start(segment), layout.segment_bytes(segment)
        assert layout.locate(start) == (segment, 0)
        assert layout.locate(start + length - 1) == (segment, length - 1)
        assert layout.padded_bytes(segment) == k * layout.block_bytes(segment) == round_up(length, k)
        assert layout.block_start(segment) == sum(map(layout.block_bytes, range(segment)))
    for offset in (-1, size):
        with pytest.raises(ValueError, match="not inside"):
            layout.locate(offset)
    for segment in (-1, layout.num_segments):
        with pytest.raises(ValueError, match="no segment"):
            layout.segment_bytes(segment)


def test_an_empty_file_has_no_segments() -> None:
    assert choose_segment_size(0, 3) == 0
    assert Segmentation.for_upload(0, 3).num_segments == 0
    assert Segmentation(0, 3, 131073).share_data_size == 0


@pytest.mark.parametrize(("size", "k", "segment_size"), [(-1, 3, 3), (5, 0, 3), (5, 3, 0), (5, 3, 4), (5, 3, -3)])
def test_impossible_files_are_refused(size: int, k: int, segment_size: int) -> None:
    with pytest.raises(FormatError):
        Segmentation(size, k, segment_size)
