"""What `tahoefs run` runs: an introducer and a storage server, up to their announcement and their end."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

import grid
from grid.errors import NodeDirectoryError
from grid.formats.base32 import b2a
from grid.node_directory import create_client_directory
from grid.peers import introducer as introducer_module
from grid.server.introducer import Introducer
from grid.server_directory import ServerDirectory, create_introducer_directory, create_storage_directory, free_port
from grid.services import Serving, serve_node, storage_announcement
from grid.storage_settings import StorageSettings
from tests.grid.peers.loopback import until


def introducer_at(path: Path) -> ServerDirectory:
    create_introducer_directory(path, port=f"tcp:{free_port('127.0.0.1')}:interface=127.0.0.1")
    return ServerDirectory.open(path)


def storage_at(path: Path, introducer: ServerDirectory, text: str = "") -> ServerDirectory:
    furl = introducer.furl_file.read_text()
    port = f"tcp:{free_port('127.0.0.1')}:interface=127.0.0.1"
    create_storage_directory(path, introducers=[furl], port=port, nickname="one", reserved_space="0")
    config = path / "tahoe.cfg"
    config.write_text(config.read_text().replace("[storage]\n", f"[storage]\n{text}\n"))
    return ServerDirectory.open(path)


async def test_a_grid_from_its_node_directories(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Announced, found, written to and read from; stopped, it lets go of port and directory, and can start again."""
    monkeypatch.setattr(introducer_module, "CACHE_WRITE_DELAY_S", 0.0)
    introducer = introducer_at(tmp_path / "introducer")
    server = storage_at(tmp_path / "server", introducer)
    assert (await nursery.start(serve_node, introducer, trio.Event())).services == ("introducer",)
    furl = introducer.furl_file.read_text()
    create_client_directory(tmp_path / "client", introducers=[furl], shares=(1, 1, 1))
    data = bytes(range(256)) * 400
    cap = ""
    for run in (1, 2):
        stop = trio.Event()
        async with trio.open_nursery() as services:
            serving: Serving = await services.start(serve_node, server, stop)
            assert serving.services == ("storage",) and serving.ports == (server.endpoints[0].port,)
            await serving.published.wait()
            async with grid.join_grid(grid.NodeDirectory.open(tmp_path / "client")) as client:
                await client.need_servers(1)
                if run == 1:
                    uploadable = grid.DataUploadable(data, convergence=b"")
                    cap = (await client.upload(uploadable)).uri
                    await until(lambda: (tmp_path / "client/private/introducer_default_cache.yaml").exists())
                node = client.create_node_from_uri(cap)
                assert await node.download_to_data() == data
            stop.set()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", server.endpoints[0].port))
    assert (tmp_path / "server" / "announcement-seqnum").read_text() == "2\n"


async def test_a_helper_of_a_grid(tmp_path: Path, nursery: trio.Nursery) -> None:
    """From its node directory alone: a client that names it sends it the file, and it comes to the server."""
    introducer = introducer_at(tmp_path / "introducer")
    server = storage_at(tmp_path / "server", introducer)
    await nursery.start(serve_node, introducer, trio.Event())
    serving: Serving = await nursery.start(serve_node, server, trio.Event())
    await serving.published.wait()
    directory = tmp_path / "helper"
    storage_at(directory, introducer, "enabled = false")
    config = directory / "tahoe.cfg"
    text = config.read_text().replace("[storage]\nenabled = false\nenabled = true", "[storage]\nenabled = false")
    config.write_text(text.replace("[helper]\nenabled = false", "[helper]\nenabled = true"))
    helper, stop = ServerDirectory.open(directory), trio.Event()
    serving = await nursery.start(serve_node, helper, stop)
    assert serving.services == ("helper",) and serving.published.is_set()
    create_client_directory(tmp_path / "client", introducers=[introducer.furl_file.read_text()], shares=(1, 1, 1))
    config = tmp_path / "client" / "tahoe.cfg"
    furl = helper.furl_file.read_text().strip()
    config.write_text(config.read_text().replace("[client]\n", f"[client]\nhelper.furl = {furl}\n"))
    data = bytes(range(256)) * 400
    async with grid.join_grid(grid.NodeDirectory.open(tmp_path / "client")) as client:
        await client.need_servers(1)
        results = await client.upload(grid.DataUploadable(data, convergence=b""))
        assert results.pushed_shares == 1 and client.helper is not None and client.helper.connected
        assert await client.create_node_from_uri(results.uri).download_to_data() == data
        stop.set()
        await until(lambda: client.helper is not None and not client.helper.connected)
        again = await client.upload(grid.DataUploadable(data * 2, convergence=b""))
        assert again.pushed_shares == 1
    nursery.cancel_scope.cancel()


def announced(path: Path, text: str = "") -> dict[str, Any]:
    server = storage_at(path / "server", introducer_at(path / "introducer"), text)
    assert isinstance(server.storage, StorageSettings)
    return storage_announcement(server, server.storage, seqnum=7, nonce="nonce")


def test_the_announcement_is_as_tahoe_writes_it(tmp_path: Path) -> None:
    announcement = announced(tmp_path)
    server = ServerDirectory.open(tmp_path / "server")
    assert list(announcement) == [
        "version",
        "nickname",
        "app-versions",
        "my-version",
        "oldest-supported",
        "service-name",
        "permutation-seed-base32",
        "anonymous-storage-NURLs",
        "anonymous-storage-FURL",
        "seqnum",
        "nonce",
    ]
    assert server.signing_key is not None
    assert announcement["permutation-seed-base32"] == b2a(b2a(server.signing_key.public_bytes).encode())
    assert announcement["anonymous-storage-FURL"] == server.furl_file.read_text().strip()
    (nurl,) = announcement["anonymous-storage-NURLs"]
    swissnum = announcement["anonymous-storage-FURL"].rpartition("/")[2]
    assert nurl.endswith(f"@127.0.0.1:{server.endpoints[0].port}/{swissnum}#v=1")
    json.dumps(announcement)


def test_no_nurls_where_http_is_off(tmp_path: Path) -> None:
    assert "anonymous-storage-NURLs" not in announced(tmp_path, "force_foolscap = true")


async def test_what_is_in_use_is_said(tmp_path: Path) -> None:
    introducer = introducer_at(tmp_path / "introducer")
    server = storage_at(tmp_path / "server", introducer)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", server.endpoints[0].port))
        thief.listen()
        with pytest.RaisesGroup(
            pytest.RaisesExc(NodeDirectoryError, match="cannot listen"), flatten_subgroups=True, allow_unwrapped=True
        ):
            await serve_node(server, trio.Event())
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_node, server, stop)
        with pytest.RaisesGroup(
            pytest.RaisesExc(NodeDirectoryError, match="storage directory"), flatten_subgroups=True
        ):
            await serve_node(server, trio.Event())
        stop.set()


async def test_an_announcement_comes_again_to_an_introducer_that_was_restarted(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It forgets; the same announcement, with the same number, makes it know again."""
    monkeypatch.setattr("grid.peers.reconnect.INITIAL_DELAY_S", 0.02)
    seen: list[str] = []
    real = Introducer.remote_publish_v2

    async def publish(self: Introducer, announcement: Any, canary: Any) -> None:
        seen.append(json.loads(announcement[0])["nonce"])
        await real(self, announcement, canary)

    monkeypatch.setattr(Introducer, "remote_publish_v2", publish)
    introducer = introducer_at(tmp_path / "introducer")
    server = storage_at(tmp_path / "server", introducer)
    await nursery.start(serve_node, server, trio.Event())
    for run in (1, 2):
        stop = trio.Event()
        async with trio.open_nursery() as first:
            await first.start(serve_node, introducer, stop)
            await until(lambda run=run: len(seen) == run)
            stop.set()
    assert len(set(seen)) == 1
    nursery.cancel_scope.cancel()
