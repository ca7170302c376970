"""Finding servers: announcements and what is believed of them, the cache, static servers, order and permission."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

from grid.crypto import SigningKey
from grid.formats import base32
from grid.formats.announcement import Announcement, from_mapping
from grid.formats.furl import Furl
from grid.formats.hashutil import permuted_key
from grid.peers import broker as broker_module
from grid.peers import introducer as introducer_module
from grid.peers import pulse, reconnect
from grid.peers.broker import StorageBroker
from grid.peers.foolscap_storage import FoolscapStorageServer
from grid.peers.introducer import cache_path, read_cache, supersedes, write_cache
from grid.wire.references import Referenceable
from tests.grid.peers.loopback import IntroducerService, Listener, Relay, Storage, until

SI = bytes(range(16))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnect, "INITIAL_DELAY_S", 0.02)
    monkeypatch.setattr(introducer_module, "CACHE_WRITE_DELAY_S", 0.0)
    monkeypatch.setattr(broker_module, "SETTLE_S", 0.1)


class LoopbackGrid:
    """An introducer and a few storage servers that announced themselves."""

    def __init__(self, nursery: trio.Nursery, path: Path) -> None:
        self.nursery = nursery
        self.path = path
        self.listener = Listener(nursery)
        self.introducer = IntroducerService()
        self.furl: Furl
        self.servers: list[Storage] = []

    async def start(self, servers: int) -> None:
        await self.listener.start()
        self.furl = Furl.parse(self.listener.tub.register(self.introducer, "introducer-swissnum"))
        for number in range(servers):
            await self.add_server(f"server{number}")

    async def add_server(self, name: str) -> Storage:
        server = Storage(self.nursery, name)
        await server.start()
        self.servers.append(server)
        await self.introducer.announce(server.signed())
        return server

    @asynccontextmanager
    async def broker(self, **options: Any) -> AsyncIterator[StorageBroker]:
        settings: dict[str, Any] = {
            "introducers": {"default": self.furl},
            "static_servers": {},
            "keepalive_s": 240,
            "cache_directory": self.path,
            "nickname": "us",
            **options,
        }
        broker = StorageBroker(**settings)
        async with trio.open_nursery() as nursery:
            await nursery.start(broker.run)
            yield broker
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def loopback_grid(path: Path, servers: int = 2) -> AsyncIterator[LoopbackGrid]:
    async with trio.open_nursery() as nursery:
        grid = LoopbackGrid(nursery, path)
        await grid.start(servers)
        yield grid
        nursery.cancel_scope.cancel()


def nicknames(broker: StorageBroker) -> set[str]:
    return {server.nickname for server in broker.get_known_servers()}


async def test_announced_servers_are_connected_to(tmp_path: Path) -> None:
    async with loopback_grid(tmp_path, 3) as grid, grid.broker() as broker:
        assert await broker.wait_for_servers(3, timeout_s=10) == 3
        assert nicknames(broker) == {"server0", "server1", "server2"}
        assert broker.introducers[0].connected_to_introducer()
        assert grid.introducer.infos[0][b"nickname"] == "us"
        await grid.add_server("late")
        assert await broker.wait_for_servers(4, timeout_s=10) == 4


async def test_waiting_ends_when_there_are_no_more(tmp_path: Path) -> None:
    async with loopback_grid(tmp_path, 2) as grid, grid.broker() as broker:
        with trio.fail_after(10):
            assert await broker.wait_for_servers(7, timeout_s=1000) == 2
    broker = StorageBroker(introducers={}, static_servers={}, keepalive_s=240)
    assert await broker.wait_for_servers(1, timeout_s=1000) == 0


async def test_what_was_announced_is_kept_and_used_when_offline(tmp_path: Path) -> None:
    cache = tmp_path / "introducer_default_cache.yaml"
    async with loopback_grid(tmp_path, 2) as grid:
        async with grid.broker() as broker:
            await broker.wait_for_servers(2, timeout_s=10)
            await until(lambda: cache.exists() and len(yaml.safe_load(cache.read_text())) == 2)
        assert cache.stat().st_mode & 0o777 == 0o600
        entries = yaml.safe_load(cache.read_text())
        assert {entry["key_s"] for entry in entries} == {server.server_id for server in grid.servers}
        assert {entry["ann"]["nickname"] for entry in entries} == {"server0", "server1"}
        grid.listener.stop()
        async with grid.broker() as broker:
            assert await broker.wait_for_servers(2, timeout_s=10) == 2
            assert not broker.introducers[0].connected_to_introducer()
            # and the introducer is still wanted
            await grid.listener.start()
            grid.listener.tub.register(grid.introducer, "introducer-swissnum")
            await until(broker.introducers[0].connected_to_introducer)


async def test_a_command_that_is_soon_done_keeps_what_it_heard_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(introducer_module, "CACHE_WRITE_DELAY_S", 1000)
    cache = tmp_path / "introducer_default_cache.yaml"
    async with loopback_grid(tmp_path, 1) as grid:
        async with grid.broker() as broker:
            await broker.wait_for_servers(1, timeout_s=10)
            assert not cache.exists()
        written = cache.stat()
        async with grid.broker() as broker:
            await broker.wait_for_servers(1, timeout_s=10)
        assert cache.stat().st_ino == written.st_ino  # nothing new: left alone


async def test_offline_from_the_start(tmp_path: Path) -> None:
    async with loopback_grid(tmp_path, 1) as grid:
        grid.listener.stop()
        async with grid.broker() as broker:
            with trio.fail_after(10):
                assert await broker.wait_for_servers(1, timeout_s=1000) == 0
            assert broker.introducers[0].last_failure


async def test_bad_announcements_are_skipped_and_the_rest_counts(tmp_path: Path) -> None:
    async with loopback_grid(tmp_path, 1) as grid, grid.broker() as broker:
        forged = grid.servers[0].signed(nickname="forged", seqnum=9)
        assert isinstance(forged, tuple)
        message, signature, key = forged
        other = Storage(grid.nursery, "other")
        await other.start()
        bad = (
            (message.replace(b"forged", b"FORGED"), signature, key),
            (message, signature[:-1], key),
            (message, b"", key),
            (message, signature, key[3:]),
            (message, signature),
            (b"not json", signature, key),
            b"nonsense",
            7,
        )
        for number, announcement in enumerate(bad):
            await grid.introducer.announce(announcement, other.signed(nickname=f"other{number}", seqnum=number))
            # the last good one is known, so the set with the bad one was gone through
            await until(lambda number=number: nicknames(broker) == {"server0", f"other{number}"})  # type: ignore[misc]


async def test_other_services_are_not_storage_servers(tmp_path: Path) -> None:
    async with loopback_grid(tmp_path, 1) as grid, grid.broker() as broker:
        other = Storage(grid.nursery, "other")
        await other.start()
        await grid.introducer.announce(other.signed(**{"service-name": "stub_client"}))
        await grid.introducer.announce(grid.servers[0].signed(nickname="renamed", seqnum=2))
        await until(lambda: nicknames(broker) == {"renamed"})


def announcement(seqnum: object, nickname: str = "n") -> Announcement:
    fields = {"service-name": "storage", "nickname": nickname}
    if seqnum is not None:
        fields["seqnum"] = seqnum  # type: ignore[assignment]
    return from_mapping("v0-x", fields)


@pytest.mark.parametrize(
    ("held", "new", "replaces"),
    [
        (announcement(1), announcement(2, "new"), True),
        (announcement(2), announcement(2, "new"), False),
        (announcement(2), announcement(1, "new"), False),
        (announcement(2), announcement(None, "new"), False),
        (announcement(2), announcement("3", "new"), False),
        (announcement(None), announcement(None, "new"), True),
        (announcement(None), announcement(None), False),
        (announcement(1), announcement(1), False),
    ],
)
def test_which_announcement_counts(held: Announcement, new: Announcement, replaces: bool) -> None:
    assert supersedes(new, held) is replaces


async def test_a_server_that_moved_is_followed(tmp_path: Path) -> None:
    async with loopback_grid(tmp_path, 1) as grid, grid.broker() as broker:
        await broker.wait_for_servers(1, timeout_s=10)
        (before,) = broker.get_known_servers()
        await grid.introducer.announce(grid.servers[0].signed(seqnum=2, nickname="renamed"))
        await until(lambda: nicknames(broker) == {"renamed"})
        assert broker.get_known_servers() == [before] and before.connected  # the same place: nothing was cut
        moved = Storage(grid.nursery, "moved")
        moved.key = grid.servers[0].key
        await moved.start()
        await grid.introducer.announce(moved.signed(seqnum=3))
        await until(lambda: nicknames(broker) == {"moved"} and broker.connected_count == 1)
        assert not before.connected


async def test_static_servers_win_and_need_no_introducer(tmp_path: Path) -> None:
    async with loopback_grid(tmp_path, 2) as grid:
        server = grid.servers[0]
        static = {
            server.server_id: server.fields(nickname="static"),
            "free text": {"anonymous-storage-FURL": grid.servers[1].furl},
            "broken": {"nickname": "broken"},
        }
        async with grid.broker(static_servers=static) as broker:
            assert await broker.wait_for_servers(3, timeout_s=10) == 3
            await grid.introducer.announce(server.signed(seqnum=100, nickname="announced"))
            await grid.introducer.announce(grid.servers[1].signed(seqnum=100, nickname="barrier"))
            await until(lambda: "barrier" in nicknames(broker))
            assert "static" in nicknames(broker) and "announced" not in nicknames(broker)
        async with grid.broker(static_servers=static, introducers={}) as broker:
            assert await broker.wait_for_servers(2, timeout_s=10) == 2


async def test_the_order_of_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "SUSPECT_AFTER_S", 0.02)
    async with loopback_grid(tmp_path, 4) as grid:
        async with grid.broker() as broker:
            await broker.wait_for_servers(4, timeout_s=10)
            expected = sorted(broker.get_known_servers(), key=lambda s: permuted_key(SI, s.permutation_seed))
            assert broker.get_permuted_servers(SI) == expected
            # one that hangs is asked last, and in its turn again when it is back
            by_id = {server.server_id: server for server in grid.servers}
            hung = by_id[expected[0].server_id]
            hung.service.hang()
            with trio.move_on_after(0.01):
                await expected[0].get_buckets(SI)
            await until(lambda: broker.get_permuted_servers(SI) == [*expected[1:], expected[0]])
            hung.service.awake.set()
            await until(lambda: broker.get_permuted_servers(SI) == expected)
            # one that is gone is not asked
            hung.listener.stop()
            await until(lambda: broker.get_permuted_servers(SI) == expected[1:])
            assert len(broker.get_known_servers()) == 4
        ids = [server.server_id for server in expected]
        async with grid.broker(preferred=(ids[3], ids[2], "v0-nobody")) as broker:
            await broker.wait_for_servers(3, timeout_s=10)
            assert [s.server_id for s in broker.get_permuted_servers(SI)] == [ids[2], ids[3], ids[1]]


def certificate(manager: SigningKey, server_id: str, expires: str) -> dict[str, str]:
    text = json.dumps({"expires": expires, "public_key": f"pub-{server_id}", "version": 1}, sort_keys=True)
    return {"certificate": text, "signature": base32.b2a(manager.sign(text.encode()))}


def test_grid_managers_decide_who_gets_uploads() -> None:
    manager, stranger = SigningKey.generate(), SigningKey.generate()
    now = 1_790_000_000.0  # in 2026
    ids = {name: f"v0-{base32.b2a(SigningKey.generate().public_bytes)}" for name in ("good", "late", "odd", "none")}
    furl = f"pb://{'a' * 32}@tcp:127.0.0.1:1/x"
    certificates = {
        "good": [certificate(signer, ids["good"], "2030-01-01T00:00:00+00:00") for signer in (stranger, manager)],
        "late": [certificate(manager, ids["late"], "2020-01-01T00:00:00+00:00")],
        "odd": [certificate(manager, ids["good"], "2030-01-01T00:00:00+00:00")],
        "none": [],
    }

    def permitted(*keys: bytes) -> set[str]:
        static = {
            ids[name]: {"anonymous-storage-FURL": furl, "nickname": name, "grid-manager-certificates": listed}
            for name, listed in certificates.items()
        }
        broker = StorageBroker(
            introducers={}, static_servers=static, keepalive_s=240, grid_manager_keys=keys, clock=lambda: now
        )
        return {server.nickname for server in broker.get_known_servers() if broker.permits_upload(server)}

    assert permitted(manager.public_bytes) == {"good"}
    assert permitted(SigningKey.generate().public_bytes) == set()
    assert permitted() == set(ids)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "{",
        lambda text: "- 1\n- {}\n- {key_s: 3}\n- {key_s: v0-a, ann: 7}\n",
        lambda text: "just text",
        lambda text: "\x00",
    ],
)
def test_a_damaged_cache_is_no_cache(tmp_path: Path, damage: Callable[[str], str]) -> None:
    path = tmp_path / "cache.yaml"
    write_cache(path, [announcement(3, "\u00fc")])
    (kept,) = read_cache(path)
    assert (kept.server_id, kept.nickname, kept.seqnum) == ("v0-x", "\u00fc", 3)
    path.write_text(damage(path.read_text()))
    assert read_cache(path) == []
    assert read_cache(tmp_path / "missing") == []


def test_a_cache_that_tahoe_wrote(tmp_path: Path) -> None:
    path = tmp_path / "cache.yaml"
    path.write_text("""\
- ann:
    anonymous-storage-FURL: pb://vqpm6uulyjagcjfxlb5r2qm5mx6xyl5h@tcp:127.0.0.1:39859/ftaajnwynl6jnboh6ysi37hmqalby4r4
    anonymous-storage-NURLs:
    - pb://c_usNRTmSmBTnjw_lHNEblvpGaCRGjHVeULsBYJkDtk@127.0.0.1:39859/ftaajnwynl6jnboh6ysi37hmqalby4r4#v=1
    app-versions: []
    my-version: tahoe-lafs/1.20.0
    nickname: server9
    nonce: 4bsmm2wk44rxin4npgys44s2dvxqky7mkrp7kj4kfhrcibx4lz6a
    oldest-supported: 1.0.0
    permutation-seed-base32: ofqxanlr
    seqnum: 1
    service-name: storage
    version: 0
  key_s: v0-qap5qz6kn4mcvyv77mtf3fgeeimwphlldm7i4iodhmzt4bp4ksrq
""")
    (server,) = read_cache(path)
    assert (server.nickname, server.service_name, server.seqnum) == ("server9", "storage", 1)
    assert server.furl is not None and server.furl.tcp_hints() == [("127.0.0.1", 39859)]
    before = path.read_bytes()
    write_cache(path, [server])
    assert path.read_bytes() == before


def test_names_of_caches(tmp_path: Path) -> None:
    assert cache_path(tmp_path, "my grid") == tmp_path / "introducer_my grid_cache.yaml"
    assert cache_path(tmp_path, "../../x") is None
    assert cache_path(tmp_path, "x" * 300) is None


class Impostor(Referenceable):
    """Claims no interface, so no schema checks what it answers."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.asked = trio.Event()

    async def remote_get_version(self) -> object:
        self.asked.set()
        return self.answer

    async def remote_subscribe_v2(self, *_: object) -> object:
        return self.answer


@pytest.mark.parametrize("answer", [5, None, [b"version"]])
async def test_who_answers_at_a_servers_name_without_being_one_costs_only_itself(
    tmp_path: Path, answer: object
) -> None:
    async with loopback_grid(tmp_path, 2) as grid:
        bad_server, bad_introducer = grid.servers[0], Listener(grid.nursery)
        bad_server.listener.tub.register(Impostor(answer), "swissnum")
        await bad_introducer.start()
        furl = Furl.parse(bad_introducer.tub.register(Impostor(answer), "introducer"))
        async with grid.broker(introducers={"default": grid.furl, "bad": furl}) as broker:
            await broker.wait_for_servers(2, timeout_s=10)
            await until(lambda: all(failure_of(each) for each in (*broker.get_known_servers(), *broker.introducers)))
            assert broker.connected_count == 1


def failure_of(peer: Any) -> str | None:
    """Why it cannot be used; for one that can, that it can."""
    usable = peer.connected_to_introducer() if hasattr(peer, "petname") else peer.connected
    return "usable" if usable else peer.last_failure


async def test_a_mistake_over_one_peer_costs_that_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(broker_module, "MISTAKE_PAUSE_S", 0.01)
    async with loopback_grid(tmp_path, 2) as grid:
        victim, run, mistakes = grid.servers[0].server_id, FoolscapStorageServer.run, iter(range(2))

        async def faulty_run(server: FoolscapStorageServer, *args: Any) -> None:
            if server.server_id == victim and next(mistakes, None) is not None:
                raise AttributeError("a mistake")
            await run(server, *args)

        monkeypatch.setattr(FoolscapStorageServer, "run", faulty_run)
        async with grid.broker() as broker:
            assert await broker.wait_for_servers(2, timeout_s=10) == 2
    assert [record.levelname for record in caplog.records if "failed" in record.message] == ["ERROR", "ERROR"]


async def test_after_a_suspend_dead_connections_are_made_anew_and_live_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "DOUBT_TIMEOUT_S", 0.5)
    async with loopback_grid(tmp_path, 1) as grid:
        relays = [Relay(grid.nursery, port) for port in (grid.servers[0].listener.port, grid.listener.port)]
        for relay in relays:
            await relay.start()
        alive = Storage(grid.nursery, "alive")
        await alive.start()
        static = {
            "far": {
                "anonymous-storage-FURL": grid.servers[0].furl.replace(f":{relays[0]._target}/", f":{relays[0].port}/")
            },
            "near": {"anonymous-storage-FURL": alive.furl},
        }
        furl = Furl.parse(str(grid.furl).replace(f":{relays[1]._target}/", f":{relays[1].port}/"))
        async with grid.broker(static_servers=static, introducers={"default": furl}, cache_directory=None) as broker:
            await broker.wait_for_servers(3, timeout_s=10)  # one of them over both ways
            far, near = (server for server in broker.get_known_servers() if server.server_id in static)
            for relay in relays:
                relay.freeze()
            accepted, subscribed = alive.listener.accepted, len(grid.introducer.subscribers)
            broker.doubt_connections()
            await until(lambda: not far.connected)
            await until(lambda: far.connected and len(grid.introducer.subscribers) > subscribed)
            assert near.connected and alive.listener.accepted == accepted
            with trio.fail_after(5):
                assert await far.get_buckets(SI) == {}


async def test_certificates_are_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[str] = []

    def until_then(certificates: object, keys: object, server_id: str) -> float:
        verified.append(server_id)
        return 100.0

    now = 50.0
    monkeypatch.setattr(broker_module, "certified_until", until_then)
    fields = {"anonymous-storage-FURL": f"pb://{'a' * 32}@tcp:127.0.0.1:1/x"}
    broker = StorageBroker(
        introducers={}, static_servers={}, keepalive_s=240, grid_manager_keys=(bytes(32),), clock=lambda: now
    )
    broker.add_announcement(from_mapping("v0-a", fields))
    (server,) = broker.get_known_servers()
    assert all(broker.permits_upload(server) for _ in range(3)) and verified == ["v0-a"]
    now = 101.0
    assert not broker.permits_upload(server) and verified == ["v0-a"]
    broker.add_announcement(from_mapping("v0-a", {**fields, "grid-manager-certificates": []}))  # a new one may say more
    assert not broker.permits_upload(server) and verified == ["v0-a", "v0-a"]


async def test_the_order_follows_what_is_announced(tmp_path: Path) -> None:
    async with loopback_grid(tmp_path, 2) as grid, grid.broker() as broker:

        def expected() -> list[Any]:
            return sorted(broker.get_known_servers(), key=lambda s: permuted_key(SI, s.permutation_seed))

        await broker.wait_for_servers(2, timeout_s=10)
        assert broker.get_permuted_servers(SI) == expected()
        await grid.add_server("late")
        await broker.wait_for_servers(3, timeout_s=10)
        assert broker.get_permuted_servers(SI) == expected()
        for seed in ("aa", "77", "ma"):
            last = grid.servers[-1].signed(seqnum=ord(seed[0]), **{"permutation-seed-base32": seed * 16})
            await grid.introducer.announce(last)
        assert broker.get_permuted_servers(SI) == expected()
