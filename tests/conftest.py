"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# No test is timed: how fast a machine is today says nothing about the code.
settings.register_profile("tahoefs", deadline=None)
settings.load_profile("tahoefs")
