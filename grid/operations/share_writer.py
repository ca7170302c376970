"""Lays out one CHK share through an IBucketWriter, in few writes.

    header | blocks … | plaintext hashes (zeros) | ciphertext hashes | block hashes | share hashes | length, UEB

The parts come in this order, so they are gathered and sent as one contiguous stream in pieces of about
WRITE_BYTES: a share smaller than that is a single write. The dead plaintext region is written too, since a
server reached over HTTP takes a share for complete only when every byte of it was written.
Source: the CHK share layout, as Tahoe-LAFS 1.20 writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from grid.formats import chk_share
from grid.formats.chk_share import ShareLayout
from grid.interfaces import IBucketWriter, IStorageServer

WRITE_BYTES: Final = 1 << 20  # a write is sent when it has become this large, or with the end of the share
HASH_BYTES: Final = 32


class ShareWriter:
    """IStorageBucketWriter. `writer` is None for a share that is only computed and not sent."""

    def __init__(self, layout: ShareLayout, share_number: int, server: IStorageServer, writer: IBucketWriter) -> None:
        self.share_number = share_number
        self.server_id = server.server_id
        self.server_name = server.name
        self._layout = layout
        self._writer = writer
        self._offset = 0  # where `_pending` begins in the share
        self._pending: list[bytes | memoryview] = [layout.pack_header()]
        self._pending_bytes = len(self._pending[0])

    async def put_block(self, segmentnum: int, data: bytes | memoryview) -> None:
        self._expect(self._layout.data + segmentnum * self._layout.block_size)
        await self._put(data)

    async def put_plaintext_hashes(self, hashes: Sequence[bytes]) -> None:
        self._expect(self._layout.plaintext_hashes)
        await self._put(bytes(HASH_BYTES * len(hashes)))

    async def put_crypttext_hashes(self, hashes: Sequence[bytes]) -> None:
        self._expect(self._layout.crypttext_hashes)
        await self._put(b"".join(hashes))

    async def put_block_hashes(self, blockhashes: Sequence[bytes]) -> None:
        self._expect(self._layout.block_hashes)
        await self._put(b"".join(blockhashes))

    async def put_share_hashes(self, sharehashes: Sequence[tuple[int, bytes]]) -> None:
        self._expect(self._layout.share_hashes)
        await self._put(chk_share.pack_share_hashes(list(sharehashes)))

    async def put_uri_extension(self, data: bytes) -> None:
        self._expect(self._layout.ueb)
        await self._put(self._layout.pack_ueb_size(len(data)) + data)

    async def close(self) -> None:
        await self._flush()
        await self._writer.close()

    async def abort(self) -> None:
        self._pending.clear()
        await self._writer.abort()

    def _expect(self, offset: int) -> None:
        if offset != self._offset + self._pending_bytes:
            raise ValueError(f"part of a share at {offset}, expected {self._offset + self._pending_bytes}")

    async def _put(self, data: bytes | memoryview) -> None:
        self._pending.append(data)
        self._pending_bytes += len(data)
        if self._pending_bytes >= WRITE_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        if not self._pending_bytes:
            return
        data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
        offset = self._offset
        self._offset, self._pending, self._pending_bytes = offset + len(data), [], 0
        await self._writer.write(offset, data)
