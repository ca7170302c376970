"""Several things at once, each of which blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_threads(*works: Callable[[], None]) -> None:
    """Run all of them at once; the first exception is raised again when all have ended."""
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failure:  # noqa: BLE001 raised again below
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
