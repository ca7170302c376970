"""`tahoefs mount WHAT MOUNTPOINT [-o OPT[,OPT…]] [-f]`"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from tahoefs.cli import UserError, node_dir_option, warn
from tahoefs.mount_config import MountConfig, log_file
from tahoefs.mountpoint import prepare
from tahoefs.options import MountOptions, OptionError
from tahoefs.registry import absolute
from tahoefs.what import WhatError, resolve_what


@click.command("mount", short_help="mount a directory of a grid as a folder")
@click.argument("what")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("-o", "options", multiple=True, metavar="OPT[,OPT…]", help="Mount options, as ro,poll=2.")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the foreground and say what happens.")
@node_dir_option
@click.pass_context
def command(
    ctx: click.Context, what: str, mountpoint: Path, options: tuple[str, ...], foreground: bool, node_dir: Path
) -> None:
    """Mount WHAT (alias:, alias:path, local:DIR, @FILE, - or a cap) on the empty directory MOUNTPOINT.

    Returns once the folder lists; the mount then goes on in the background.
    """
    try:
        MountOptions.parse(options)
        target = resolve_what(what, node_dir, may_be_new=True)
    except (OptionError, WhatError) as error:
        raise UserError(str(error), 2) from None
    for text in target.warnings:
        warn(text)
    where = absolute(mountpoint)
    prepare(where)
    if target.local is not None:
        node_dir = _prepare_local(target.local)

    config = MountConfig(
        node_dir=str(node_dir.absolute()),
        cap=target.cap,
        path=target.path,
        label=target.label,
        mountpoint=str(where),
        options=options,
        local=str(target.local) if target.local is not None else None,
        debug=ctx.obj["debug"],
    )
    if foreground:
        _run_here(config)
    else:
        _run_behind(config)


def _prepare_local(directory: Path) -> Path:
    """Make the embedded grid's directories if they are missing; returns the node directory to use it with."""
    from tahoefs import local_grid

    local_grid.prepare(directory)
    return local_grid.client_directory(directory)


def _run_here(config: MountConfig) -> None:
    import trio

    from tahoefs import sdnotify
    from tahoefs.daemon import run_mount
    from tahoefs.limits import allow_open_files
    from tahoefs.logs import set_up_logging
    from tahoefs.progress import Progress

    def note(text: str) -> None:
        progress.clear()
        click.echo(text, err=True)
        sdnotify.notify(f"STATUS={text}")

    set_up_logging(None, debug=config.debug)
    allow_open_files()
    with Progress("sending") as progress:
        trio.run(run_mount, config, sdnotify.ready, note, progress.pending)


def _run_behind(config: MountConfig) -> None:
    """Start the daemon and wait for its word. The cap goes through a pipe: an argument list is public."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "tahoefs.daemon"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(config.to_json())
        child.stdin.close()
        line = child.stdout.readline()
    except KeyboardInterrupt:
        child.terminate()
        raise
    answer = json.loads(line) if line.strip() else {}
    if answer.get("ready"):
        return
    child.wait()
    raise UserError(
        answer.get("error") or f"the mount's daemon ended at once; see {log_file(config)}", answer.get("exit_code", 1)
    )
