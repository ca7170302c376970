"""The upload helper: fetches ciphertext from clients with thin uplinks, and stores it on the grid for them.

    upload_chk(SI)      on the grid, whole → results; else an object for this upload
    upload(reader)      fetch what is not held yet → encode, place, push → results

It never sees a key. All clients that upload one storage index share one run: it reads from the first of them, and from
the next when that one is lost. A run belongs to the helper, not to a connection; what was fetched stays on the disk
(helper_files.py) when it fails, and the next one goes on there.

Nothing proves that ciphertext belongs to its storage index: who knows a storage index can give a helper, as any storage
server, other bytes for it. Clients of ours compute what the cap must be and find out.
Source: Tahoe-LAFS 1.20's helper protocol; bounds are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import trio
from attrs import define, field

from grid.errors import GridError, PeerError, RemoteFailure, RemoteProtocolError, Violation, short_si
from grid.formats.base32 import b2a
from grid.formats.cap_kinds import CHKVerifyCap
from grid.formats.ueb import SEGMENT_BYTES_MAX, SEGMENTS_MAX, SHARES_MAX, read_unproven
from grid.interfaces import EncodingParameters, IStorageBroker
from grid.operations.find_stored import StoredFile, find_stored
from grid.operations.leases import Secrets
from grid.operations.upload import Uploader
from grid.peers.deadlines import with_data
from grid.peers.helper import UPLOAD_VERSION_KEY, VERSION_KEY
from grid.server.helper_files import CiphertextFile, HelperFiles, Partial
from grid.stats import Metric
from grid.transports.tub import Referenceable, RemoteReference
from grid.wire.failures import Copyable
from grid.wire.helper_results import results_to_send
from grid.wire.remote_interfaces import RIHelper, RIUploadHelper
from grid.wire.schemas import RemoteInterface

log = logging.getLogger(__name__)

APPLICATION_VERSION: Final = b"tahoe-lafs/1.20.0"  # what peers know; they look at the key above, not at this
METRICS: Final = (
    Metric("helper_uploads", "gauge", "Uploads this helper was asked for, under way or waiting."),
    Metric("helper_fetched_bytes", "counter", "Bytes of ciphertext this helper got from clients."),
    Metric("helper_files", "counter", "Files this helper stored."),
    Metric("helper_files_found", "counter", "Files this helper was asked for that were on the grid already."),
)
STORAGE_INDEX_BYTES: Final = 16
READ_BYTES: Final = 128 << 10  # one read_encrypted; what is lost when the connection is
READ_TIMEOUT_S: Final = 120.0  # and more for the bytes asked for
QUESTION_TIMEOUT_S: Final = 60.0
CLOSE_TIMEOUT_S: Final = 10.0
LEASE_TIMEOUT_S: Final = 15.0
UPLOADS_MAX: Final = 1000  # runs, most of them waiting
FETCHES_AT_ONCE: Final = 128  # each costs READ_BYTES, and its client's line
STORED_AT_ONCE: Final = 8  # each costs a few segments with all their shares
CHECKS_AT_ONCE: Final = 16  # searches of the grid for what is there already
SERVERS_MAX: Final = 2000
SERVERS_TIMEOUT_S: Final = 20.0  # at the start: for all servers there are
READERS_MAX: Final = 64  # clients of one run
FILE_BYTES_MAX: Final = 1 << 40
LOST_TYPE: Final = "foolscap.ipb.DeadReferenceError"  # an uploader that hears this may try again


@define(eq=False)
class _Run:
    """One upload, from the first client that asked for it."""

    storage_index: bytes = field(repr=False)
    readers: list[RemoteReference] = field(factory=list)  # the first one is read from
    done: trio.Event = field(factory=trio.Event)
    results: Copyable | None = None
    error: tuple[str, str] | None = None  # type name and text for those who wait
    size: int | None = None  # bytes, as the first reader said
    fetched: int = 0  # bytes, in this run
    timings: dict[str, float] = field(factory=dict)  # seconds


class Helper(Referenceable):
    """RIHelper, to be registered under the helper's swissnum. `run()` does the work."""

    remote_interface: ClassVar[RemoteInterface | None] = RIHelper

    def __init__(self, files: HelperFiles, broker: IStorageBroker, uploader: Uploader, secrets: Secrets) -> None:
        self.fetched_bytes = 0
        self.stored = 0  # files
        self.found = 0  # files that were on the grid already
        self._files = files
        self._broker = broker
        self._uploader = uploader
        self._secrets = secrets
        self._runs: dict[bytes, _Run] = {}  # by storage index
        self._fetching = trio.CapacityLimiter(FETCHES_AT_ONCE)
        self._storing = trio.CapacityLimiter(STORED_AT_ONCE)
        self._checks = trio.CapacityLimiter(CHECKS_AT_ONCE)
        self._servers_known = trio.Event()  # before that "no server has it" means nothing
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled, or stop()."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._broker.wait_for_servers(SERVERS_MAX, SERVERS_TIMEOUT_S)
                self._servers_known.set()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    def stop(self) -> None:
        """Tell everybody who waits that they are to come back later, and end."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    @property
    def uploads(self) -> int:
        """Under way, and waiting."""
        return len(self._runs)

    # --- calls

    async def remote_get_version(self) -> dict[bytes, Any]:
        return {VERSION_KEY: {}, b"application-version": APPLICATION_VERSION}

    async def remote_upload_chk(self, storage_index: bytes) -> tuple[Copyable | None, CHKUploadHelper | None]:
        if len(storage_index) != STORAGE_INDEX_BYTES:
            raise Violation("a storage index has 16 bytes")
        if storage_index not in self._runs:
            await self._servers_known.wait()
            async with self._checks:
                stored = await find_stored(self._broker, storage_index)
            if stored is not None:
                self.found += 1
                await self._renew_leases(storage_index, stored)
                await trio.to_thread.run_sync(self._files.remove, storage_index)
                extension = stored.extension
                return (
                    results_to_send(extension, stored.ueb_hash, stored.sharemap, preexisting=len(stored.sharemap)),
                    None,
                )
        return None, CHKUploadHelper(self, storage_index)

    async def upload(self, storage_index: bytes, reader: RemoteReference) -> Copyable:
        """Results once the file is stored. Raises RemoteFailure."""
        run = self._runs.get(storage_index)
        if self._nursery is None:
            raise RemoteFailure(LOST_TYPE, "this helper is stopping")
        if len(self._runs) >= UPLOADS_MAX or (run is not None and len(run.readers) >= READERS_MAX):
            raise RemoteFailure("builtins.MemoryError", "this helper has too much to do")
        if run is None:
            run = self._runs[storage_index] = _Run(storage_index)
            self._nursery.start_soon(self._run, run)
        run.readers.append(reader)
        await run.done.wait()
        if run.results is None:
            raise RemoteFailure(*(run.error or (LOST_TYPE, "this helper is stopping")))
        return run.results

    # --- one upload

    async def _run(self, run: _Run) -> None:
        try:
            await self._servers_known.wait()
            run.results = await self._fetch_and_store(run)
            self.stored += 1
        except RemoteFailure as error:
            run.error = error.type_name, error.message
        except GridError as error:
            log.warning("upload of %s failed: %s", _shown(run), error)
            run.error = f"{type(error).__module__}.{type(error).__qualname__}", str(error)
        except OSError as error:
            log.error("upload of %s failed: %s", _shown(run), error.strerror)
            run.error = "builtins.OSError", "the helper's disk failed"
        except Exception:
            log.exception("upload of %s failed", _shown(run))  # a mistake of ours costs this upload, not the helper
            run.error = "builtins.RuntimeError", "the helper failed"
        finally:
            del self._runs[run.storage_index]  # who comes from now on begins a new run
            run.done.set()

    async def _fetch_and_store(self, run: _Run) -> Copyable:
        began = trio.current_time()
        async with self._fetching:
            path = self._files.whole(run.storage_index) or await self._fetch(run)
        run.timings["total_fetch"] = run.timings["cumulative_fetch"] = trio.current_time() - began
        params = _checked(await self._ask(run, "get_all_encoding_parameters"), path.stat().st_size)
        async with self._storing:
            encoding = trio.current_time()
            source = CiphertextFile(path, run.storage_index, params)
            try:
                stored = await self._uploader.store_ciphertext(source)
            finally:
                source.close()
        now = trio.current_time()
        run.timings |= {"total_encode_and_push": now - encoding, "total": now - began}
        await trio.to_thread.run_sync(self._files.remove, run.storage_index)
        log.info("stored %s: %d bytes, %d of them fetched now", _shown(run), stored.size, run.fetched)
        await self._close_all(run)
        return results_to_send(
            read_unproven(stored.ueb),
            stored.ueb_hash,
            stored.sharemap,
            pushed=stored.pushed,
            preexisting=stored.preexisting,
            fetched=run.fetched,
            timings=run.timings,
            verify_cap=CHKVerifyCap(run.storage_index, stored.ueb_hash, stored.k, stored.n, stored.size),
        )

    async def _fetch(self, run: _Run) -> Path:
        """The file with all of the ciphertext."""
        partial = await trio.to_thread.run_sync(self._files.partial, run.storage_index)
        try:
            await self._fetch_rest(run, partial)
            return await trio.to_thread.run_sync(partial.complete)
        finally:
            partial.close()

    async def _fetch_rest(self, run: _Run, partial: Partial) -> None:
        size = await self._ask(run, "get_size")
        if not 0 < size <= FILE_BYTES_MAX:
            raise RemoteFailure("builtins.ValueError", f"this helper takes files of up to {FILE_BYTES_MAX} bytes")
        if partial.length > size:  # of another file, or what was on the disk is damaged
            partial.start_over()
        room = await trio.to_thread.run_sync(self._files.make_room, size - partial.length, [*self._runs])
        if not room:
            raise RemoteFailure("allmydata.interfaces.NoSpace", "this helper has no room for the file")
        while partial.length < size:
            length = min(READ_BYTES, size - partial.length)
            pieces = await self._ask(run, "read_encrypted", partial.length, length)
            await trio.to_thread.run_sync(partial.append, pieces)
            run.fetched += length
            self.fetched_bytes += length

    async def _ask(self, run: _Run, method: str, *args: int) -> Any:
        """Of the first reader that answers properly; those before it are not asked again. Raises RemoteFailure."""
        while run.readers:
            reader = run.readers[0]
            try:
                if run.size is None:
                    run.size = await reader.call("get_size", timeout_s=QUESTION_TIMEOUT_S)
                if method == "get_size":
                    return run.size
                timeout_s = with_data(READ_TIMEOUT_S, args[1]) if args else QUESTION_TIMEOUT_S
                answer = await reader.call(method, *args, timeout_s=timeout_s)
                if args and sum(map(len, answer)) != args[1]:
                    raise RemoteProtocolError("not as many bytes as were asked for")
                return answer
            except PeerError as error:
                log.info("upload of %s: a client is lost: %s", _shown(run), error)
                run.readers.remove(reader)
                await self._drop_strangers(run)
        raise RemoteFailure(LOST_TYPE, "every client of this upload is lost")

    async def _drop_strangers(self, run: _Run) -> None:
        """The next reader must be of the same file, as far as can be told."""
        while run.readers and run.size is not None:
            try:
                if await run.readers[0].call("get_size", timeout_s=QUESTION_TIMEOUT_S) == run.size:
                    return
            except PeerError as error:
                log.info("upload of %s: a client is lost: %s", _shown(run), error)
            del run.readers[0]

    async def _close_all(self, run: _Run) -> None:
        """Best effort, and not waited for long."""
        with trio.move_on_after(CLOSE_TIMEOUT_S):
            for pending in [reader.send("close") for reader in run.readers]:
                with _peer_errors_ignored():
                    await pending.result(CLOSE_TIMEOUT_S)

    async def _renew_leases(self, storage_index: bytes, stored: StoredFile) -> None:
        """An upload would have done so. Best effort."""

        async def renew(server: Any) -> None:
            with _peer_errors_ignored():
                await server.add_lease(storage_index, self._secrets.lease(storage_index, server.tub_id))

        with trio.move_on_after(LEASE_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for server in stored.holders:
                    nursery.start_soon(renew, server)

    def get_stats(self) -> Mapping[str, float]:
        """What it has done, and is at."""
        return {
            "helper_uploads": len(self._runs),
            "helper_fetched_bytes": self.fetched_bytes,
            "helper_files": self.stored,
            "helper_files_found": self.found,
        }


class CHKUploadHelper(Referenceable):
    """RICHKUploadHelper: the right to upload one storage index."""

    remote_interface: ClassVar[RemoteInterface | None] = RIUploadHelper

    def __init__(self, helper: Helper, storage_index: bytes) -> None:
        self._helper = helper
        self._storage_index = storage_index

    async def remote_get_version(self) -> dict[bytes, Any]:
        return {UPLOAD_VERSION_KEY: {}, b"application-version": APPLICATION_VERSION}

    async def remote_upload(self, reader: RemoteReference) -> Copyable:
        return await self._helper.upload(self._storage_index, reader)


def _checked(told: tuple[int, int, int, int], size: int) -> EncodingParameters:
    """What a client says of its file. Raises RemoteFailure."""
    k, happy, n, segment_size = told
    possible = 1 <= k <= n <= SHARES_MAX and 1 <= happy <= n and 0 < segment_size <= SEGMENT_BYTES_MAX
    if not possible or segment_size % k or -(-size // segment_size) > SEGMENTS_MAX:
        raise RemoteFailure("builtins.ValueError", "impossible encoding parameters")
    return EncodingParameters(k, happy, n, segment_size)


def _shown(run: _Run) -> str:
    return short_si(b2a(run.storage_index))


@contextmanager
def _peer_errors_ignored() -> Iterator[None]:
    try:
        yield
    except PeerError as error:
        log.debug("%s", error)
