"""Puts into the disk cache what this mount itself brought to the grid: uploaded files, and directories it published.

It is read back without the grid by later mounts, too. A directory is kept before its publish counts as done; files one
after the other, behind their upload; when the mount ends, for FLUSH_TIMEOUT_S more. What does not get its turn is
fetched when it is read.

No locks: the queues are changed between awaits only. One task, `run`.
"""

from __future__ import annotations

import logging
from collections import deque
from functools import partial
from typing import Final

import trio

from cache.blocks import FACTS_NUMBER
from cache.disk_tier import BlockName, DiskTier
from cache.kept import Kept
from cache.publishing import Published
from cache.sealed import SealedFile
from cache.uploadables import SpoolUploadable
from grid.crypto import aes_ctr
from grid.formats.caps import Cap, CHKReadCap, DirectoryCap
from grid.formats.segments import div_ceil
from grid.nodes.dirnode import DirectoryContents
from grid.nodes.immutable import cache_secret_of
from grid.operations.worker import run_cpu_work

log = logging.getLogger(__name__)

FILES_MAX: Final = 1000  # uploaded files that wait; each holds on to its spool file meanwhile
FLUSH_TIMEOUT_S: Final = 5.0
KEEP_TIMEOUT_S: Final = 10.0  # for a listing to be written


class Keeper:
    def __init__(self, disk: DiskTier, kept: Kept) -> None:
        self._disk = disk
        self._kept = kept
        self._files: deque[tuple[SealedFile, CHKReadCap]] = deque()
        self._waiting = trio.Event()

    def note_file(self, sealed: SealedFile, cap: Cap) -> None:
        """It was uploaded as `cap`, and is complete."""
        if isinstance(cap, CHKReadCap) and len(self._files) < FILES_MAX and cap.size <= self._disk.limit_bytes // 4:
            self._files.append((sealed.retain(), cap))
            self._waiting.set()

    async def keep_directory(self, published: Published) -> None:
        """Return when it is kept: before that the journal must not forget what was published, or a process after
        this one would show, and change, a listing without it.
        """
        if isinstance(published.cap, DirectoryCap):
            contents = DirectoryContents(published.version or b"", published.entries)
            with trio.move_on_after(KEEP_TIMEOUT_S):
                await self._kept.note_directory(published.cap, contents, wait=True)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await self._waiting.wait()
                self._waiting = trio.Event()
                await self._keep_all()
        finally:
            with trio.move_on_after(FLUSH_TIMEOUT_S, shield=True):
                await self._keep_all()
            while self._files:
                self._files.popleft()[0].release()

    async def _keep_all(self) -> None:
        """What is cancelled meanwhile is still there for the next time."""
        while self._files:
            sealed, file = self._files[0]
            try:
                await self._keep_file(sealed, file)
            except OSError as error:
                log.warning("an uploaded file was not put into the cache: %s", error)
            self._files.popleft()
            sealed.release()

    async def _keep_file(self, sealed: SealedFile, cap: CHKReadCap) -> None:
        """Encrypted by segments, as it was for the upload."""
        segment_size = sealed.encoding.segment_size(cap.size)
        secret = cache_secret_of(cap)
        source = SpoolUploadable(sealed)
        try:
            for number in range(div_ceil(cap.size, segment_size)):
                await self._disk.room(segment_size)
                data = await run_cpu_work(partial(_encrypted, source, cap.key, number, segment_size), segment_size)
                self._disk.put(BlockName.of(secret, b"", number), segment_size, data)
            self._disk.put(BlockName.of(secret, b"", FACTS_NUMBER), segment_size, b"")
        finally:
            with trio.CancelScope(shield=True):  # lets go of a descriptor, waits for nothing
                await source.close()


def _encrypted(source: SpoolUploadable, key: bytes, number: int, segment_size: int) -> bytes:
    return aes_ctr(key, b"".join(source.read_sync(segment_size)), number * segment_size)
