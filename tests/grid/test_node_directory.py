"""Node directories: those of Tahoe are read as it reads them, and ours are such that it can read them."""

from __future__ import annotations

import configparser
import stat
from pathlib import Path

import pytest
import yaml

from grid.crypto import SigningKey
from grid.errors import NodeDirectoryError
from grid.formats import base32
from grid.node_directory import Encoding, NodeDirectory, create_client_directory

TUB_ID = "qfw4zconqeq6i7k45tldrc3pys2auj2p"
FURL = f"pb://{TUB_ID}@tcp:127.0.0.1:1/swissnum"
OTHER_FURL = f"pb://{TUB_ID}@tcp:127.0.0.1:2/otherswissnum"


def make(path: Path, config: str = "", **private: str) -> Path:
    (path / "private").mkdir()
    (path / "tahoe.cfg").write_text(config, encoding="utf-8")
    for name, text in private.items():
        (path / "private" / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return path


def test_an_empty_configuration_has_tahoes_defaults(tmp_path: Path) -> None:
    node = NodeDirectory.open(make(tmp_path))
    assert node.encoding == Encoding(k=3, happy=7, n=10)
    assert (node.nickname, node.mutable_format, node.keepalive_s) == ("<unspecified>", "sdmf", 240)
    assert not node.introducers and not node.static_servers and not node.preferred and not node.force_foolscap


def test_missing_private_files_are_made_once(tmp_path: Path) -> None:
    (tmp_path / "tahoe.cfg").touch()
    node = NodeDirectory.open(tmp_path)
    private = tmp_path / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    for name, value in (("secret", node.lease_secret), ("convergence", node.convergence)):
        assert len(value) == 32
        assert (private / name).read_text() == base32.b2a(value) + "\n"
        assert stat.S_IMODE((private / name).stat().st_mode) == 0o600
    seed = base32.a2b((private / "node.privkey").read_text().strip().removeprefix("priv-v0-"))
    public = base32.b2a(SigningKey.from_seed(seed).public_bytes)
    assert (tmp_path / "node.pubkey").read_text() == f"pub-v0-{public}\n"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = NodeDirectory.open(tmp_path)
    assert (again.lease_secret, again.convergence) == (node.lease_secret, node.convergence)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_full_configuration(tmp_path: Path) -> None:
    key = SigningKey.generate().public_bytes
    config = f"""\ufeff# comment
[node]
Nickname = 100 %% mine; and # this too
timeout.keepalive = 60
name = shares
[client]
shares.needed = 2
shares.happy = 1
shares.happy = 2
shares.total = 4
mutable.format = MDMF
peers.preferred = v0-aaa, v0-bbb,,v0-ccc
force_foolscap = Yes
[grid_managers]
someone = pub-v0-{base32.b2a(key)}
[storage]
enabled = true
[unknown]
key = kept
"""
    node = NodeDirectory.open(make(tmp_path, config, convergence="\n", secret="a" * 52))
    assert node.nickname == "100 % mine; and # this too"
    assert node.encoding == (2, 2, 4)
    assert node.mutable_format == "mdmf"
    assert node.preferred == ("v0-aaa", "v0-bbb", "v0-ccc")
    assert node.force_foolscap and node.keepalive_s == 60
    assert node.grid_manager_keys == (key,)
    assert node.convergence == b""  # allowed: to share with everybody
    assert (tmp_path / "tahoe.cfg").read_text(encoding="utf-8") == config


def test_introducers_old_and_new(tmp_path: Path) -> None:
    listed = yaml.safe_dump({"introducers": {"work": {"furl": OTHER_FURL}}})
    node = NodeDirectory.open(make(tmp_path, f"[client]\nintroducer.furl = {FURL}\n", introducers__yaml=listed))
    assert {name: str(furl) for name, furl in node.introducers.items()} == {"work": OTHER_FURL, "default": FURL}


def test_static_servers(tmp_path: Path) -> None:
    listed = {
        "storage": {
            "v0-good": {"ann": {"anonymous-storage-FURL": FURL}},
            "over tcp": {"ann": {"nickname": "x"}, "connections": {"tcp": "tcp"}},
            "over tor": {"ann": {"nickname": "y"}, "connections": {"tcp": "tor"}},
            "broken": {"anonymous-storage-FURL": FURL},
            "worse": 3,
        }
    }
    node = NodeDirectory.open(make(tmp_path, servers__yaml=yaml.safe_dump(listed)))
    assert set(node.static_servers) == {"v0-good", "over tcp"}


@pytest.mark.parametrize(
    ("config", "private", "says"),
    [
        ("[client]\nshares.needed = four\n", {}, r"tahoe.cfg.*shares\.needed"),
        ("[client]\nshares.needed = 8\nshares.total = 4\n", {}, "needed"),
        ("[client]\nshares.happy = 11\n", {}, "happy"),
        ("[client]\nshares.total = 257\n", {}, "256"),
        ("[client]\nmutable.format = CHK\n", {}, r"mutable\.format"),
        ("[client]\nforce_foolscap = perhaps\n", {}, "force_foolscap"),
        ("[node]\nnickname = 50%\n", {}, "nickname.*%%"),
        ("[node]\ntimeout.keepalive = soon\n", {}, "keepalive"),
        ("[connections]\ntcp = tor\n", {}, "Tor"),
        ("[connections]\ntcp = disabled\n", {}, "Tor"),
        ("[node]\nreveal-IP-address = false\n", {}, "reveal-IP-address"),
        ("[grid_managers]\nx = priv-v0-aaaa\n", {}, "grid_managers"),
        ("no section\n", {}, "tahoe.cfg"),
        ("[client]\nintroducer.furl = None\n", {}, r"introducer\.furl"),
        (f"[client]\nintroducer.furl = {FURL}#x\n", {}, r"introducer\.furl"),
        (
            f"[client]\nintroducer.furl = {FURL}\n",
            {"introducers__yaml": f"introducers: {{default: {{furl: '{FURL}'}}}}"},
            "both",
        ),
        ("", {"introducers__yaml": "introducers: [1]"}, r"introducers\.yaml"),
        ("", {"introducers__yaml": f"introducers:\n  a: '{FURL}'\n"}, "'a'"),
        ("", {"introducers__yaml": f"introducers:\n  a: {{furl: '{FURL[4:]}'}}\n"}, "'a'"),
        ("", {"introducers__yaml": "introducers: {"}, "not valid YAML"),
        ("", {"servers__yaml": "- 1"}, r"servers\.yaml"),
        ("", {"secret": "not base32!"}, "private/secret"),
        ("", {"secret": "aaaa"}, "32 bytes"),
        ("", {"convergence": "1"}, "private/convergence"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_shown(
    tmp_path: Path, config: str, private: dict[str, str], says: str
) -> None:
    with pytest.raises(NodeDirectoryError, match=says) as caught:
        NodeDirectory.open(make(tmp_path, config, **private))
    assert "swissnum" not in str(caught.value)


def test_no_directory_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(NodeDirectoryError, match="create-client"):
        NodeDirectory.open(tmp_path / "missing")
    with pytest.raises(NodeDirectoryError, match=r"tahoe\.cfg"):
        NodeDirectory.open(tmp_path)
    assert list(tmp_path.iterdir()) == []  # a directory that is no node directory is left alone


def test_secrets_do_not_show(tmp_path: Path) -> None:
    node = NodeDirectory.open(make(tmp_path, f"[client]\nintroducer.furl = {FURL}\n"))
    shown = repr(node)
    assert "swissnum" not in shown and repr(node.lease_secret) not in shown and repr(node.convergence) not in shown


@pytest.mark.parametrize("text, has_one", [("", False), ("None", False), (" pb://%s@tcp:h:1/x" % ("a" * 32), True)])
def test_a_helper(tmp_path: Path, text: str, has_one: bool) -> None:
    node = NodeDirectory.open(make(tmp_path, f"[client]\nhelper.furl = {text}\n"))
    assert (node.helper is not None) == has_one
    assert "pb://" not in repr(node)


def test_create_and_open(tmp_path: Path) -> None:
    path = tmp_path / "new" / "node"
    create_client_directory(path, introducers=[FURL, OTHER_FURL], nickname="50 % ü", shares=(1, 2, 3))
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((path / "private").stat().st_mode) == 0o700
    assert {entry.name for entry in path.iterdir()} == {"tahoe.cfg", "tahoe-client.tac", "private"}
    node = NodeDirectory.open(path)
    assert (node.nickname, node.encoding) == ("50 % ü", (1, 2, 3))
    assert {name: str(furl) for name, furl in node.introducers.items()} == {
        "default": FURL,
        "introducer2": OTHER_FURL,
    }
    config = configparser.ConfigParser()
    config.read(path / "tahoe.cfg", encoding="utf-8")
    assert config["storage"]["enabled"] == "false"
    assert config["node"]["tub.port"] == config["node"]["tub.location"] == "disabled"
    compile((path / "tahoe-client.tac").read_text(), "tahoe-client.tac", "exec")


def test_creating_does_not_touch_what_exists(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(NodeDirectoryError, match="not empty"):
        create_client_directory(tmp_path, introducers=[])
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"introducers": ["pb://nonsense"]},
        {"introducers": [], "shares": (4, 1, 3)},
        {"introducers": [], "shares": (0, 1, 3)},
        {"introducers": [], "nickname": "two\nlines"},
    ],
)
def test_creating_refuses_bad_arguments(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(NodeDirectoryError):
        create_client_directory(tmp_path / "node", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "node").exists()
