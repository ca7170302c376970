"""What all tests share."""

from __future__ import annotations

import signal

from hypothesis import settings

# What a shell runs in its background ignores SIGINT, and so would the programs that tests start, and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test is timed: how fast a machine is today says nothing about the code.
settings.register_profile("tahoefs", deadline=None)
settings.load_profile("tahoefs")
