"""Mount options: what is understood, and that nothing else passes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tahoefs.options import MountOptions, OptionError, parse_size


def test_defaults() -> None:
    options = MountOptions.parse(())
    assert (options.read_only, options.durability, options.mutable, options.poll_s) == (False, "journal", "none", 5.0)


def test_values_and_later_wins() -> None:
    options = MountOptions.parse(("ro,uid=7,umask=027", "poll=2,poll=0.5,cache_size=3M"))
    assert (options.read_only, options.uid, options.umask) == (True, 7, 0o27)
    assert (options.poll_s, options.cache_size) == (0.5, 3 << 20)


def test_allow_other_checks_permissions() -> None:
    assert MountOptions.parse(("allow_other",)).fuse == {"allow_other", "default_permissions"}


def test_what_mount_and_fstab_add_is_ignored() -> None:
    words = "rw,auto,noauto,user,nouser,users,owner,group,defaults,_netdev,_rnetdev,nofail,silent,loud,noiversion"
    values = "x-systemd.automount,x-foo=bar,X-mount.mkdir=0755,user=me,comment=my grid,uhelper=udisks2,vers=1"
    assert MountOptions.parse((words, values)) == MountOptions()
    for lookalike in ("rw=1", "xfoo=bar", "users=me", "netdev", "no_netdev"):
        with pytest.raises(OptionError, match=lookalike.partition("=")[0]):
            MountOptions.parse((lookalike,))


@pytest.mark.parametrize(
    "text", ["nonsense", "ro=1", "uid", "uid=me", "umask=8", "poll=soon", "poll=-1", "durability=x", "cache_size=5Q"]
)
def test_errors_name_the_option(text: str) -> None:
    with pytest.raises(OptionError, match=text.split("=")[0]):
        MountOptions.parse((text,))


@given(st.text(max_size=40))
def test_only_option_errors_escape(text: str) -> None:
    with contextlib.suppress(OptionError):
        MountOptions.parse((text,))


def test_sizes() -> None:
    assert [parse_size(text) for text in ("17", "1K", "2m", "3GiB", "1T")] == [17, 1024, 2 << 20, 3 << 30, 1 << 40]
