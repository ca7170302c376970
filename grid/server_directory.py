"""A server's node directory: which services `tahoefs run` finds in it, where they listen, and making new ones.

    tahoe-introducer.tac      makes the node an introducer; without it [storage] enabled decides (default: yes)
    tahoe-stats-gatherer.tac  makes it a statistics gatherer
    my_nodeid                 the tub id
    client.port, introducer.port     where the tub listens, when tub.port does not say; allocated once
    permutation-seed          base32 text, announced as it stands; fixed when the node first starts
    announcement-seqnum       decimal; one more at every start
    private/node.pem          certificate and key: the identity for both protocols
    private/introducer.furl, private/storage.furl, private/helper.furl     with the swissnum, which outlives restarts
    helper/                   ciphertext that an upload helper holds

What `tahoe` keeps is kept the same way, so that a directory can change hands. What we cannot do (plugins, Tor,
other endpoints than TCP) is refused rather than done differently.
Source: Tahoe-LAFS 1.20's node directory. Ours: `tub.location = AUTO` announces the address of the default route.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from attrs import field, frozen

from grid.atomic_file import replace_file
from grid.crypto import SigningKey, TubIdentity
from grid.errors import NodeDirectoryError
from grid.formats import base32
from grid.formats.furl import Furl
from grid.node_files import (
    Config,
    checked_nickname,
    make_node_directory,
    node_identity,
    parse_furl,
    read_introducers,
    read_node_key,
    read_stats_gatherer,
    read_text,
    refuse_anonymity,
)
from grid.storage_settings import StorageSettings, parse_size, read_reserved_space, read_storage_settings

SWISSNUM_BYTES: Final = 20
KEEPALIVE_DEFAULT_S: Final = 240.0

_NODE_TEXT: Final = """\
# -*- mode: conf; coding: utf-8 -*-
# Configuration of a Tahoe-LAFS {kind} node. Keys that Tahoe-LAFS does not know keep it from starting.

[node]
nickname = {nickname}
reveal-IP-address = true
web.port =
tub.port = {port}
tub.location = {location}
"""
_STORAGE_TEXT: Final = """
[storage]
enabled = true
# what must stay free on the disk
reserved_space = {reserved}

[helper]
enabled = false
"""


@frozen
class HelperSettings:
    """[helper], checked."""

    directory: Path
    reserved_space: int  # bytes that must stay free on the disk
    swissnum: str = field(repr=False)


class Endpoint(NamedTuple):
    """Where to listen."""

    host: str | None  # None: on every interface
    port: int


@frozen
class ServerDirectory:
    """What a server's node directory says, read once."""

    path: Path
    nickname: str
    identity: TubIdentity = field(repr=False)
    endpoints: tuple[Endpoint, ...]
    location: str  # hints of our FURLs, "tcp:HOST:PORT[,…]"
    introducer: str | None = field(repr=False)  # the swissnum, if this is an introducer
    storage: StorageSettings | None
    helper: HelperSettings | None
    gatherer: str | None = field(repr=False)  # the swissnum, if this is a statistics gatherer
    introducers: Mapping[str, Furl] = field(repr=False)  # where a storage server announces itself, by petname
    signing_key: SigningKey | None = field(repr=False)
    stats_gatherer: Furl | None = field(default=None, repr=False)  # where our statistics go
    keepalive_s: float = KEEPALIVE_DEFAULT_S

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the directory, making the files it lacks. Raises NodeDirectoryError, which says what to do."""
        path = Path(path).expanduser().absolute()
        if not path.is_dir():
            raise NodeDirectoryError(
                f"there is no node directory at {path}; "
                "make one with 'tahoefs create-introducer' or 'tahoefs create-storage'"
            )
        config = Config.read(path / "tahoe.cfg")
        refuse_anonymity(config)
        is_introducer = (path / "tahoe-introducer.tac").exists()
        is_gatherer = (path / "tahoe-stats-gatherer.tac").exists()
        alone = is_introducer or is_gatherer
        has_storage = not alone and config.boolean("storage", "enabled", True)
        has_helper = not alone and config.boolean("helper", "enabled", False)
        if not (alone or has_storage or has_helper):
            raise NodeDirectoryError(f"{path}: no service is enabled; see [storage] and [helper] in its tahoe.cfg")
        private = path / "private"
        try:
            private.mkdir(mode=0o700, exist_ok=True)
            identity = node_identity(private / "node.pem")
            replace_file(path / "my_nodeid", f"{identity.tub_id}\n".encode(), mode=0o644)
            kind = "introducer" if is_introducer else "stats_gatherer" if is_gatherer else "client"
            endpoints = _endpoints(config, path / f"{kind}.port")
            location = _location(config, endpoints)
            swissnum, gatherer, storage, helper, key = None, None, None, None, None
            if is_introducer:
                swissnum = _swissnum(private / "introducer.furl", identity, location)
            if is_gatherer:
                gatherer = _swissnum(private / "stats_gatherer.furl", identity, location)
            if has_storage:
                key = read_node_key(path)
                furl_name = _swissnum(private / "storage.furl", identity, location)
                storage = read_storage_settings(config, path, identity, key, furl_name)
            if has_helper:
                furl_name = _swissnum(private / "helper.furl", identity, location)
                helper = HelperSettings(path / "helper", read_reserved_space(config), furl_name)
        except OSError as error:
            raise NodeDirectoryError(f"cannot prepare {path}: {error.strerror}") from error
        return cls(
            path=path,
            nickname=config.text("node", "nickname", "<unspecified>"),
            identity=identity,
            endpoints=endpoints,
            location=location,
            introducer=swissnum,
            storage=storage,
            helper=helper,
            gatherer=gatherer,
            introducers={} if alone else read_introducers(config, private / "introducers.yaml"),
            signing_key=key,
            stats_gatherer=read_stats_gatherer(config),
            keepalive_s=config.seconds("node", "timeout.keepalive", KEEPALIVE_DEFAULT_S),
        )

    @property
    def furl_file(self) -> Path:
        """Of the first service it has."""
        services = {
            "introducer": self.introducer,
            "stats_gatherer": self.gatherer,
            "storage": self.storage,
            "helper": self.helper,
        }
        return self.path / "private" / f"{next(name for name, it in services.items() if it is not None)}.furl"

    def next_seqnum(self) -> int:
        """For one more announcement; kept, so that it is greater than all before. Raises NodeDirectoryError."""
        file = self.path / "announcement-seqnum"
        text = (read_text(file) or "").strip()
        if not re.fullmatch(r"[0-9]{0,18}", text):
            raise NodeDirectoryError(f"{file} is damaged: it does not hold a number")
        seqnum = int(text or 0) + 1
        try:
            replace_file(file, f"{seqnum}\n".encode(), mode=0o644)
        except OSError as error:
            raise NodeDirectoryError(f"cannot write {file}: {error.strerror}") from error
        return seqnum


def create_introducer_directory(
    path: Path | str, *, nickname: str = "", port: str | None = None, location: str | None = None
) -> None:
    """Make an introducer's node directory, which `tahoe` can run as well. Raises NodeDirectoryError.

    `port` is an endpoint (`tcp:PORT[:interface=ADDRESS]`), by default on a port that is free now; `location` are
    FURL hints (`tcp:HOST:PORT`), by default the interface's, or AUTO.
    """
    make_node_directory(
        Path(path).expanduser().absolute(), "introducer", _node_text("introducer", nickname, port, location)
    )


def create_gatherer_directory(
    path: Path | str, *, nickname: str = "", port: str | None = None, location: str | None = None
) -> None:
    """Make a statistics gatherer's node directory. See create_introducer_directory."""
    text = _node_text("stats-gatherer", nickname, port, location)
    make_node_directory(Path(path).expanduser().absolute(), "stats-gatherer", text)


def create_storage_directory(
    path: Path | str,
    *,
    introducers: Sequence[str],
    nickname: str = "",
    port: str | None = None,
    location: str | None = None,
    reserved_space: str = "1G",
) -> None:
    """Make a storage server's node directory, which `tahoe` can run as well. See create_introducer_directory."""
    parse_size(reserved_space)
    text = _node_text("storage", nickname, port, location) + _STORAGE_TEXT.format(reserved=reserved_space)
    make_node_directory(Path(path).expanduser().absolute(), "client", text, introducers)


def _node_text(kind: str, nickname: str, port: str | None, location: str | None) -> str:
    port = f"tcp:{free_port()}" if port is None else port.strip()
    endpoint = _endpoint(port)
    if endpoint is None:
        raise NodeDirectoryError(f"--port {port!r} is not an endpoint such as tcp:3457 or tcp:3457:interface=127.0.0.1")
    if location is None:
        location = "AUTO" if endpoint.host is None else _hint(endpoint.host, endpoint.port)
    if not _checked_location(location):
        raise NodeDirectoryError(f"--location {location!r} is not a list of hints such as tcp:example.org:3457")
    return _NODE_TEXT.format(kind=kind, nickname=checked_nickname(nickname), port=port, location=location)


def free_port(host: str = "") -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


# --- where -----------------------------------------------------------------------------------------------------------


def _endpoints(config: Config, port_file: Path) -> tuple[Endpoint, ...]:
    text = config.text("node", "tub.port", "").strip()
    if not text:
        text = (read_text(port_file) or "").strip()
    if not text:
        text = f"tcp:{free_port()}"
        replace_file(port_file, f"{text}\n".encode(), mode=0o644)
    if text.lower() == "disabled":
        raise config.wrong("node", "tub.port", "is 'disabled', but a server must listen")
    endpoints = [_endpoint(part.strip()) for part in text.split(",")]
    found = [endpoint for endpoint in endpoints if endpoint is not None]
    if len(found) != len(endpoints):
        raise config.wrong("node", "tub.port", "is not an endpoint such as tcp:3457 or tcp:3457:interface=127.0.0.1")
    return tuple(found)


def _endpoint(text: str) -> Endpoint | None:
    """`3457`, `tcp:3457`, `tcp:port=3457:interface=ADDRESS`; colons of an IPv6 address may be escaped."""
    parts = re.split(r"(?<!\\):", text)
    if parts[0] in ("tcp", "tcp6"):
        kind, *parts = parts
    else:
        kind = "tcp"
    port, host = "", "::" if kind == "tcp6" else None
    for number, part in enumerate(parts):
        name, equals, value = part.partition("=")
        if not equals and number == 0:
            port = part
        elif name == "port":
            port = value
        elif name == "interface":
            host = value.replace("\\:", ":").strip("[]")
        elif name != "backlog":
            return None
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
        return None
    return Endpoint(host, int(port))


def _location(config: Config, endpoints: Sequence[Endpoint]) -> str:
    text = config.text("node", "tub.location", "AUTO").strip() or "AUTO"
    hints: list[str] = []
    for hint in (part.strip() for part in text.split(",")):
        if hint == "AUTO":
            hints += [
                _hint(endpoint.host or host, endpoint.port) for endpoint in endpoints for host in _own_addresses()
            ]
        else:
            hints.append(hint)
    if not _checked_location(",".join(hints)):
        raise config.wrong("node", "tub.location", "is not a list of hints such as tcp:example.org:3457")
    return ",".join(dict.fromkeys(hints))


def _checked_location(text: str) -> bool:
    parts = [part.strip() for part in text.split(",")]
    return all(part == "AUTO" or re.fullmatch(r"[a-z0-9]+:[^,/\s]+", part) for part in parts)


def _hint(host: str, port: int) -> str:
    return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"


def _own_addresses() -> list[str]:
    """The address others see us under, as far as the routing table tells; nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address for documentation: it only has to be elsewhere
        return [probe.getsockname()[0], "127.0.0.1"]
    return ["127.0.0.1"]


# --- who -------------------------------------------------------------------------------------------------------------


def _swissnum(file: Path, identity: TubIdentity, location: str) -> str:
    """Of the FURL kept in `file`, which is written again with today's location."""
    text = read_text(file)
    if text is None:
        swissnum = base32.b2a(secrets.token_bytes(SWISSNUM_BYTES))
    else:
        furl = parse_furl(text.strip(), str(file))
        if furl.tub_id != identity.tub_id:
            raise NodeDirectoryError(
                f"{file} is of another identity than private/node.pem: one of the two was replaced"
            )
        swissnum = furl.name
    wanted = f"pb://{identity.tub_id}@{location}/{swissnum}\n"
    if text != wanted:
        replace_file(file, wanted.encode())
    return swissnum
