"""One mount, from a cap to a folder and back: joins the grid, serves FUSE and the control socket, drains, ends.

    node directory → grid → root directory → workspace → vfs → FUSE
                                                 └→ control socket (`mount_control.py`)

Run by `tahoefs mount`: in the same process with `-f`, else as a child (`python -m tahoefs.daemon`) that gets its
MountConfig on standard input (a cap must not stand in an argument list) and says on standard output, in
one line of JSON, that the folder works or why it does not.

The end comes from the kernel (unmounted), or from SIGTERM or SIGINT: then the folder is unmounted, what is unsent is
sent, and the process ends. A second signal ends it at once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio
from attrs import evolve

import grid
from cache import (
    DiskTier,
    Workspace,
    WorkspaceOptions,
    kept_directory,
    open_disk,
    open_workspace,
    read_directory,
)
from grid.client import METRICS as client_metrics
from grid.errors import GridError, GridUnreachableError, NoSuchChildError, NotEnoughSharesError, WrongKindError
from grid.formats.directory import normalize_name
from grid.node_files import node_identity
from grid.operations import process
from grid.operations.process import ProcessStats
from grid.peers.stats_gatherer import provide_stats
from grid.stats import Registry
from tahoefs import fuse, local_grid
from tahoefs.control import serve_control
from tahoefs.errnos import exit_code_of
from tahoefs.exposition import stats_command
from tahoefs.failures import leaf_error
from tahoefs.lease_keeper import LeaseKeeper
from tahoefs.limits import allow_open_files
from tahoefs.logs import set_up_logging
from tahoefs.metrics_endpoint import serve_metrics
from tahoefs.mount_config import MountConfig, log_file
from tahoefs.mount_control import MountControl, telling
from tahoefs.mount_stats import METRICS as mount_metrics
from tahoefs.mount_stats import MountStats
from tahoefs.options import MountOptions
from tahoefs.progress import in_words
from tahoefs.registry import registered
from tahoefs.vfs import VFS, grid_free_bytes

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 30.0  # for enough servers to answer at start
CONNECT_CACHED_TIMEOUT_S: Final = 5.0  # the same when the root can be listed without any
ROOT_TIMEOUT_S: Final = 60.0  # for reading the root directory, and the way down to a sub-path
READY_TIMEOUT_S: Final = 10.0  # for the kernel to answer a listing of the new mount
RETRY_S: Final = 0.5  # between tries to send the rest; each takes its time
CONFIG_BYTES_MAX: Final = 1 << 20


Show = Callable[[dict[str, Any]], None]


async def run_mount(
    config: MountConfig,
    ready: Callable[[], None],
    note: Callable[[str], None] = log.info,
    show: Show = lambda pending: None,
) -> None:
    """Mount, call `ready` once the folder lists, serve until unmounted or told to stop, drain.

    `note` is told what happens; `show`, while it drains, the `pending` object of the status, now and then. Raises
    whatever made the mount impossible (nothing is left mounted), UnsentError on a second signal.
    """
    if config.local is None:
        await _mount(config, ready, note, show)
    else:
        note("starting the local grid")
        async with local_grid.attached(Path(config.local)):
            await _mount(config, ready, note, show)


async def _mount(config: MountConfig, ready: Callable[[], None], note: Callable[[str], None], show: Show) -> None:
    options = MountOptions.parse(config.options)
    node = grid.NodeDirectory.open(Path(config.node_dir))
    async with grid.join_grid(node) as client:
        note("waiting for storage servers")
        if config.local is not None:
            config = evolve(config, cap=await local_grid.root_cap(Path(config.local), client))
        settings = WorkspaceOptions(
            nickname=node.nickname,
            cache_bytes=options.cache_size,
            journal_bytes=options.journal_size,
            durability=options.durability,
            mutable=options.mutable,
            poll_s=options.poll_s,
            convergent=options.convergence == "node",
            read_only=options.read_only,
        )
        state_dir = node.path / "tahoefs"
        cache_dir = (options.cache_dir or node.path) / "tahoefs" / "cache"
        async with open_disk(cache_dir, options.cache_size) as disk:
            *above, root = await _find_root(client, config, disk)
            async with open_workspace(
                client, root, state_dir=state_dir, options=settings, disk=disk, above=above
            ) as workspace:
                with trio.fail_after(ROOT_TIMEOUT_S):
                    await workspace.load(workspace.root, None)
                await _serve(config, options, client, workspace, ready, note, show)


async def _serve(
    config: MountConfig,
    options: MountOptions,
    client: grid.GridClient,
    workspace: Workspace,
    ready: Callable[[], None],
    note: Callable[[str], None],
    show: Show,
) -> None:
    where = Path(config.mountpoint)
    keeper = LeaseKeeper.open(client, workspace.root.cap, options.lease_renew_s)
    k, _, n = client.node.encoding
    vfs = VFS(workspace, options=options, free_bytes=lambda: grid_free_bytes(client.broker.get_known_servers(), k, n))
    control = MountControl(config, client, workspace, vfs, keeper)
    registry = _statistics(client, control, vfs)
    commands = control.commands() | {"stats": stats_command(registry, config.label)}
    with registered(Path(config.node_dir), where) as socket_path:
        async with trio.open_nursery() as services:
            await services.start(serve_control, socket_path, commands)
            if options.metrics_port is not None:
                await services.start(serve_metrics, options.metrics_port, registry)
            if (gatherer := client.node.stats_gatherer) is not None:
                identity = node_identity(client.node.path / "private" / "node.pem")
                provide = partial(provide_stats, keepalive_s=client.node.keepalive_s)
                services.start_soon(provide, gatherer, registry, client.node.nickname, identity)
            stop = trio.Event()
            abandon = trio.CancelScope()
            services.start_soon(_watch_signals, stop, abandon, note)
            async with trio.open_nursery() as mounted:
                unmounted = trio.Event()

                async def serve_fuse(*, task_status: trio.TaskStatus[None]) -> None:
                    try:
                        await fuse.serve(vfs, where, options, config.label, task_status=task_status)
                    finally:
                        unmounted.set()

                await mounted.start(serve_fuse)
                with trio.fail_after(READY_TIMEOUT_S):
                    await trio.to_thread.run_sync(os.listdir, where, abandon_on_cancel=True)
                ready()
                note(f"{config.label} is mounted on {where}")
                mounted.start_soon(_cancel_when, stop, mounted.cancel_scope)
                if keeper is not None:
                    mounted.start_soon(keeper.run)
                await unmounted.wait()
                mounted.cancel_scope.cancel()
            control.state = "draining"
            services.start_soon(_cancel_when, control.detached, abandon)
            with abandon:
                await _drain(workspace, note, show)
            services.cancel_scope.cancel()
            if abandon.cancelled_caught:
                _say_what_is_left(control, note)


def _statistics(client: grid.GridClient, control: MountControl, vfs: VFS) -> Registry:
    registry = Registry()
    registry.register(ProcessStats(), process.METRICS)
    registry.register(client, client_metrics)
    registry.register(MountStats(control.status, lambda: (vfs.faults, vfs.timeouts)), mount_metrics)
    return registry


def _say_what_is_left(control: MountControl, note: Callable[[str], None]) -> None:
    """Raises UnsentError unless that was asked for, and nothing is lost by it."""
    left = control.unsent(
        "stopped before this was sent: {}; it is in the journal, and is sent by the next mount"
        if control.durable
        else "stopped before this was sent, so it is lost: {}"
    )
    if not (control.durable and control.detached.is_set()):
        raise left
    note(str(left))


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


async def _watch_signals(stop: trio.Event, abandon: trio.CancelScope, note: Callable[[str], None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            if stop.is_set():
                abandon.cancel()
            else:
                note("stopping: what is unsent is being sent first; once more (Ctrl-C, SIGTERM) stops at once")
            stop.set()


async def _drain(workspace: Workspace, note: Callable[[str], None], show: Show) -> None:
    """Send everything; tries for as long as it takes. Telling it to give up is the caller's right."""

    async def tell(pending: dict[str, Any]) -> None:
        show(pending)

    pending = workspace.status()["pending"]
    if any(pending.values()):
        note(f"sending {in_words(pending)}")
    async with telling(workspace, tell):
        while True:
            try:
                await workspace.drain()
            except GridError as error:
                note(f"not sent yet: {error}")
                await trio.sleep(RETRY_S)
            else:
                return


async def _find_root(client: grid.GridClient, config: MountConfig, disk: DiskTier | None) -> list[grid.DirectoryCap]:
    """The cap of the directory to show, after those above it, by listings kept on the disk if the grid has none for us.

    Raises BadCapError, WrongKindError, GridUnreachableError, …
    """
    cap: grid.Cap = grid.parse_known_cap(config.cap)
    _, happy, _ = client.node.encoding
    line: list[grid.DirectoryCap] = []
    connected = 0
    if cap.storage_index is not None:
        is_kept = isinstance(cap, grid.DirectoryCap) and await kept_directory(client, cap, disk) is not None
        timeout_s = CONNECT_CACHED_TIMEOUT_S if is_kept else CONNECT_TIMEOUT_S
        connected = await client.broker.wait_for_servers(happy, timeout_s)
    try:
        with trio.fail_after(ROOT_TIMEOUT_S):
            for part in config.path:
                if not isinstance(cap, grid.DirectoryCap):
                    raise WrongKindError(f"{config.label}: a part of the path is not a directory")
                entry = (await read_directory(client, cap, disk)).entries.get(normalize_name(part))
                if entry is None:
                    raise NoSuchChildError(part)
                line.append(cap)
                cap = entry.cap
            if not isinstance(cap, grid.DirectoryCap) or cap.is_verifier:
                raise WrongKindError(f"{config.label} is not a directory, so it cannot be mounted")
            await read_directory(client, cap, disk)
    except (NotEnoughSharesError, trio.TooSlowError) as error:
        if connected < happy:
            raise GridUnreachableError(
                f"only {connected} storage servers could be reached, too few to read {config.label}: "
                "check the network, the introducer and the servers"
            ) from error
        raise
    return [*line, cap]


# --- the child process -------------------------------------------------------------------------------------


def main() -> int:
    """The background daemon. See the module's docstring for how its parent talks to it."""
    config = MountConfig.from_json(sys.stdin.read(CONFIG_BYTES_MAX))
    answered = False

    def answer(message: dict[str, Any]) -> None:
        nonlocal answered
        if answered:
            return
        answered = True
        with contextlib.suppress(OSError):
            print(json.dumps(message), flush=True)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # from here on nobody listens: a daemon holds no terminal
            os.dup2(null, descriptor)
        os.close(null)

    try:
        set_up_logging(log_file(config), debug=config.debug)
    except OSError as refused:
        answer({"error": f"cannot log to {log_file(config)}: {refused.strerror}; is the place yours?", "exit_code": 1})
        return 1
    allow_open_files()
    try:
        trio.run(run_mount, config, lambda: answer({"ready": True}))
    except BaseException as raised:
        error = leaf_error(raised)
        code = exit_code_of(error)
        log.error("mount of %s ended: %s", config.label, error, exc_info=raised if code == 1 else None)
        answer({"error": str(error) or type(error).__name__, "exit_code": code})
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
