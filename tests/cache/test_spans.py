"""Spans against a set of byte numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cache.spans import Spans

SIZE = 60
operations = st.lists(st.tuples(st.booleans(), st.integers(0, SIZE), st.integers(0, SIZE)), max_size=30)


@given(operations, st.integers(0, SIZE), st.integers(0, SIZE))
def test_spans_are_a_set_of_bytes(steps: list[tuple[bool, int, int]], a: int, b: int) -> None:
    spans, model = Spans(), set[int]()
    for add, start, stop in steps:
        if add:
            spans.add(start, stop)
            model |= set(range(start, stop))
        else:
            spans.remove(start, stop)
            model -= set(range(start, stop))
        ranges = list(spans)
        assert {i for x, y in ranges for i in range(x, y)} == model
        assert all(x < y for x, y in ranges)
        assert all(y < x for (_, y), (x, _) in pairwise(ranges)), "they neither overlap nor touch"
        assert spans.total == len(model) and len(spans) == len(ranges)
        assert spans.stop == max(model, default=-1) + 1
    assert spans.covers(a, b) == (set(range(a, b)) <= model)
    run = spans.run_from(a)
    assert set(range(a, run)) <= model and run not in model
    pieces = spans.cut(a, b)
    assert [i for x, y, _ in pieces for i in range(x, y)] == list(range(a, b))
    assert {i for x, y, held in pieces if held for i in range(x, y)} == model & set(range(a, b))
    assert all(one[2] != two[2] for one, two in pairwise(pieces)), "the longest pieces possible"
    assert spans.missing_bytes(a, b) == len(set(range(a, b)) - model)
