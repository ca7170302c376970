"""From the groups in which concurrent code raises to the one error a person should read."""

from __future__ import annotations


def leaf_error(error: BaseException) -> BaseException:
    """The error to show: the first leaf of nested groups that is not a mere interruption."""
    while isinstance(error, BaseExceptionGroup):
        inner = error.exceptions
        error = next((each for each in inner if isinstance(each, Exception)), inner[0])
    return error
