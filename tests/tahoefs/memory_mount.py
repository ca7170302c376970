"""A process that mounts the VFS over the twin in memory: `python -m tests.tahoefs.memory_mount DIR [-o OPTIONS]`.

Says "ready" on standard output once the kernel answers; ends when unmounted or on SIGTERM, with a line of JSON that
counts faults, and bytes pushed into the page cache. Names that begin with `fault-` or `hang-` make their lookup raise,
or never answer. The root holds:

    dir-immutable/file    dir-readonly/file    mutable.txt    mutable-readonly.txt    unknown    literal.txt

With `--real` the workspace is the real one, over storage servers in memory, and empty; the line at the end then holds
under "tree" what another client finds on that grid: {path: contents' SHA-256, or null for directories}. On SIGHUP it
sends everything and mounts anew what the grid then has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from cache import Directory, Workspace, WorkspaceOptions, open_disk, open_workspace
from grid.formats.caps import DirectoryCap, LiteralCap, SDMFReadCap, SDMFWriteCap, UnknownCap
from tahoefs import fuse
from tahoefs.interfaces import IWorkspace
from tahoefs.options import MountOptions
from tahoefs.pushing import PUSHED_BYTES
from tahoefs.targets import is_directory
from tahoefs.vfs import VFS, Stat
from tests.cache.memory_client import memory_client
from tests.tahoefs.memory_workspace import MemoryDirectory, MemoryWorkspace, pages_of

DRAIN_TIMEOUT_S = 60
FINGERPRINT = bytes(32)
IMMUTABLE_DIRECTORY = DirectoryCap(LiteralCap(b"an immutable directory"))
READONLY_DIRECTORY = DirectoryCap(SDMFReadCap(b"r" * 16, FINGERPRINT))
MUTABLE_FILE = SDMFWriteCap(b"w" * 16, FINGERPRINT)
READONLY_MUTABLE_FILE = SDMFReadCap(b"o" * 16, FINGERPRINT)


def scenario(*, readonly: bool = False) -> MemoryWorkspace:
    workspace = MemoryWorkspace(MemoryDirectory(readonly=readonly), readonly=readonly)
    for name, cap, directory in (
        ("dir-immutable", IMMUTABLE_DIRECTORY, MemoryDirectory(IMMUTABLE_DIRECTORY, readonly=True, immutable=True)),
        ("dir-readonly", READONLY_DIRECTORY, MemoryDirectory(READONLY_DIRECTORY, readonly=True)),
    ):
        directory.put("file", LiteralCap(b"not to be changed\n"))
        workspace.directories[cap] = directory
        workspace.root.put(name, cap)
    workspace.files[MUTABLE_FILE] = pages_of(b"first\n")
    workspace.files[READONLY_MUTABLE_FILE] = pages_of(b"only to read\n")
    workspace.root.put("mutable.txt", MUTABLE_FILE, {"foreign": [1, 2]})
    workspace.root.put("mutable-readonly.txt", READONLY_MUTABLE_FILE)
    workspace.root.put("unknown", UnknownCap(None, "ro.x-future:cap", None))
    workspace.root.put("literal.txt", LiteralCap(b"literal\n"), {"tahoe": {"linkmotime": 1234567890.5}})
    return workspace


class FaultyVFS(VFS):
    async def lookup(self, parent_number: int, raw: bytes) -> Stat:
        if raw.startswith(b"fault-"):
            raise ValueError("a bug, made for a test")
        if raw.startswith(b"hang-"):
            await trio.sleep_forever()
        return await super().lookup(parent_number, raw)


async def run(mountpoint: str, options: MountOptions, workspace: MemoryWorkspace) -> None:
    counts, _ = await serve_until_told(mountpoint, options, workspace)
    print(json.dumps({**counts, "calls": workspace.calls}), flush=True)


async def run_real(mountpoint: str, options: MountOptions) -> None:
    settings = WorkspaceOptions(
        poll_s=options.poll_s, durability=options.durability, settle_s=0.05, publish_quiet_s=0.05
    )
    with tempfile.TemporaryDirectory() as state:
        async with memory_client() as (client, root), open_disk(Path(state) / "cache", settings.cache_bytes) as disk:
            counts, again = Counter[str](), True
            while again:
                async with open_workspace(
                    client, root, state_dir=Path(state), options=settings, disk=disk
                ) as workspace:
                    told, again = await serve_until_told(mountpoint, options, workspace)
                    with trio.fail_after(DRAIN_TIMEOUT_S):
                        await workspace.drain()
                counts.update(told)
            async with open_workspace(client, root, state_dir=Path(state), options=settings) as another:
                tree = {path: digest async for path, digest in walk(another, another.root, "")}
    print(json.dumps({**counts, "tree": tree}), flush=True)


async def walk(workspace: Workspace, directory: Directory, above: str) -> AsyncIterator[tuple[str, str | None]]:
    """Everything below `directory`: (path, SHA-256 of a file's contents)."""
    await workspace.load(directory, None)
    for name, entry in directory.entries().items():
        path = f"{above}{name}"
        if is_directory(entry.target):
            yield path, None
            async for found in walk(workspace, workspace.directory(entry.target), f"{path}/"):
                yield found
        else:
            contents = await workspace.open_contents(entry.target)
            yield path, hashlib.sha256(await contents.read(0, contents.size)).hexdigest()
            contents.close()


async def serve_until_told(
    mountpoint: str, options: MountOptions, workspace: IWorkspace
) -> tuple[dict[str, int], bool]:
    """What is counted at the end, and whether to mount again."""
    again, pushed = False, PUSHED_BYTES.value
    vfs = FaultyVFS(workspace, options=options)
    async with trio.open_nursery() as nursery:

        async def serve(*, task_status: trio.TaskStatus[None]) -> None:
            await fuse.serve(vfs, mountpoint, options, "memory:test,label", task_status=task_status)
            nursery.cancel_scope.cancel()

        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
            await nursery.start(serve)
            print("ready", flush=True)
            async for number in signals:
                again = number == signal.SIGHUP
                nursery.cancel_scope.cancel()
    counts = {"faults": vfs.faults, "timeouts": vfs.timeouts, "inodes": len(vfs.table), "handles": len(vfs.handles)}
    counts["pushed"] = int(PUSHED_BYTES.value - pushed)
    return counts, again


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("-o", dest="options", default="")
    parser.add_argument("--ro-root", action="store_true")
    parser.add_argument("--profile")
    parser.add_argument("--real", action="store_true")
    arguments = parser.parse_args()
    os.umask(0o022)
    options = MountOptions.parse([arguments.options])
    workspace = scenario(readonly=arguments.ro_root)
    if arguments.real:
        trio.run(run_real, arguments.mountpoint, options)
    elif arguments.profile:
        import cProfile

        with cProfile.Profile() as profile:
            trio.run(run, arguments.mountpoint, options, workspace)
        profile.dump_stats(arguments.profile)
    else:
        trio.run(run, arguments.mountpoint, options, workspace)


if __name__ == "__main__":
    main()
    sys.exit(0)
