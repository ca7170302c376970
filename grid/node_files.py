"""The files that every node directory has, a client's and a server's: reading them, making those that are missing.

    tahoe.cfg                     INI; read, never written once it exists
    tahoe-KIND.tac                its name tells `tahoe` what kind of node this is; its text is ours
    node.pubkey                   pub-v0-BASE32
    private/  (mode 0700)
        node.pem                  certificate and key of the node's tub
        secret, convergence       BASE32 of 32 random bytes, LF
        node.privkey              priv-v0-BASE32, an Ed25519 seed
        introducers.yaml          introducers: {PETNAME: {furl: FURL}}

Errors are NodeDirectoryErrors that say what to do; they never quote a file that holds secrets.
Source: Tahoe-LAFS 1.20's node directory.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from attrs import frozen

from grid.atomic_file import create_file
from grid.crypto import SigningKey, TubIdentity, load_tub_identity, make_tub_identity
from grid.errors import FormatError, NodeDirectoryError
from grid.formats import base32
from grid.formats.furl import Furl

PUBLIC_KEY_PREFIX: Final = "pub-v0-"
PRIVATE_KEY_PREFIX: Final = "priv-v0-"
PETNAME_DEFAULT: Final = "default"
FILE_BYTES_MAX: Final = 16 << 20
INTRODUCERS_MAX: Final = 64

Kind = Literal["client", "introducer", "stats-gatherer"]  # a storage server is a client that serves

_TAC_TEXT: Final = """\
# This file marks the directory as that of a Tahoe-LAFS {kind} node. Nothing reads its contents.
"""


@frozen
class Config:
    """tahoe.cfg. Every value that does not parse is an error that names its key."""

    path: Path
    parser: configparser.ConfigParser

    @classmethod
    def read(cls, path: Path) -> Self:
        text = read_text(path)
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


def secret_file(path: Path, size: int, *, exact: bool = False) -> bytes:
    """The bytes a file holds in base32; `size` random ones if there is no such file yet."""
    text = read_text(path)
    if text is None:
        fresh = f"{base32.b2a(secrets.token_bytes(size))}\n".encode()
        try:
            with contextlib.suppress(FileExistsError):  # another program made it just now: use that one
                create_file(path, fresh)
        except OSError as error:
            raise NodeDirectoryError(f"cannot make {path}: {error.strerror}") from error
        text = read_text(path) or ""
    try:
        secret = base32.a2b(text.strip())
    except FormatError as error:
        raise NodeDirectoryError(f"{path} is damaged: its contents are not base32") from error
    if exact and len(secret) != size:
        raise NodeDirectoryError(f"{path} is damaged: it does not hold {size} bytes in base32")
    return secret


def ensure_node_key(path: Path) -> None:
    """`private/node.privkey` and `node.pubkey`: unused by a mere client, but every node has them."""
    file = path / "private" / "node.privkey"
    if os.path.lexists(file):
        return
    seed = secrets.token_bytes(32)
    public = SigningKey.from_seed(seed).public_bytes
    try:
        with contextlib.suppress(FileExistsError):
            create_file(file, f"{PRIVATE_KEY_PREFIX}{base32.b2a(seed)}\n".encode())
            with contextlib.suppress(FileNotFoundError):
                (path / "node.pubkey").unlink()
            create_file(path / "node.pubkey", f"{PUBLIC_KEY_PREFIX}{base32.b2a(public)}\n".encode(), mode=0o644)
    except OSError as error:
        raise NodeDirectoryError(f"cannot make the node key in {path}: {error.strerror}") from error


def read_node_key(path: Path) -> SigningKey:
    """The key a server signs its announcements with; made when missing."""
    ensure_node_key(path)
    file = path / "private" / "node.privkey"
    text = (read_text(file) or "").strip()
    try:
        seed = base32.a2b(text.removeprefix(PRIVATE_KEY_PREFIX))
    except FormatError:
        seed = b""
    if not text.startswith(PRIVATE_KEY_PREFIX) or len(seed) != 32:
        raise NodeDirectoryError(f"{file} is damaged: it does not hold a key ({PRIVATE_KEY_PREFIX}…)")
    return SigningKey.from_seed(seed)


def node_identity(file: Path) -> TubIdentity:
    """The certificate and key in `private/node.pem`; made when missing. Raises OSError, NodeDirectoryError."""
    pem = read_text(file)
    if pem is None:
        with contextlib.suppress(FileExistsError):
            create_file(file, make_tub_identity().pem)
        pem = read_text(file) or ""
    try:
        return load_tub_identity(pem.encode())
    except FormatError:
        raise NodeDirectoryError(f"{file} is damaged: it does not hold a certificate and its key") from None


def read_stats_gatherer(config: Config) -> Furl | None:
    """Where statistics go: `stats_gatherer.furl` in the node directory, or that key, which `tahoe` 1.20 refuses."""
    file = config.path.parent / "stats_gatherer.furl"
    if text := (read_text(file) or "").strip():
        return parse_furl(text, str(file))
    if text := config.text("client", "stats_gatherer.furl", "").strip():
        return parse_furl(text, f"{config.path}: [client] stats_gatherer.furl")
    return None


def parse_furl(text: str, where: str) -> Furl:
    """`where` is what the error calls it."""
    try:
        if "#" in text:  # someone wrote a comment behind it; `tahoe` refuses that too
            raise FormatError("'#' in a FURL")
        return Furl.parse(text)
    except FormatError as error:
        raise NodeDirectoryError(f"{where} is not a valid FURL (pb://…@host:port/…)") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty when there is no file."""
    text = read_text(path)
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


def read_text(path: Path) -> str | None:
    """The file's text, a byte order mark left out; None when there is no file."""
    try:
        with path.open("rb") as file:
            contents = file.read(FILE_BYTES_MAX + 1)
        if len(contents) > FILE_BYTES_MAX:
            raise NodeDirectoryError(f"{path} is larger than {FILE_BYTES_MAX} bytes")
        return contents.decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise NodeDirectoryError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise NodeDirectoryError(f"cannot read {path}: {error.strerror}") from error


def read_introducers(config: Config, path: Path) -> dict[str, Furl]:
    """{petname: FURL}, from introducers.yaml and the key in tahoe.cfg that it replaced."""
    listed = read_yaml(path).get("introducers") or {}
    if not isinstance(listed, dict) or len(listed) > INTRODUCERS_MAX:
        raise NodeDirectoryError(f"{path}: 'introducers' is not a mapping of at most {INTRODUCERS_MAX} names")
    introducers = {}
    for petname, entry in listed.items():
        furl = entry.get("furl") if isinstance(entry, dict) else None
        if not isinstance(furl, str):
            raise NodeDirectoryError(f"{path}: introducer {petname!r} has no furl")
        introducers[str(petname)] = parse_furl(furl.strip(), f"{path}: the furl of introducer {petname!r}")
    if old := config.text("client", "introducer.furl", "").strip():
        if PETNAME_DEFAULT in introducers:
            raise config.wrong("client", "introducer.furl", f"and {path} both name the introducer 'default'")
        introducers[PETNAME_DEFAULT] = parse_furl(old, f"{config.path}: [client] introducer.furl")
    return introducers


def introducers_text(furls: Sequence[str]) -> bytes:
    """An introducers.yaml; the first is the default one."""
    entries = {}
    for number, furl in enumerate(furls, start=1):
        petname = PETNAME_DEFAULT if number == 1 else f"introducer{number}"
        entries[petname] = {"furl": str(parse_furl(furl.strip(), "the introducer FURL given"))}
    return yaml.safe_dump({"introducers": entries}, default_flow_style=False).encode()


def make_node_directory(path: Path, kind: Kind, config: str, introducers: Sequence[str] = ()) -> None:
    """A new node directory. `path` must not exist, or be an empty directory. Raises NodeDirectoryError."""
    listed = introducers_text(introducers) if introducers else None
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise NodeDirectoryError(f"{path} is not empty; a new node directory needs an empty or new one")
        private = path / "private"
        private.mkdir(mode=0o700)
        if listed is not None:
            create_file(private / "introducers.yaml", listed)
        create_file(path / f"tahoe-{kind}.tac", _TAC_TEXT.format(kind=kind).encode(), mode=0o644)
        create_file(path / "tahoe.cfg", config.encode(), mode=0o644)  # last: it is what makes this a node directory
    except OSError as error:
        raise NodeDirectoryError(f"cannot make the node directory {path}: {error.strerror}") from error


def checked_nickname(nickname: str) -> str:
    """As tahoe.cfg takes it. Raises NodeDirectoryError."""
    if not nickname.isprintable():
        raise NodeDirectoryError("a nickname is one line of printable text")
    return nickname.strip().replace("%", "%%")


def refuse_anonymity(config: Config) -> None:
    """Whoever hides behind Tor must not be shown by us: better no connection than one over plain TCP."""
    if config.text("connections", "tcp", "tcp").strip().lower() not in ("tcp", ""):
        raise config.wrong("connections", "tcp", "asks for Tor or no TCP at all, which tahoefs cannot do")
    if not config.boolean("node", "reveal-IP-address", True):
        raise config.wrong("node", "reveal-IP-address", "is false, and tahoefs can only connect over plain TCP")
