"""Positions and waiting, against a plain set."""

from __future__ import annotations

import pytest
import trio
from attrs import define
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from cache.journal import Journal, JournalFullError


@define(eq=False)
class Effect:
    position: int


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=40))
def test_oldest_is_the_smallest_outstanding(steps: list[tuple[bool, int]]) -> None:
    journal, outstanding = Journal(1000), list[Effect]()
    for add, number in steps:
        if add:
            effect = Effect(number)
            outstanding.append(effect)
            journal.add(effect)
        elif outstanding:
            effect = outstanding.pop(number % len(outstanding))
            journal.settle(effect)
            journal.settle(effect)
        oldest = min((effect.position for effect in outstanding), default=None)
        assert journal.oldest() == oldest and len(journal) == len(outstanding)
        assert all(journal.settled(p) == (oldest is None or oldest > p) for p in range(21))


def test_positions_grow() -> None:
    journal = Journal(10)
    assert [journal.begin() for _ in range(3)] == [1, 2, 3] and journal.position == 3


async def test_a_full_journal_makes_writers_wait(nursery: trio.Nursery) -> None:
    journal = Journal(2)
    effects = [Effect(1), Effect(2)]
    for effect in effects:
        journal.add(effect)
    with pytest.raises(JournalFullError):
        await journal.room(0.001)
    waited = trio.Event()

    async def wait() -> None:
        await journal.room(60)
        waited.set()

    nursery.start_soon(wait)
    await wait_all_tasks_blocked()
    assert not waited.is_set()
    journal.settle(effects[0])
    await waited.wait()
