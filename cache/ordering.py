"""Which pending changes may be sent now: what must be on the grid before them is there, or goes with them.

A change waits for those in `after`, and, if one of them went into a new directory, for the link to that directory.
Within one directory what is sent together takes effect together, so waiting for a change of the same batch is no wait.
A circle (two names exchanged across directories) cannot be ordered: it goes.
"""

from __future__ import annotations

from cache.directories import Change


def may_go(change: Change, path: tuple[Change, ...] = ()) -> bool:
    """Whether it can be sent now. If not, those it waits for have it noted in `waiting`."""
    return change.ready and all(_satisfied(first, change, (*path, change)) for first in change.after)


def _satisfied(first: Change, change: Change, path: tuple[Change, ...]) -> bool:
    if first.done:
        directory = first.directory
        if directory.linked or not directory.links:
            return True
        return any(_satisfied(link, change, path) for link in directory.links)
    if first in path:
        return True
    if first.directory is change.directory:
        if may_go(first, path):
            return True
    elif first.ready and _waits_for(first, change):
        return True
    first.waiting.add(change)
    return False


def _waits_for(start: Change, goal: Change) -> bool:
    """Whether `start` is, through others, waiting for `goal`."""
    seen: set[Change] = set()
    todo = [start]
    while todo:
        change = todo.pop()
        if change is goal:
            return True
        if change in seen:
            continue
        seen.add(change)
        todo += [first for first in change.after if not first.done]
    return False
