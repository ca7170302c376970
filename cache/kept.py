"""What is remembered of things that change, on the disk beside the blocks: to list and to read without the grid.

    a directory       its latest listing that was seen: version length u8 | version | salt 16 | ciphertext of the
                      listing as it stands in the directory's file (in which children's write caps are encrypted
                      once more), AES-128-CTR under a key that follows from the directory's read key and the salt
    a mutable file    the signed part of the header of its latest version that was seen; the bytes are blocks

The grid is asked first. What is kept answers when the grid cannot: a listing also when the grid takes too long or the
directory cannot be recovered just now, a mutable file's version only while the grid is offline.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any, Final

import trio

from cache.connectivity import Connectivity
from cache.disk_tier import BlockName, DiskTier
from grid.crypto import KEY_BYTES, aes_ctr
from grid.errors import GridError, GridUnreachableError
from grid.formats.caps import Cap, CHKReadCap, DirectoryCap, MDMFReadCap, SDMFReadCap
from grid.formats.directory import pack_directory, unpack_directory
from grid.formats.hashutil import tagged_hash
from grid.interfaces import IReadableSnapshot
from grid.nodes.dirnode import PARSE_COST, DirectoryContents
from grid.operations.retrieve import MutableVersion
from grid.operations.worker import run_cpu_work

log = logging.getLogger(__name__)

PATIENCE_S: Final = 6.0  # with the grid, when a listing is kept; within the VFS's for a first listing
LISTING_NUMBER: Final = 1 << 63  # of the "block" that is a directory's listing
VERSION_NUMBER: Final = LISTING_NUMBER + 1  # and of a mutable file's version
SALT_BYTES: Final = 16

_SECRET_TAG: Final = b"tahoefs_kept_secret_v1"
_KEY_TAG: Final = b"tahoefs_kept_listing_key_v1"


class Kept:
    def __init__(self, client: Any, disk: DiskTier | None, connectivity: Connectivity) -> None:
        self._client = client
        self._disk = disk
        self._connectivity = connectivity

    # --- directories

    async def read_directory(self, cap: DirectoryCap) -> tuple[DirectoryContents, bool]:
        """The listing, and whether it is what the grid has now. Raises GridError when there is none."""
        kept = await self._get(cap, LISTING_NUMBER)
        try:
            with trio.fail_after(float("inf") if kept is None else PATIENCE_S):
                contents = await self.ask_directory(cap, None if kept is None else _version(kept))
        except (GridError, trio.TooSlowError) as error:
            if kept is None:
                raise
            log.info("a directory's listing is an old one: %s", error or "the grid takes too long")
            return await self._unpack(cap, kept), False
        return contents, True

    async def ask_directory(self, cap: DirectoryCap, known: bytes | None = None) -> DirectoryContents:
        """What the grid has now; kept unless it is the version `known`. Raises GridError."""
        node = self._client.create_node_from_uri(cap)
        contents: DirectoryContents
        if cap.storage_index is None:
            contents = await node.read()
            return contents
        contents = await self._connectivity.reach(node.read)
        if contents.version != known:
            await self.note_directory(cap, contents)
        return contents

    async def kept_directory(self, cap: DirectoryCap) -> DirectoryContents | None:
        """The listing as it was seen last, without asking the grid."""
        kept = await self._get(cap, LISTING_NUMBER)
        return None if kept is None else await self._unpack(cap, kept)

    async def kept_version(self, cap: DirectoryCap) -> bytes | None:
        """Which version of the listing was seen last."""
        kept = await self._get(cap, LISTING_NUMBER)
        return None if kept is None else _version(kept)

    async def note_directory(self, cap: DirectoryCap, contents: DirectoryContents, *, wait: bool = False) -> None:
        """This was seen on the grid, or put there. `wait`: until it survives the end of this process."""
        key = read_key(cap)
        if self._disk is None or key is None:
            return
        writekey = getattr(cap.file, "writekey", None)
        size = sum(len(entry.raw or b"") for entry in contents.entries.values())
        payload = await run_cpu_work(lambda: _pack(contents, key, writekey), size)
        name = _name(key, LISTING_NUMBER)
        if not self._disk.put(name, 1, payload):
            self._disk.put(name, 1, b"")  # better none than an older one
        if wait:
            await self._disk.written(name)

    async def _unpack(self, cap: DirectoryCap, kept: memoryview) -> DirectoryContents:
        key, version = read_key(cap), _version(kept)
        assert key is not None
        writekey = getattr(cap.file, "writekey", None)

        def unpack() -> DirectoryContents:
            start = 1 + len(version) + SALT_BYTES
            data = aes_ctr(_listing_key(key, bytes(kept[start - SALT_BYTES : start])), kept[start:])
            return DirectoryContents(version, unpack_directory(data, mutable=cap.is_mutable, writekey=writekey))

        return await run_cpu_work(unpack, len(kept) * PARSE_COST)

    # --- mutable files

    async def open_file(self, cap: Cap) -> IReadableSnapshot:
        """What the file holds now. Raises GridError."""
        node = self._client.create_node_from_uri(cap)
        if not cap.is_mutable:
            unchanging: IReadableSnapshot = await node.open_snapshot()  # asks nobody
            return unchanging
        snapshot: MutableVersion
        try:
            snapshot = await self._connectivity.reach(node.open_snapshot)
        except GridUnreachableError:
            if (kept := await self._get(cap, VERSION_NUMBER)) is None:
                raise
            snapshot = node.version_of_prefix(bytes(kept))
            return snapshot
        key = read_key(cap)
        if self._disk is not None and key is not None:
            self._disk.put(_name(key, VERSION_NUMBER), 1, snapshot.header.signed_prefix)
        return snapshot

    async def _get(self, cap: Cap, number: int) -> memoryview | None:
        key = read_key(cap)
        if self._disk is None or key is None:
            return None
        record = await self._disk.get(_name(key, number))
        return None if record is None or not record.payload else record.payload


async def read_directory(client: Any, cap: DirectoryCap, disk: DiskTier | None) -> DirectoryContents:
    """A listing before there is a workspace: from the grid, else as it was seen last. Raises GridError."""
    contents, _ = await _before_mount(client, disk).read_directory(cap)
    return contents


async def kept_directory(client: Any, cap: DirectoryCap, disk: DiskTier | None) -> DirectoryContents | None:
    """A listing as it was seen last, without asking the grid."""
    return await _before_mount(client, disk).kept_directory(cap)


def _before_mount(client: Any, disk: DiskTier | None) -> Kept:
    return Kept(client, disk, Connectivity(client.broker, 1))


def listing_name(cap: DirectoryCap) -> BlockName | None:
    """Under which the directory's listing is kept; None when all of it stands in the cap."""
    key = read_key(cap)
    return None if key is None else _name(key, LISTING_NUMBER)


def version_name(cap: Cap) -> BlockName | None:
    """The same of a mutable file's version."""
    key = read_key(cap)
    return None if key is None else _name(key, VERSION_NUMBER)


def read_key(cap: Cap) -> bytes | None:
    """What every cap that can read it can tell; None when nothing of it is on the grid."""
    file = cap.file.readonly if isinstance(cap, DirectoryCap) else cap.readonly
    match file:
        case CHKReadCap(key):
            return key
        case SDMFReadCap() | MDMFReadCap():
            return file.readkey
    return None


def _name(key: bytes, number: int) -> BlockName:
    return BlockName.of(tagged_hash(_SECRET_TAG, key), b"", number)


def _listing_key(key: bytes, salt: bytes) -> bytes:
    return tagged_hash(_KEY_TAG, key + salt)[:KEY_BYTES]


def _version(kept: memoryview) -> bytes:
    """Of a listing that is kept. It was made by us: it has proven that."""
    return bytes(kept[1 : 1 + kept[0]])


def _pack(contents: DirectoryContents, key: bytes, writekey: bytes | None) -> bytes:
    entries = contents.entries.values()
    raw = [entry.raw for entry in entries if entry.raw is not None]
    # of a directory we made ourselves nothing was read yet
    data = b"".join(raw) if len(raw) == len(entries) else pack_directory(entries, writekey=writekey)
    salt = secrets.token_bytes(SALT_BYTES)
    return bytes([len(contents.version)]) + contents.version + salt + aes_ctr(_listing_key(key, salt), data)
