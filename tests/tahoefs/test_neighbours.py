"""Guessing what is read next: only in walks, in the order they go, and never without bound."""

from __future__ import annotations

import random

from tahoefs.neighbours import START_READS, WINDOW_FILES_MAX, Neighbours, Orders

NAMES = [f"file{number:03}" for number in range(100)]
SHUFFLED = random.Random(5).sample(NAMES, len(NAMES))


class Reader:
    def __init__(self, orders: Orders = (NAMES, SHUFFLED)) -> None:
        self.neighbours, self.orders, self.asked = Neighbours(), orders, 0

    def read(self, name: str, directory: str = "a", version: int = 1) -> list[str]:
        def orders() -> Orders:
            self.asked += 1
            return self.orders

        return list(self.neighbours.note(directory, name, version, orders))


def test_a_walk_in_either_order_is_named_ahead_once_and_whole() -> None:
    for order in (NAMES, SHUFFLED):
        reader = Reader()
        named = [name for each in order for name in reader.read(each)]
        assert named == order[START_READS:]
        assert reader.asked == 1


def test_what_is_named_never_goes_further_ahead_than_the_window() -> None:
    reader = Reader()
    named = 0
    for number, each in enumerate(NAMES[:50]):
        named += len(reader.read(each))
        assert START_READS + named - number <= WINDOW_FILES_MAX + START_READS + 1


def test_reads_here_and_there_name_nothing() -> None:
    reader = Reader()
    assert not any(reader.read(each) for each in NAMES[::7])
    assert not any(reader.read(each) for each in reversed(NAMES))
    assert not Reader().read(NAMES[1]) and not Reader().read("no such name")


def test_a_few_skipped_or_swapped_names_do_not_end_a_walk_and_a_jump_does() -> None:
    reader = Reader()
    for each in (*NAMES[:5], NAMES[6], NAMES[5], NAMES[8]):
        reader.read(each)
    assert reader.read(NAMES[9])
    assert not reader.read(NAMES[80])


def test_the_habit_of_a_long_walk_begins_the_next_directory_with_its_first_file() -> None:
    reader = Reader()
    for each in SHUFFLED[:40]:
        reader.read(each)
    assert reader.read(SHUFFLED[0], "b") == SHUFFLED[1:3]
    assert not reader.read(NAMES[0], "c")


def test_a_listing_that_changed_is_asked_for_again() -> None:
    reader = Reader()
    for each in NAMES[:5]:
        reader.read(each)
    reader.orders = (["x", "y", "z", "last"],)
    assert [reader.read(each, version=2) for each in ("x", "y", "z")] == [[], [], ["last"]]
