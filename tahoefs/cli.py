"""The command line: `tahoefs COMMAND …`. Each command is a module in `tahoefs/commands/`, loaded when it is called.

A failure is one line on standard error that says what failed, on what, and what to do; the exit code comes from the
one table in `tahoefs/errnos.py` (0 done, 1 failed, 2 wrong usage, 3 grid unreachable, 4 cap invalid or not
allowed, 5 data damaged). `--debug` adds the traceback.
"""

from __future__ import annotations

import importlib
import os
import pwd
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click

COMMANDS: Final = {
    "mount": "mount a directory of a grid as a folder",
    "umount": "send what is unsent, then unmount",
    "sync": "return once everything written is on the grid",
    "status": "what a mount is doing",
    "pin": "keep a tree or a file in the cache, to have it offline",
    "unpin": "no longer keep it there",
    "stats": "what a mount or a node counts",
    "ping": "how fast each server answers",
    "speed-test": "how fast files go to the grid and back",
    "doctor": "what is wrong here, and what to do about it",
    "create-client": "make a node directory",
    "create-introducer": "make an introducer's node directory",
    "create-storage": "make a storage server's node directory",
    "create-stats-gatherer": "make a statistics gatherer's node directory",
    "run": "run a node's services",
    "create-alias": "make a directory on the grid and name it",
    "add-alias": "name an existing directory cap",
    "list-aliases": "the names known to a node directory",
    "ln": "link an existing cap under a name",
    "clone": "an instant copy of a file or tree",
    "cap": "what a cap is; which cap a local file has",
    "check": "is it all there, and right? repairs it, renews leases",
    "manifest": "everything that can be reached from a directory",
    "tend": "renew leases and repair, now and then; verify caps are enough",
    "have": "is a local file safely on the grid?",
    "freeze": "an immutable snapshot of a tree; only directories are uploaded",
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


class UserError(Exception):
    """A command cannot go on; the text is for the user, `exit_code` for the shell."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Commands(click.Group):
    """Loads a command's module only when it is called: `status` must not wait for the grid layer's import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"tahoefs.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks and log more.")
@click.version_option(package_name="tahoefs")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Mount a Tahoe-LAFS directory as an ordinary folder."""
    ctx.obj = {"debug": debug}


def node_dir_option(function: _Function) -> _Function:
    """`--node-dir DIR`: Tahoe's own layout; an existing ~/.tahoe works as it is."""
    return click.option(
        "-d",
        "--node-dir",
        type=click.Path(path_type=Path),
        default=default_node_dir,
        help="Node directory (default: $TAHOEFS_NODE_DIR, then ~/.tahoe if there, then ~/.tahoefs).",
    )(function)


def default_node_dir() -> Path:
    if named := os.environ.get("TAHOEFS_NODE_DIR"):
        return Path(named)
    home = Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)  # mount(8) and systemd may not set it
    tahoe = home / ".tahoe"
    return tahoe if tahoe.is_dir() else home / ".tahoefs"


def warn(text: str) -> None:
    click.echo(f"tahoefs: warning: {text}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. Never returns: ends the process with the exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(argv, prog_name="tahoefs", standalone_mode=False)
    except click.exceptions.Exit as ended:
        code = ended.exit_code
    except click.UsageError as error:
        usage = error.ctx.command_path if error.ctx else "tahoefs"
        click.echo(f"{usage}: {error.format_message()} (see '{usage} --help')", err=True)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except click.ClickException as error:
        click.echo(f"tahoefs: {error.format_message()}", err=True)
        code = 1
    except BaseException as raised:
        code = _report(raised, debug="--debug" in argv)
    sys.exit(code if isinstance(code, int) else 0)


def _report(raised: BaseException, *, debug: bool) -> int:
    """Print one line for an error and return its exit code."""
    if isinstance(raised, SystemExit):
        return raised.code if isinstance(raised.code, int) else 1
    from tahoefs.failures import leaf_error

    error = leaf_error(raised)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if debug:
        import traceback

        traceback.print_exception(raised)
    click.echo(f"tahoefs: {str(error) or type(error).__name__}", err=True)
    if isinstance(code := getattr(error, "exit_code", None), int):
        return code
    from tahoefs.errnos import exit_code_of

    return exit_code_of(error)


if __name__ == "__main__":
    main()
