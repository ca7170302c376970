"""A node directory: who we are on a grid, where its servers are, and the secrets that go with it.

    tahoe.cfg                     INI, see below; read, never written once it exists
    tahoe-client.tac              its name tells `tahoe` what kind of node this is; its text is ours
    node.pubkey                   pub-v0-BASE32
    private/  (mode 0700)
        secret, convergence       BASE32 of 32 random bytes, LF
        node.privkey              priv-v0-BASE32, an Ed25519 seed
        introducers.yaml          introducers: {PETNAME: {furl: FURL}}
        servers.yaml              storage: {SERVER ID: {ann: {…}}}
        aliases, root_dir.cap     see grid/aliases.py

Missing private files are made when the directory is opened, as `tahoe run` makes them. Options of our own
never go into tahoe.cfg: `tahoe` refuses to start on a key it does not know.

Source: Tahoe-LAFS 1.20's node directory. Ours: a directory that hides its address (Tor, I2P) is refused
rather than used over TCP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self

from attrs import field, frozen

from grid.errors import FormatError, NodeDirectoryError
from grid.formats import base32
from grid.formats.furl import Furl
from grid.node_files import (
    PUBLIC_KEY_PREFIX,
    Config,
    checked_nickname,
    ensure_node_key,
    make_node_directory,
    parse_furl,
    read_introducers,
    read_stats_gatherer,
    read_yaml,
    refuse_anonymity,
    secret_file,
)

CONVERGENCE_BYTES: Final = 32
LEASE_SECRET_BYTES: Final = 32
KEEPALIVE_DEFAULT_S: Final = 240.0
SHARES_MAX: Final = 256  # of an erasure code; a mutable file takes one less

_CONFIG_TEXT: Final = """\
# -*- mode: conf; coding: utf-8 -*-
# Configuration of a Tahoe-LAFS client node. Keys that Tahoe-LAFS does not know keep it from starting.

[node]
nickname = {nickname}
reveal-IP-address = true
web.port = tcp:3456:interface=127.0.0.1
web.static = public_html
tub.port = disabled
tub.location = disabled

[connections]
tcp = tcp

[client]
# how files are spread: shares that suffice to read one, servers that must each hold one, shares made
shares.needed = {needed}
shares.happy = {happy}
shares.total = {total}

[storage]
enabled = false

[helper]
enabled = false
"""


class Encoding(NamedTuple):
    """How new files are spread."""

    k: int  # shares needed to read
    happy: int  # servers that must each hold a share of their own
    n: int  # shares made


@frozen
class NodeDirectory:
    """What a node directory says, read once. A change on disk is seen by the next `open`."""

    path: Path
    nickname: str
    encoding: Encoding
    mutable_format: Literal["sdmf", "mdmf"]
    convergence: bytes = field(repr=False)
    lease_secret: bytes = field(repr=False)
    introducers: Mapping[str, Furl] = field(repr=False)  # by petname
    static_servers: Mapping[str, Mapping[str, Any]] = field(repr=False)  # server id -> announcement
    preferred: tuple[str, ...] = ()  # server ids
    grid_manager_keys: tuple[bytes, ...] = ()  # Ed25519 public keys, 32 bytes each
    helper: Furl | None = field(default=None, repr=False)  # who uploads for us
    stats_gatherer: Furl | None = field(default=None, repr=False)  # where our statistics go
    force_foolscap: bool = False
    keepalive_s: float = KEEPALIVE_DEFAULT_S

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the directory, making the private files it lacks. Raises NodeDirectoryError, which says what to do."""
        path = Path(path).expanduser().absolute()
        if not path.is_dir():
            raise NodeDirectoryError(
                f"there is no node directory at {path}; "
                f"make one with 'tahoefs create-client {path} --introducer FURL', or name another with --node-dir"
            )
        config = Config.read(path / "tahoe.cfg")
        refuse_anonymity(config)
        private = path / "private"
        try:
            private.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise NodeDirectoryError(f"cannot make {private}: {error.strerror}") from error
        ensure_node_key(path)
        return cls(
            path=path,
            nickname=config.text("node", "nickname", "<unspecified>"),
            encoding=_encoding(config),
            mutable_format=_mutable_format(config),
            convergence=secret_file(private / "convergence", CONVERGENCE_BYTES),
            lease_secret=secret_file(private / "secret", LEASE_SECRET_BYTES, exact=True),
            introducers=read_introducers(config, private / "introducers.yaml"),
            static_servers=_static_servers(private / "servers.yaml"),
            preferred=tuple(i for i in re.split(r"[,\s]+", config.text("client", "peers.preferred", "")) if i),
            grid_manager_keys=_grid_manager_keys(config),
            helper=_helper(config),
            stats_gatherer=read_stats_gatherer(config),
            force_foolscap=config.boolean("client", "force_foolscap", False),
            keepalive_s=config.seconds("node", "timeout.keepalive", KEEPALIVE_DEFAULT_S),
        )


def create_client_directory(
    path: Path | str,
    *,
    introducers: Sequence[str],
    nickname: str = "",
    shares: tuple[int, int, int] = (3, 7, 10),
) -> None:
    """Make a client's node directory that `tahoe` can use as well. Raises NodeDirectoryError.

    `introducers` are FURLs; `shares` are (needed, happy, total). The directory must not exist, or be empty.
    """
    path = Path(path).expanduser().absolute()
    encoding = _checked_encoding(*shares)
    config = _CONFIG_TEXT.format(
        nickname=checked_nickname(nickname), needed=encoding.k, happy=encoding.happy, total=encoding.n
    )
    make_node_directory(path, "client", config, introducers)


# --- tahoe.cfg ------------------------------------------------------------------------------------------------------


def _encoding(config: Config) -> Encoding:
    k = config.integer("client", "shares.needed", 3)
    happy = config.integer("client", "shares.happy", 7)
    n = config.integer("client", "shares.total", 10)
    try:
        return _checked_encoding(k, happy, n)
    except NodeDirectoryError as error:
        raise NodeDirectoryError(f"{config.path}: [client] shares.*: {error}") from None


def _checked_encoding(k: int, happy: int, n: int) -> Encoding:
    if not (1 <= k <= n <= SHARES_MAX and 1 <= happy <= n):
        raise NodeDirectoryError(
            f"shares needed/happy/total are {k}/{happy}/{n}; "
            f"1 ≤ needed ≤ total, 1 ≤ happy ≤ total and total ≤ {SHARES_MAX} must hold"
        )
    return Encoding(k, happy, n)


def _mutable_format(config: Config) -> Literal["sdmf", "mdmf"]:
    match config.text("client", "mutable.format", "SDMF").strip().lower():
        case "sdmf" | "":
            return "sdmf"
        case "mdmf":
            return "mdmf"
        case _:
            raise config.wrong("client", "mutable.format", "is neither SDMF nor MDMF")


def _helper(config: Config) -> Furl | None:
    text = config.text("client", "helper.furl", "").strip()
    return None if text in ("", "None") else parse_furl(text, f"{config.path}: [client] helper.furl")


def _grid_manager_keys(config: Config) -> tuple[bytes, ...]:
    keys = []
    for name, text in config.items("grid_managers").items():
        try:
            key = base32.a2b(text.strip().removeprefix(PUBLIC_KEY_PREFIX))
        except FormatError:
            key = b""
        if len(key) != 32 or not text.strip().startswith(PUBLIC_KEY_PREFIX):
            raise config.wrong("grid_managers", name, f"is not a public key ({PUBLIC_KEY_PREFIX}…)")
        keys.append(key)
    return tuple(keys)


# --- the other files ------------------------------------------------------------------------------------------------


def _static_servers(path: Path) -> dict[str, dict[str, Any]]:
    listed = read_yaml(path).get("storage") or {}
    if not isinstance(listed, dict):
        raise NodeDirectoryError(f"{path}: 'storage' is not a mapping")
    servers = {}
    for server_id, entry in listed.items():
        # other handlers for a server's hints mean Tor: such a server is left out, like one that does not parse
        if isinstance(entry, dict) and isinstance(entry.get("ann"), dict):
            handlers = entry.get("connections") or {}
            if isinstance(handlers, dict) and handlers.get("tcp", "tcp") == "tcp":
                servers[str(server_id)] = entry["ann"]
    return servers
