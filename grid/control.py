"""The control interface: RIControlClient, for who holds a node's private/control.furl.

It can do what the node's user can: store and read local files, and measure. The FURL is new at every start.
Source: the control port of Tahoe-LAFS up to 1.16; file names are absolute, all texts are byte strings.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final

import trio

from grid.client import GridClient
from grid.errors import RemoteFailure
from grid.measure import Kind, ping, speed_test
from grid.operations.process import memory_usage
from grid.operations.uploadables import DataUploadable, FileUploadable
from grid.transports.tub import Referenceable
from grid.wire.remote_interfaces import RIControlClient
from grid.wire.schemas import RemoteInterface

CONNECTIONS_TIMEOUT_S: Final = 3600.0
LOOK_AGAIN_S: Final = 1.0
RANDOM_BYTES_MAX: Final = 64 << 20  # held in memory
MEMORY_TOLD: Final = ("VmPeak", "VmSize", "VmData")


class ControlClient(Referenceable):
    """RIControlClient over a client of the grid, which is joined when it is first needed."""

    remote_interface: ClassVar[RemoteInterface | None] = RIControlClient

    def __init__(self, client: Callable[[], Awaitable[GridClient]]) -> None:
        self._client = client

    async def remote_wait_for_client_connections(self, num_clients: int) -> None:
        broker = (await self._client()).broker
        with trio.move_on_after(CONNECTIONS_TIMEOUT_S):
            while True:
                if await broker.wait_for_servers(num_clients, CONNECTIONS_TIMEOUT_S) >= num_clients:
                    return
                await trio.sleep(LOOK_AGAIN_S)  # it returned early, since nobody else is expected
        raise RemoteFailure("builtins.TimeoutError", f"fewer than {num_clients} servers are connected")

    async def remote_upload_from_file_to_uri(self, filename: bytes, convergence: bytes | None) -> bytes:
        client = await self._client()
        uploadable = FileUploadable(_absolute(filename), convergence)
        return (await client.upload(uploadable)).uri.encode()

    async def remote_upload_random_data_from_file(self, size: int, convergence: bytes) -> bytes:
        if not 0 <= size <= RANDOM_BYTES_MAX:
            raise RemoteFailure("builtins.ValueError", f"at most {RANDOM_BYTES_MAX} bytes")
        client = await self._client()
        return (await client.upload(DataUploadable(secrets.token_bytes(size), convergence))).uri.encode()

    async def remote_download_from_uri_to_file(self, uri: bytes, filename: bytes) -> bytes:
        client = await self._client()
        path = _absolute(filename)
        with await trio.to_thread.run_sync(path.open, "wb") as file:
            await client.download(uri.decode("ascii", "replace"), _ToFile(file))
        return filename

    async def remote_download_to_tempfile_and_delete(self, uri: bytes) -> None:
        await (await self._client()).download(uri.decode("ascii", "replace"), _ToFile(None))

    async def remote_get_memory_usage(self) -> dict[bytes, int]:
        told = memory_usage()
        return {name.encode(): told.get(name, 0) for name in MEMORY_TOLD}

    async def remote_speed_test(self, count: int, size: int, mutable: Any) -> tuple[float, float]:
        kinds: dict[Any, Kind] = {False: "immutable", b"create": "create", b"upload": "upload"}
        if isinstance(mutable, str):
            mutable = mutable.encode()
        if not isinstance(mutable, bool | bytes) or mutable not in kinds:
            raise RemoteFailure("builtins.ValueError", "mutable is False, 'create' or 'upload'")
        try:
            speed = await speed_test(await self._client(), count=count, size=size, kind=kinds[mutable])
        except ValueError as error:
            raise RemoteFailure("builtins.ValueError", str(error)) from None
        return speed.upload_s, speed.download_s

    async def remote_measure_peer_response_time(self) -> dict[bytes, float]:
        broker = (await self._client()).broker
        found = await ping([server for server in broker.get_known_servers() if server.connected])
        return {each.server_id.encode(): sum(each.seconds) / len(each.seconds) for each in found if each.seconds}


def _absolute(filename: bytes) -> Path:
    path = Path(filename.decode("utf-8", "surrogateescape"))
    if not path.is_absolute():
        raise RemoteFailure("builtins.ValueError", "file names are absolute")
    return path


class _ToFile:
    """IDownloadTarget. With no file the bytes are verified and let go."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file

    def open(self, size: int) -> None: ...

    async def write(self, data: bytes | memoryview) -> None:
        if self._file is not None:
            await trio.to_thread.run_sync(self._file.write, data)

    def close(self) -> None: ...

    def fail(self, why: Exception) -> None: ...

    def register_canceller(self, cb: Any) -> None: ...

    def finish(self) -> None: ...
