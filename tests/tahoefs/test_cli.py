"""The command line without a grid: help, usage errors, exit codes, and that quick commands stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tahoefs.cli import COMMANDS
from tests.real.mounting import tahoefs


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    assert "Usage: tahoefs " + name in tahoefs(name, "--help").stdout


@pytest.mark.parametrize(
    "arguments", [["mount"], ["nonsense"], ["cap"], ["cap", "x", "--of", "y"], ["mount", "a:", "b", "--nonsense"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    done = tahoefs(*arguments, check=False)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)


def test_cap_of_a_literal_without_a_node_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    done = tahoefs("cap", "--of", tmp_path / "file", "--shares", "3/7/10", "--convergence", "", "-d", tmp_path / "no")
    assert done.stdout == "URI:LIT:nbswy3dp\n"


@pytest.mark.parametrize("name", ["status", "sync", "umount", "ln", "clone", "pin", "unpin"])
def test_what_talks_to_a_socket_loads_neither_trio_nor_the_grid(name: str) -> None:
    """It must not pay for what it does not use."""
    program = (
        f"import sys, tahoefs.cli, tahoefs.commands.{name};"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'trio', 'grid', 'cache', 'pyfuse3'}))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
