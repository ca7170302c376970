"""The upload helper, from its client's side: one connection that is kept up, and what is asked over it.

    get_version              must have the "helper" key
    upload_chk(SI)           (results, nothing): the file is on the grid; (nothing, an object): hand it the ciphertext
    object.upload(reader)    answered with results when the file is stored; meanwhile the helper reads from `reader`

A helper that hangs keeps its TCP connection; so it is asked for its version now and then, and one that does not answer
loses the connection, and with it every upload that waits for it.
Source: Tahoe-LAFS 1.20's helper protocol.
"""

from __future__ import annotations

import logging
from typing import Final, NoReturn

import trio

from grid.errors import ConnectionLostError, PeerError, RemoteProtocolError
from grid.formats.furl import Furl
from grid.peers.reconnect import Reconnector, keep_connected
from grid.transports.tub import PendingCall, Referenceable, RemoteReference, Tub
from grid.wire.helper_results import HelperResults
from grid.wire.remote_interfaces import RIHelper, RIUploadHelper

log = logging.getLogger(__name__)

VERSION_KEY: Final = b"http://allmydata.org/tahoe/protocols/helper/v1"
UPLOAD_VERSION_KEY: Final = b"http://allmydata.org/tahoe/protocols/helper/chk-upload/v1"
VERSION_TIMEOUT_S: Final = 30.0
PROBE_S: Final = 20.0  # between questions whether it is still there
ASK_TIMEOUT_S: Final = 120.0  # upload_chk: the helper asks every server of the grid
MISTAKE_PAUSE_S: Final = 60.0  # after a mistake of ours


class HelperClient:
    """One helper. `run()` keeps it connected."""

    def __init__(self, furl: Furl, *, keepalive_s: float) -> None:
        self._furl = furl
        self._keepalive_s = keepalive_s
        self._reference: RemoteReference | None = None
        self._changed = trio.Event()
        self._tried = False
        self.last_failure: str | None = None

    @property
    def connected(self) -> bool:
        return self._reference is not None

    def __repr__(self) -> str:
        return f"<HelperClient {self._furl.tub_id[:8]}>"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Until cancelled. A mistake of ours costs the helper, not the grid."""
        task_status.started()
        while True:
            try:
                await self._stay_connected()
            except Exception:
                log.exception("%r failed", self)
            await trio.sleep(MISTAKE_PAUSE_S)

    async def _stay_connected(self) -> None:
        reconnector, dials = Reconnector(), trio.CapacityLimiter(1)
        backoff = reconnector.join()

        async def serve(_: Tub, reference: RemoteReference) -> None:
            try:
                while True:
                    version = await reference.call("get_version", timeout_s=VERSION_TIMEOUT_S)
                    if VERSION_KEY not in version:
                        raise RemoteProtocolError("what answers there is no helper")
                    if self._reference is None:
                        backoff.connected()
                        log.info("connected to the upload helper")
                        self._reference = reference
                        self._wake()
                    await trio.sleep(PROBE_S)
            finally:
                self._reference = None

        await keep_connected(
            self._furl,
            RIHelper,
            serve=serve,
            failed=self._failed,
            backoff=backoff,
            dials=dials,
            keepalive_s=self._keepalive_s,
        )

    def _failed(self, error: PeerError) -> None:
        self.last_failure = f"{type(error).__name__}: {error}"
        log.log(logging.DEBUG if self._tried else logging.WARNING, "upload helper: %s", error)
        self._wake()

    def _wake(self) -> None:
        self._tried = True
        self._changed.set()
        self._changed = trio.Event()

    async def wait_connected(self, timeout_s: float, *, first_try_only: bool = False) -> bool:
        """Whether it is connected within that time; with `first_try_only`, no later than the first try has failed."""
        with trio.move_on_after(timeout_s):
            while self._reference is None and not (first_try_only and self._tried):
                await self._changed.wait()
        return self.connected

    async def upload_chk(self, storage_index: bytes) -> HelperResults | RemoteReference:
        """Results when the file is on the grid already, else what to give the ciphertext to. Raises PeerError."""
        if self._reference is None:
            raise ConnectionLostError("not connected to the upload helper")
        answer, upload = await self._reference.call("upload_chk", storage_index, timeout_s=ASK_TIMEOUT_S)
        if isinstance(upload, RemoteReference) and upload.interface_name == RIUploadHelper.name:
            return upload
        return HelperResults.parse(answer)


def start_upload(upload: RemoteReference, reader: Referenceable) -> PendingCall:
    """The helper reads from `reader` until it has everything. The call's result is for HelperResults.parse()."""
    return upload.send("upload", reader)
