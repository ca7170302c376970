"""Spans against a plain set of byte numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from grid.server.spans import Spans

SIZE = 40
_span = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: (min(pair), max(pair)))


def bytes_of(spans: list[tuple[int, int]]) -> set[int]:
    return {byte for begin, end in spans for byte in range(begin, end)}


@given(st.lists(_span, max_size=20), _span)
def test_spans_are_a_set_of_bytes(added: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    spans = Spans()
    model: set[int] = set()
    for begin, end in added:
        spans.add(begin, end)
        model |= set(range(begin, end))
    assert spans.total == len(model)
    assert bytes_of(spans.within(*asked)) == model & set(range(*asked))
    missing = spans.missing(SIZE)
    assert bytes_of(missing) == set(range(SIZE)) - model
    assert missing == sorted(missing) and all(begin < end for begin, end in missing)
    # never two that touch
    assert all(a[1] < b[0] for a, b in pairwise(missing))
    assert len(spans) <= len(model)
