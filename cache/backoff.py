"""How long to wait after a failure: twice as long each time, and not all at the same moment."""

from __future__ import annotations

import random


def delay_s(attempts: int, first_s: float, most_s: float) -> float:
    """Seconds to wait after the `attempts`th failure in a row, give or take a quarter."""
    return min(first_s * 2.0 ** min(attempts - 1, 32), most_s) * random.uniform(0.75, 1.25)
