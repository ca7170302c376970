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

import configparser
import contextlib
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self

import yaml
from attrs import field, frozen

from grid.atomic_file import create_file
from grid.crypto import SigningKey
from grid.errors import FormatError, NodeDirectoryError
from grid.formats import base32
from grid.formats.furl import Furl

CONVERGENCE_BYTES: Final = 32
LEASE_SECRET_BYTES: Final = 32
KEEPALIVE_DEFAULT_S: Final = 240.0
SHARES_MAX: Final = 256  # of an erasure code; a mutable file takes one less
_FILE_BYTES_MAX: Final = 16 << 20
_INTRODUCERS_MAX: Final = 64
_PETNAME_DEFAULT: Final = "default"
_PUBLIC_KEY_PREFIX: Final = "pub-v0-"
_PRIVATE_KEY_PREFIX: Final = "priv-v0-"

_TAC_TEXT: Final = """\
# This file marks the directory as that of a Tahoe-LAFS client node. Nothing reads its contents.
"""
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
        config = _Config.read(path / "tahoe.cfg")
        _refuse_anonymity(config)
        private = path / "private"
        try:
            private.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise NodeDirectoryError(f"cannot make {private}: {error.strerror}") from error
        _ensure_node_key(path)
        return cls(
            path=path,
            nickname=config.text("node", "nickname", "<unspecified>"),
            encoding=_encoding(config),
            mutable_format=_mutable_format(config),
            convergence=_secret_file(private / "convergence", CONVERGENCE_BYTES),
            lease_secret=_secret_file(private / "secret", LEASE_SECRET_BYTES, exact=True),
            introducers=_introducers(config, private / "introducers.yaml"),
            static_servers=_static_servers(private / "servers.yaml"),
            preferred=tuple(i for i in re.split(r"[,\s]+", config.text("client", "peers.preferred", "")) if i),
            grid_manager_keys=_grid_manager_keys(config),
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
    if not nickname.isprintable():
        raise NodeDirectoryError("a nickname is one line of printable text")
    entries = {}
    for number, furl in enumerate(introducers, start=1):
        petname = _PETNAME_DEFAULT if number == 1 else f"introducer{number}"
        entries[petname] = {"furl": str(_furl(furl.strip(), "the introducer FURL given"))}
    config = _CONFIG_TEXT.format(
        nickname=nickname.strip().replace("%", "%%"), needed=encoding.k, happy=encoding.happy, total=encoding.n
    )
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise NodeDirectoryError(f"{path} is not empty; a new node directory needs an empty or new one")
        private = path / "private"
        private.mkdir(mode=0o700)
        if entries:
            listed = yaml.safe_dump({"introducers": entries}, default_flow_style=False)
            create_file(private / "introducers.yaml", listed.encode())
        create_file(path / "tahoe-client.tac", _TAC_TEXT.encode(), mode=0o644)
        create_file(path / "tahoe.cfg", config.encode(), mode=0o644)  # last: it is what makes this a node directory
    except OSError as error:
        raise NodeDirectoryError(f"cannot make the node directory {path}: {error.strerror}") from error


# --- tahoe.cfg ------------------------------------------------------------------------------------------------------


@frozen
class _Config:
    path: Path
    parser: configparser.ConfigParser

    @classmethod
    def read(cls, path: Path) -> Self:
        text = _read_text(path)
        if text is None:
            raise NodeDirectoryError(f"there is no {path}, so this is no node directory; see 'tahoefs create-client'")
        # strict=False: of a key given twice the last counts. Interpolation stays on: "%%" stands for "%"
        parser = configparser.ConfigParser(strict=False)
        try:
            parser.read_string(text)
        except configparser.Error as error:
            raise NodeDirectoryError(
                f"{path} is no valid configuration: {type(error).__name__}"
            ) from None  # it quotes the file
        return cls(path, parser)

    def text(self, section: str, key: str, default: str) -> str:
        try:
            return self.parser.get(section, key)
        except (configparser.NoSectionError, configparser.NoOptionError):
            return default
        except configparser.InterpolationError:
            raise self.wrong(section, key, "has a lone '%' (write '%%')") from None

    def boolean(self, section: str, key: str, default: bool) -> bool:
        text = self.text(section, key, str(default)).lower()
        if text not in configparser.ConfigParser.BOOLEAN_STATES:
            raise self.wrong(section, key, "is neither true nor false")
        return configparser.ConfigParser.BOOLEAN_STATES[text]

    def seconds(self, section: str, key: str, default: float) -> float:
        text = self.text(section, key, "").strip()
        if not text:
            return default
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) == 0:
            raise self.wrong(section, key, "is not a number of seconds")
        return float(text)

    def integer(self, section: str, key: str, default: int) -> int:
        text = self.text(section, key, str(default)).strip()
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise self.wrong(section, key, "is not a whole number")
        return int(text)

    def items(self, section: str) -> dict[str, str]:
        names = self.parser.options(section) if self.parser.has_section(section) else []
        return {name: self.text(section, name, "") for name in names}

    def wrong(self, section: str, key: str, what: str) -> NodeDirectoryError:
        return NodeDirectoryError(f"{self.path}: [{section}] {key} {what}")


def _encoding(config: _Config) -> Encoding:
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


def _mutable_format(config: _Config) -> Literal["sdmf", "mdmf"]:
    match config.text("client", "mutable.format", "SDMF").strip().lower():
        case "sdmf" | "":
            return "sdmf"
        case "mdmf":
            return "mdmf"
        case _:
            raise config.wrong("client", "mutable.format", "is neither SDMF nor MDMF")


def _grid_manager_keys(config: _Config) -> tuple[bytes, ...]:
    keys = []
    for name, text in config.items("grid_managers").items():
        try:
            key = base32.a2b(text.strip().removeprefix(_PUBLIC_KEY_PREFIX))
        except FormatError:
            key = b""
        if len(key) != 32 or not text.strip().startswith(_PUBLIC_KEY_PREFIX):
            raise config.wrong("grid_managers", name, f"is not a public key ({_PUBLIC_KEY_PREFIX}…)")
        keys.append(key)
    return tuple(keys)


def _refuse_anonymity(config: _Config) -> None:
    """Whoever hides behind Tor must not be shown by us: better no connection than one over plain TCP."""
    if config.text("connections", "tcp", "tcp").strip().lower() not in ("tcp", ""):
        raise config.wrong("connections", "tcp", "asks for Tor or no TCP at all, which tahoefs cannot do")
    if not config.boolean("node", "reveal-IP-address", True):
        raise config.wrong("node", "reveal-IP-address", "is false, and tahoefs can only connect over plain TCP")


# --- the other files ------------------------------------------------------------------------------------------------


def _introducers(config: _Config, path: Path) -> dict[str, Furl]:
    listed = _read_yaml(path).get("introducers") or {}
    if not isinstance(listed, dict) or len(listed) > _INTRODUCERS_MAX:
        raise NodeDirectoryError(f"{path}: 'introducers' is not a mapping of at most {_INTRODUCERS_MAX} names")
    introducers = {}
    for petname, entry in listed.items():
        furl = entry.get("furl") if isinstance(entry, dict) else None
        if not isinstance(furl, str):
            raise NodeDirectoryError(f"{path}: introducer {petname!r} has no furl")
        introducers[str(petname)] = _furl(furl.strip(), f"{path}: the furl of introducer {petname!r}")
    if old := config.text("client", "introducer.furl", "").strip():
        if _PETNAME_DEFAULT in introducers:
            raise config.wrong("client", "introducer.furl", f"and {path} both name the introducer 'default'")
        introducers[_PETNAME_DEFAULT] = _furl(old, f"{config.path}: [client] introducer.furl")
    return introducers


def _static_servers(path: Path) -> dict[str, dict[str, Any]]:
    listed = _read_yaml(path).get("storage") or {}
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


def _secret_file(path: Path, size: int, *, exact: bool = False) -> bytes:
    text = _read_text(path)
    if text is None:
        fresh = f"{base32.b2a(secrets.token_bytes(size))}\n".encode()
        try:
            with contextlib.suppress(FileExistsError):  # another program made it just now: use that one
                create_file(path, fresh)
        except OSError as error:
            raise NodeDirectoryError(f"cannot make {path}: {error.strerror}") from error
        text = _read_text(path) or ""
    try:
        secret = base32.a2b(text.strip())
    except FormatError as error:
        raise NodeDirectoryError(f"{path} is damaged: its contents are not base32") from error
    if exact and len(secret) != size:
        raise NodeDirectoryError(f"{path} is damaged: it does not hold {size} bytes in base32")
    return secret


def _ensure_node_key(path: Path) -> None:
    """`private/node.privkey` and `node.pubkey`: unused by a mere client, but every node has them."""
    if os.path.lexists(path / "private" / "node.privkey"):
        return
    seed = secrets.token_bytes(32)
    public = SigningKey.from_seed(seed).public_bytes
    try:
        with contextlib.suppress(FileExistsError):
            create_file(path / "private" / "node.privkey", f"{_PRIVATE_KEY_PREFIX}{base32.b2a(seed)}\n".encode())
            with contextlib.suppress(FileNotFoundError):
                (path / "node.pubkey").unlink()
            create_file(path / "node.pubkey", f"{_PUBLIC_KEY_PREFIX}{base32.b2a(public)}\n".encode(), mode=0o644)
    except OSError as error:
        raise NodeDirectoryError(f"cannot make the node key in {path}: {error.strerror}") from error


def _furl(text: str, where: str) -> Furl:
    try:
        if "#" in text:  # someone wrote a comment behind it; `tahoe` refuses that too
            raise FormatError("'#' in a FURL")
        return Furl.parse(text)
    except FormatError as error:
        raise NodeDirectoryError(f"{where} is not a valid FURL (pb://…@host:port/…)") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        contents = yaml.safe_load(text) if text else None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        # the error's own text would quote the file, which holds FURLs
        mark = getattr(error, "problem_mark", None)
        line = f" near line {mark.line + 1}" if mark else ""
        raise NodeDirectoryError(f"{path} is not valid YAML{line}") from None
    if contents is None:
        return {}
    if not isinstance(contents, dict):
        raise NodeDirectoryError(f"{path}: a mapping is expected")
    return contents


def _read_text(path: Path) -> str | None:
    """The file's text, a byte order mark left out; None when there is no file."""
    try:
        with path.open("rb") as file:
            contents = file.read(_FILE_BYTES_MAX + 1)
        if len(contents) > _FILE_BYTES_MAX:
            raise NodeDirectoryError(f"{path} is larger than {_FILE_BYTES_MAX} bytes")
        return contents.decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise NodeDirectoryError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise NodeDirectoryError(f"cannot read {path}: {error.strerror}") from error
