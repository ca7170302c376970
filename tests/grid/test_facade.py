"""`import grid` offers everything and costs next to nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import grid


def test_every_name_is_there() -> None:
    assert set(grid._HOME_OF) == set(grid.__all__) <= set(dir(grid))
    for name in grid.__all__:
        assert getattr(grid, name) is not None


def test_no_other_name_is() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        grid.no_such_name  # noqa: B018


def test_importing_it_loads_none_of_what_is_slow() -> None:
    code = "import sys, grid; print(*sys.modules.keys() & {'trio', 'cryptography', 'yaml', 'ssl', 'zfec', 'attrs'})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []
