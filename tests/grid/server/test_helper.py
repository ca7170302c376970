"""The upload helper, both ends over real tubs on loopback, above storage servers in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio

from grid.errors import NotEnoughServersError, RemoteFailure
from grid.formats.base32 import b2a
from grid.formats.caps import CHKReadCap
from grid.formats.furl import Furl
from grid.operations import helped_upload
from grid.operations.helped_upload import HelpedUploads, HelperLiedError
from grid.operations.leases import Secrets
from grid.operations.upload import Uploader, chk_cap_of
from grid.operations.uploadables import SourceChangedError
from grid.peers.helper import HelperClient
from grid.server import helper as helper_module
from grid.server.helper import READ_BYTES, Helper
from grid.server.helper_files import HelperFiles
from grid.transports.tub import Referenceable
from grid.wire.failures import Copyable
from grid.wire.remote_interfaces import RIEncryptedUploadable
from tests.grid.operations.grid import SECRET, MemoryGrid, noise, uploadable
from tests.grid.peers.loopback import Listener, Relay, until

SIZE = 8 * READ_BYTES + 12345
DATA = noise(SIZE)


class Site:
    """A grid, a helper on it that can be killed and started, and a client that reaches it through a relay."""

    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self.nursery = nursery
        self.directory = directory
        self.grid = MemoryGrid(10)
        self.listener = Listener(nursery)
        self.scope = trio.CancelScope()
        self.helper: Helper

    async def start(self) -> None:
        await self.listener.start()
        self.relay = Relay(self.nursery, self.listener.port)
        await self.relay.start()
        await self.start_helper()
        furl = f"pb://{self.listener.tub.tub_id}@tcp:127.0.0.1:{self.relay.port}/helper"
        self.client = HelperClient(Furl.parse(furl), keepalive_s=240)
        await self.nursery.start(self.client.run)
        self.helped = HelpedUploads(self.client, self.grid.broker)
        self.uploader = Uploader(self.grid.broker, Secrets(SECRET), helped=self.helped)

    async def start_helper(self) -> None:
        secrets = Secrets(b"h" * 32)
        files = HelperFiles(self.directory, reserved_space=0)
        files.prepare()
        self.helper = Helper(files, self.grid.broker, Uploader(self.grid.broker, secrets), secrets)
        self.listener.tub.register(self.helper, "helper")
        self.scope = trio.CancelScope()
        started = trio.Event()

        async def run() -> None:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.helper.run)
                    started.set()

        self.nursery.start_soon(run)
        await started.wait()

    async def restart(self) -> None:
        """Killed: every connection ends, what is in memory is gone."""
        self.listener.stop()
        self.scope.cancel()
        await until(lambda: not self.client.connected)
        await self.listener.start()
        await self.start_helper()

    async def upload(self, data: bytes = DATA, uploader: Uploader | None = None, **parameters: int) -> CHKReadCap:
        cap = (await (uploader or self.uploader).upload(uploadable(data, **parameters))).cap
        assert isinstance(cap, CHKReadCap)
        return cap

    def incoming(self) -> list[Path]:
        return [*(self.directory / "CHK_incoming").iterdir(), *(self.directory / "CHK_encoding").iterdir()]


@pytest.fixture
async def site(nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr("grid.peers.reconnect.INITIAL_DELAY_S", 0.02)
    made = Site(nursery, tmp_path / "helper")
    await made.start()
    return made


async def read_back(site: Site, cap: CHKReadCap, data: bytes) -> None:
    """By the cap alone, from the servers."""
    from grid.crypto import aes_ctr

    download = site.grid.download(cap)
    segment_size = await download.get_segment_size()
    segments = range(-(-len(data) // segment_size))
    assert aes_ctr(cap.key, b"".join([await download.get_segment(number) for number in segments])) == data


async def until_fetched(site: Site, count: int) -> None:
    await until(lambda: site.helper.fetched_bytes >= count)


async def test_a_file_takes_its_ciphertext_once_and_nothing_the_second_time(site: Site) -> None:
    cap = await site.upload()
    assert cap == await chk_cap_of(uploadable(DATA))
    assert len(site.grid.shares(cap.storage_index)) == 10
    await read_back(site, cap, DATA)
    assert SIZE < site.relay.sent < 1.05 * SIZE
    assert not site.incoming()
    before = site.relay.sent
    assert await site.upload() == cap
    assert site.relay.sent - before < 5000
    assert (site.helper.stored, site.helper.found) == (1, 1)
    assert sum(server.calls["add_lease"] for server in site.grid.servers) == 10
    # a key is what nobody may see: neither it nor plaintext is in what was kept or sent in clear
    assert site.helper.get_stats()["helper_fetched_bytes"] == SIZE


@pytest.mark.parametrize("k, n", [(1, 1), (3, 10), (7, 7)])
@pytest.mark.parametrize("size", [56, 131072, 300_001])
async def test_encodings(site: Site, k: int, n: int, size: int) -> None:
    data = noise(size, k)
    cap = await site.upload(data, k=k, n=n, happy=1, segment_size=100_000)
    assert cap == await chk_cap_of(uploadable(data, k=k, n=n, happy=1, segment_size=100_000))
    await read_back(site, cap, data)


@pytest.mark.parametrize("how", ["restart", "drop"])
async def test_a_lost_helper_goes_on_where_it_stopped(site: Site, nursery: trio.Nursery, how: str) -> None:
    go_on = slow(site, reads=4)
    caps: list[CHKReadCap] = []

    async def upload() -> None:
        caps.append(await site.upload())

    async with trio.open_nursery() as uploading:
        uploading.start_soon(upload)
        await until_fetched(site, 3 * READ_BYTES)
        if how == "restart":
            await site.restart()
        else:
            site.listener.drop()
        go_on.set()
    assert caps == [await chk_cap_of(uploadable(DATA))]
    assert SIZE < site.relay.sent < 1.05 * SIZE + 2 * READ_BYTES
    await read_back(site, caps[0], DATA)
    assert not site.incoming()


def slow(site: Site, reads: int) -> trio.Event:
    """After so many reads the helper does nothing more until the event is set."""
    files, original = site.helper._files, HelperFiles.partial
    go_on = trio.Event()

    def partial(storage_index: bytes) -> Any:
        found = original(files, storage_index)
        count = 0
        append = found.append

        class Slow:
            def __getattr__(self, name: str) -> Any:
                return getattr(found, name)

            def append(self, pieces: Any) -> None:
                nonlocal count
                append(pieces)
                count += 1
                if count == reads:
                    trio.from_thread.run(go_on.wait)

        return Slow()

    files.partial = partial  # type: ignore[method-assign]
    return go_on


async def test_a_client_that_was_killed_goes_on_where_it_stopped(site: Site) -> None:
    go_on = slow(site, reads=4)
    async with trio.open_nursery() as first:
        first.start_soon(site.upload)
        await until_fetched(site, 3 * READ_BYTES)
        first.cancel_scope.cancel()
    site.listener.drop()  # as the end of its process does
    go_on.set()
    await until(lambda: not site.helper.uploads)
    (partial,) = site.incoming()
    held = partial.stat().st_size
    assert held >= 3 * READ_BYTES
    await until(lambda: site.client.connected)
    sent = site.relay.sent
    cap = await site.upload()
    assert site.relay.sent - sent < 1.05 * (SIZE - held)
    await read_back(site, cap, DATA)


async def test_two_clients_of_one_file_are_one_upload(site: Site) -> None:
    """And when the one that is read from is lost, the other is read from."""
    other = HelperClient(site.client._furl, keepalive_s=240)
    await site.nursery.start(other.run)
    second = Uploader(site.grid.broker, Secrets(b"2" * 32), helped=HelpedUploads(other, site.grid.broker))
    caps: list[CHKReadCap] = []

    async def upload(uploader: Uploader) -> None:
        caps.append(await site.upload(uploader=uploader))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upload, site.uploader)
        nursery.start_soon(upload, second)
    assert len(caps) == 2 and len(set(caps)) == 1
    assert SIZE < site.relay.sent < 1.05 * SIZE
    assert site.helper.stored + site.helper.found <= 2


async def test_without_a_helper_files_are_stored_all_the_same(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.listener.stop()
    await until(lambda: not site.client.connected)
    cap = await site.upload()
    assert len(site.grid.shares(cap.storage_index)) == 10


async def test_a_helper_that_is_lost_and_stays_away_is_not_waited_for_long(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helped_upload, "RETURN_TIMEOUT_S", 0.1)
    go_on = slow(site, reads=2)
    caps: list[CHKReadCap] = []

    async def upload() -> None:
        caps.append(await site.upload())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(upload)
        await until_fetched(site, READ_BYTES)
        site.listener.stop()
        site.scope.cancel()
        go_on.set()
    await read_back(site, caps[0], DATA)


async def test_a_helper_that_stops_says_so(site: Site) -> None:
    go_on = slow(site, reads=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(site.upload)
        await until_fetched(site, READ_BYTES)
        site.helper.stop()
        site.listener.drop()
        go_on.set()
        await until(lambda: not site.helper.uploads)
        await site.start_helper()


async def test_a_mistake_of_ours_costs_one_upload(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: HelperFiles, storage_index: bytes) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(HelperFiles, "whole", broken)
        await site.upload()  # without the helper
    assert "ZeroDivisionError" in caplog.text and not site.helper.uploads
    await site.upload(noise(100_000, 9))
    assert site.helper.stored == 1


async def test_too_few_servers_is_the_uploads_error(site: Site) -> None:
    for server in site.grid.servers[:5]:
        server.full = True
    with pytest.raises(NotEnoughServersError):
        await site.upload()
    assert len(site.incoming()) == 1  # kept for another time
    for server in site.grid.servers:
        server.full = False
    sent = site.relay.sent
    await site.upload()
    assert site.relay.sent - sent < 5000


class Changing:
    """A file that changes while it is read."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def rewind(self) -> None:
        self._inner.rewind()

    def read_sync(self, length: int) -> Any:
        raise SourceChangedError("it changed")


async def test_an_error_of_the_source_is_the_uploads_error(site: Site) -> None:
    changing: Any = Changing(uploadable(DATA))
    with pytest.raises(SourceChangedError):
        await site.uploader.upload(changing)


# --- helpers that lie


@pytest.mark.parametrize("lie", ["hash", "size"])
async def test_a_lie_is_found_out(site: Site, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """The file is stored all the same, under a key of its own, and the helper left alone."""
    original = Helper.upload

    async def lying(self: Helper, storage_index: bytes, reader: Any) -> Copyable:
        results = await original(self, storage_index, reader)
        if lie == "hash":
            results.attributes[b"uri_extension_hash"] = bytes(32)
        else:
            results.attributes[b"uri_extension_data"]["size"] += 1
        return results

    monkeypatch.setattr(Helper, "upload", lying)
    with pytest.raises(HelperLiedError):
        await site.helped.upload(uploadable(DATA))
    site.helped._distrusted_until = 0.0
    data = noise(SIZE, 1)
    cap = await site.upload(data)
    honest = await chk_cap_of(uploadable(data))
    assert isinstance(honest, CHKReadCap) and cap.key != honest.key
    await read_back(site, cap, data)
    sent = site.relay.sent
    await site.upload(noise(100_000, 5))
    assert site.relay.sent - sent < 5000


async def test_shares_that_servers_deny_are_sent_to_them(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the helper that named them is left alone."""
    original = Helper.upload

    async def lying(self: Helper, storage_index: bytes, reader: Any) -> Copyable:
        results = await original(self, storage_index, reader)
        for server in site.grid.servers[:5]:
            server.immutable.pop(storage_index, None)
        return results

    monkeypatch.setattr(Helper, "upload", lying)
    cap = await site.upload()
    assert cap == await chk_cap_of(uploadable(DATA))
    assert len(site.grid.shares(cap.storage_index)) == 10
    assert await site.helped.upload(uploadable(noise(1000))) is None


async def test_a_file_on_too_few_servers_is_spread(site: Site) -> None:
    """The helper finds it whole, and says so: that is no lie, but not enough."""
    for server in site.grid.servers[2:]:
        server.connected = False
    cap = await site.upload(uploader=Uploader(site.grid.broker, Secrets(SECRET)), happy=1)
    for server in site.grid.servers:
        server.connected = True
    sent = site.relay.sent
    assert await site.upload(happy=7) == cap
    assert site.helper.found == 1 and site.relay.sent - sent < 5000
    assert len({server for servers in site.grid.holders(cap.storage_index).values() for server in servers}) >= 7
    assert await site.helped.upload(uploadable(noise(1000))) is not None


async def test_poisoned_ciphertext_is_found_out(site: Site) -> None:
    """Somebody gave the helper other bytes for our storage index."""
    honest = await chk_cap_of(uploadable(DATA))
    assert isinstance(honest, CHKReadCap)
    (site.directory / "CHK_incoming" / b2a(honest.storage_index)).write_bytes(bytes(READ_BYTES))
    cap = await site.upload()
    assert cap != honest
    await read_back(site, cap, DATA)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        Copyable(b"allmydata.upload.UploadResults.tahoe.allmydata.com", {}),
        Copyable(
            b"allmydata.upload.UploadResults.tahoe.allmydata.com",
            {b"uri_extension_hash": bytes(32), b"uri_extension_data": {"size": -1}, b"sharemap": {}},
        ),
    ],
)
async def test_nonsense_costs_the_helper_its_upload(
    site: Site, monkeypatch: pytest.MonkeyPatch, answer: Copyable | None
) -> None:
    async def nonsense(self: Helper, storage_index: bytes, reader: Any) -> Any:
        return answer

    monkeypatch.setattr(Helper, "upload", nonsense)
    cap = await site.upload()
    assert cap == await chk_cap_of(uploadable(DATA))


# --- clients that lie


class Client(Referenceable):
    """RIEncryptedUploadable with the answers of a test."""

    remote_interface: ClassVar[Any] = RIEncryptedUploadable
    size: Any = 1000
    params: Any = (1, 1, 1, 1000)
    read: Callable[[int, int], Any] = staticmethod(lambda offset, length: [bytes(length)])

    async def remote_get_size(self) -> Any:
        return self.size

    async def remote_get_all_encoding_parameters(self) -> Any:
        return self.params

    async def remote_read_encrypted(self, offset: int, length: int) -> Any:
        return self.read(offset, length)

    async def remote_close(self) -> None:
        pass


async def hand_in(site: Site, client: Client) -> Any:
    await until(lambda: site.client.connected)
    upload: Any = await site.client.upload_chk(b"s" * 16)
    return await upload.call("upload", client, timeout_s=20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"size": 1 << 60},
        {"params": (0, 1, 1, 1000)},
        {"params": (2, 1, 1, 1000)},
        {"params": (3, 1, 3, 1000)},
        {"params": (1, 1, 300, 1000)},
        {"params": (1, 1, 1, 1 << 40)},
        {"read": lambda offset, length: []},
        {"read": lambda offset, length: [bytes(length + 1)]},
        {"read": lambda offset, length: [b"x"] * (length - 1)},
    ],
)
async def test_what_no_honest_client_says(site: Site, wrong: dict[str, Any]) -> None:
    client = Client()
    vars(client).update(wrong)
    with pytest.raises(RemoteFailure):
        await hand_in(site, client)
    assert not site.helper.uploads
    await site.upload()


async def test_uploads_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper_module, "UPLOADS_MAX", 0)
    with pytest.raises(RemoteFailure, match="too much"):
        await hand_in(site, Client())
    await site.upload()  # without the helper


# --- what is kept


def test_room_is_made_by_what_nobody_came_back_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr("grid.server.helper_files.SPOOL_BYTES_MAX", 1000)
    files = HelperFiles(tmp_path, reserved_space=0)
    files.prepare()
    for age, letter in enumerate((b"a", b"b", b"c")):
        partial = files.partial(letter * 16)
        partial.append([bytes(300)])
        os.utime(partial.path, (2_000_000_000 - 100 * age,) * 2)
        partial.close()
    assert files.make_room(100, [])
    assert files.bytes_held() == 900
    assert files.make_room(200, [b"c" * 16])  # c is the oldest, but in use
    assert files.bytes_held() == 600
    assert not (tmp_path / "CHK_incoming" / b2a(b"b" * 16)).exists()
    assert not files.make_room(900, [b"a" * 16, b"c" * 16])
    assert files.bytes_held() == 600
    assert files.make_room(1000, [])
    assert files.bytes_held() == 0
    old = files.partial(b"d" * 16)
    os.utime(old.path, (1000, 1000))
    old.close()
    files.make_room(0, [])
    assert not old.path.exists()


def test_no_room_on_the_disk(tmp_path: Path) -> None:
    files = HelperFiles(tmp_path, reserved_space=1 << 62)
    files.prepare()
    assert not files.make_room(1, [])


async def test_a_disk_that_is_full_is_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HelperFiles, "make_room", lambda self, wanted, in_use: False)
    with pytest.raises(RemoteFailure, match="no room"):
        await hand_in(site, Client())
    await site.upload()  # without the helper
