"""A server's node directory: what is read from it, what is made in it, what is refused."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from grid.errors import NodeDirectoryError
from grid.formats.base32 import a2b
from grid.formats.furl import Furl
from grid.server_directory import (
    Endpoint,
    ServerDirectory,
    create_introducer_directory,
    create_storage_directory,
)
from grid.storage_settings import Expiry, parse_size

INTRODUCER = "pb://aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa@tcp:127.0.0.1:9/swissnum"
PORT = "tcp:3457:interface=127.0.0.1"


def storage(path: Path, text: str = "", **options: Any) -> ServerDirectory:
    create_storage_directory(path, introducers=[INTRODUCER], port=PORT, **options)
    config = path / "tahoe.cfg"
    config.write_text(config.read_text().replace("[storage]\n", f"[storage]\n{text}\n"))
    return ServerDirectory.open(path)


def test_an_introducer(tmp_path: Path) -> None:
    create_introducer_directory(tmp_path / "node", nickname="50% ünique", port=PORT)
    node = ServerDirectory.open(tmp_path / "node")
    furl = Furl.parse((tmp_path / "node" / "private" / "introducer.furl").read_text())
    assert (furl.tub_id, furl.hints, furl.name) == (node.identity.tub_id, ("tcp:127.0.0.1:3457",), node.introducer)
    assert (node.nickname, node.storage, node.endpoints) == ("50% ünique", None, (Endpoint("127.0.0.1", 3457),))
    assert (tmp_path / "node" / "my_nodeid").read_text() == f"{node.identity.tub_id}\n"
    assert stat.S_IMODE((tmp_path / "node" / "private" / "node.pem").stat().st_mode) == 0o600
    assert furl.name not in repr(node)


def test_a_storage_server_and_what_stays_the_same(tmp_path: Path) -> None:
    first = storage(tmp_path / "node", reserved_space="5Gi")
    again = ServerDirectory.open(tmp_path / "node")
    assert first.storage is not None and first.signing_key is not None and again.signing_key is not None
    assert again.storage == first.storage and again.identity.tub_id == first.identity.tub_id
    assert again.signing_key.public_bytes == first.signing_key.public_bytes
    assert (first.storage.reserved_space, first.storage.http, first.storage.readonly) == (5 << 30, True, False)
    assert first.storage.expiry == Expiry() and list(first.introducers) == ["default"]
    assert [first.next_seqnum(), again.next_seqnum()] == [1, 2]
    assert (tmp_path / "node" / "announcement-seqnum").read_text() == "2\n"


def test_a_helper(tmp_path: Path) -> None:
    """Alone, or beside the storage; its FURL stays the same, and never shows."""
    node = storage(tmp_path / "both", reserved_space="5Gi")
    assert node.helper is None
    config = tmp_path / "both" / "tahoe.cfg"
    config.write_text(config.read_text().replace("[helper]\nenabled = false", "[helper]\nenabled = true"))
    node, again = ServerDirectory.open(tmp_path / "both"), ServerDirectory.open(tmp_path / "both")
    assert node.helper is not None and again.helper == node.helper
    assert (node.helper.directory, node.helper.reserved_space) == (tmp_path / "both" / "helper", 5 << 30)
    furl = Furl.parse((tmp_path / "both" / "private" / "helper.furl").read_text())
    assert (furl.tub_id, furl.name) == (node.identity.tub_id, node.helper.swissnum)
    assert furl.name not in repr(node) and node.furl_file.name == "storage.furl"
    config.write_text(
        config.read_text().replace("[storage]\n", "[storage]\nenabled = false\n").replace("enabled = true\n#", "#")
    )
    alone = ServerDirectory.open(tmp_path / "both")
    assert alone.storage is None and alone.helper == node.helper and alone.furl_file.name == "helper.furl"


def test_permutation_seeds(tmp_path: Path) -> None:
    """A fresh server has base32 of base32 text, one with shares from before its tub id; what is set stays."""
    fresh = storage(tmp_path / "fresh")
    public = (tmp_path / "fresh" / "node.pubkey").read_text().strip().removeprefix("pub-v0-")
    assert fresh.storage is not None and a2b(fresh.storage.permutation_seed).decode() == public
    assert (tmp_path / "fresh" / "permutation-seed").read_text() == f"{fresh.storage.permutation_seed}\n"
    (tmp_path / "fresh" / "storage" / "shares" / "aa" / ("a" * 26)).mkdir(parents=True)
    assert ServerDirectory.open(tmp_path / "fresh").storage == fresh.storage
    (tmp_path / "fresh" / "permutation-seed").unlink()
    old = ServerDirectory.open(tmp_path / "fresh")
    assert old.storage is not None and old.storage.permutation_seed == old.identity.tub_id


def test_a_new_location_leaves_the_swissnum(tmp_path: Path) -> None:
    node = storage(tmp_path / "node")
    config = tmp_path / "node" / "tahoe.cfg"
    config.write_text(
        re.sub("tub.location = .*", "tub.location = tcp:example.org:1, tor:x.onion:2", config.read_text())
    )
    moved = ServerDirectory.open(tmp_path / "node")
    assert node.storage is not None and moved.storage is not None
    assert moved.storage.swissnum == node.storage.swissnum
    assert moved.furl_file.read_text().strip() == (
        f"pb://{node.identity.tub_id}@tcp:example.org:1, tor:x.onion:2/{node.storage.swissnum}".replace(", ", ",")
    )


@pytest.mark.parametrize(
    ("port", "endpoint"),
    [
        ("3457", Endpoint(None, 3457)),
        ("tcp:3457", Endpoint(None, 3457)),
        ("tcp:port=3457:interface=127.0.0.1", Endpoint("127.0.0.1", 3457)),
        (r"tcp6:3457:interface=\:\:1", Endpoint("::1", 3457)),
        ("tcp6:3457", Endpoint("::", 3457)),
    ],
)
def test_endpoints(tmp_path: Path, port: str, endpoint: Endpoint) -> None:
    create_introducer_directory(tmp_path / "node", port=port)
    assert ServerDirectory.open(tmp_path / "node").endpoints == (endpoint,)


def test_a_port_is_allocated_once_where_none_is_configured(tmp_path: Path) -> None:
    storage(tmp_path / "node")
    config = tmp_path / "node" / "tahoe.cfg"
    config.write_text(re.sub("tub.(port|location) = .*\n", "", config.read_text()))
    first = ServerDirectory.open(tmp_path / "node")
    assert first.endpoints == ServerDirectory.open(tmp_path / "node").endpoints
    assert all(hint.endswith(f":{first.endpoints[0].port}") for hint in first.location.split(","))


@pytest.mark.parametrize("port", ["tcp:0", "tcp:70000", "tcp:x", "unix:/tmp/x", "listen:tor", "disabled", ""])
def test_ports_that_are_none(tmp_path: Path, port: str) -> None:
    with pytest.raises(NodeDirectoryError, match="not an endpoint"):
        create_introducer_directory(tmp_path / "node", port=port)
    assert not (tmp_path / "node").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("expire.enabled = false\nexpire.mode =", Expiry()),
        ("expire.enabled = true\nexpire.mode = age", Expiry(True)),
        (
            "expire.enabled = true\nexpire.mode = age\nexpire.override_lease_duration=60 days\nexpire.mutable=no",
            Expiry(True, "age", 60 * 86400, None, frozenset({"immutable"})),
        ),
        (
            "expire.enabled = true\nexpire.mode = cutoff-date\nexpire.cutoff_date = 2009-01-02",
            Expiry(True, "cutoff-date", None, 1230854400),
        ),
        (
            "expire.enabled = yes\nexpire.mode = age\nexpire.override_lease_duration = 2mo",
            Expiry(True, "age", 62 * 86400),
        ),
    ],
)
def test_expiry(tmp_path: Path, text: str, expected: Expiry) -> None:
    settings = storage(tmp_path / "node", text).storage
    assert settings is not None and settings.expiry == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("expire.enabled = true", "expire.mode"),
        (
            "expire.enabled = true\nexpire.mode = age\nexpire.override_lease_duration = 1 week",
            "override_lease_duration",
        ),
        ("expire.enabled = true\nexpire.mode = cutoff-date\nexpire.cutoff_date = soon", "expire.cutoff_date"),
        ("reserved_space = lots", "reserved_space"),
        ("anonymous = false", "anonymous"),
        ("debug_discard = true", "debug_discard"),
        ("grid_management = true\n[grid_manager_certificates]\nx = missing.cert", "grid_manager_certificates"),
        ("enabled = false", "no service is enabled"),
        ("enabled = maybe", "enabled"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, named: str) -> None:
    create_storage_directory(tmp_path / "node", introducers=[INTRODUCER], port=PORT)
    config = tmp_path / "node" / "tahoe.cfg"
    config.write_text(re.sub(r"(?s)\[storage\].*", f"[storage]\n{text}\n", config.read_text()))
    with pytest.raises(NodeDirectoryError, match=named):
        ServerDirectory.open(tmp_path / "node")


def test_grid_manager_certificates_are_passed_on_as_they_are(tmp_path: Path) -> None:
    storage(tmp_path / "node")
    entry = {"certificate": '{"expires":"x"}', "signature": "abc"}
    (tmp_path / "node" / "x.cert").write_text(json.dumps(entry))
    config = tmp_path / "node" / "tahoe.cfg"
    config.write_text(
        config.read_text().replace(
            "[storage]", "[grid_manager_certificates]\nx = x.cert\n[storage]\ngrid_management = on"
        )
    )
    settings = ServerDirectory.open(tmp_path / "node").storage
    assert settings is not None and settings.certificates == (entry,)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("private/node.pem", "nonsense"),
        ("private/node.privkey", "priv-v0-aaaa\n"),
        ("private/storage.furl", "nonsense\n"),
        ("private/storage.furl", INTRODUCER + "\n"),
        ("permutation-seed", "!!\n"),
    ],
)
def test_damage_is_named_and_nothing_replaced(tmp_path: Path, file: str, text: str) -> None:
    storage(tmp_path / "node")
    (tmp_path / "node" / file).write_text(text)
    with pytest.raises(NodeDirectoryError, match=re.escape(Path(file).name)) as raised:
        ServerDirectory.open(tmp_path / "node")
    assert "swissnum" not in str(raised.value)
    assert (tmp_path / "node" / file).read_text() == text


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("10G", 10**10), ("1Gi", 1 << 30), ("5kb", 5000), ("3 ", 3), ("2MiB", 2 << 20), ("1E", 10**18)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "1.5G", "-1", "1 G", "i", "5iB", "G", "1GG"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(NodeDirectoryError):
        parse_size(text)
