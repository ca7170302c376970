"""Mount options: the text after `-o`, checked into one value.

An unknown option, or a value that does not parse, is an error that names the option: nothing is ignored
silently. Options of the FUSE layer itself are passed on as they are; what mount(8), fstab and systemd say among
themselves is understood here, for `tahoefs mount` and `mount.tahoefs` alike, and means nothing to us.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from attrs import evolve, frozen

SIZE_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
TIME_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
TIMEOUT_S_MAX: Final = 3600.0
LEASE_RENEW_S_MIN: Final = 3600.0
LEASE_RENEW_S_MAX: Final = 30 * 86400.0
MUTABLE: Final = ("none", "sdmf", "mdmf")  # what files can be made as; none: immutable

# Understood by the kernel or libfuse; handed on untouched.
PASSED_ON: Final = frozenset(
    {
        "allow_other",
        "auto_unmount",
        "default_permissions",
        "dev",
        "exec",
        "noatime",
        "nodev",
        "noexec",
        "nosuid",
        "suid",
    }
)
# Spoken by mount(8), fstab and systemd among themselves; they mean nothing to a file system.
FOR_OTHERS: Final = re.compile(
    r"rw|(no)?auto|(no)?users?|owner|group|defaults|_r?netdev|nofail|silent|loud|(no)?iversion"
    r"|[xX]-.*|(comment|user|uhelper|helper|vers)=.*",
    re.DOTALL,
)


class OptionError(Exception):
    """An option is unknown, or its value is of no use. The text names the option."""


@frozen
class MountOptions:
    """One mount's settings; the defaults are what `tahoefs mount WHAT DIR` means."""

    read_only: bool = False
    uid: int | None = None  # who owns everything; None: who mounts
    gid: int | None = None
    umask: int | None = None  # bits; None: that of the mounting process
    cache_dir: Path | None = None
    cache_size: int = 5 << 30  # bytes of verified ciphertext kept on the local disk
    journal_size: int | None = None  # bytes waiting to be sent; None: 10 GiB, or half of the free disk
    durability: str = "journal"
    mutable: str = "none"
    metrics_port: int | None = None  # where Prometheus finds statistics, on loopback
    poll_s: float = 5.0  # how stale another writer's change may be
    timeout_s: float | None = None  # deadline of one file system request; None: 30 s data, 10 s metadata
    convergence: str = "node"
    lease_renew_s: float | None = 7 * 86400.0  # leases of what the mount can reach are renewed so often; None: never
    fuse: frozenset[str] = frozenset()

    @classmethod
    def parse(cls, texts: tuple[str, ...] | list[str]) -> MountOptions:
        """Parse `-o` values, each a comma list. Raises OptionError. A later value wins."""
        options = cls()
        for item in (item for text in texts for item in text.split(",")):
            if item := item.strip():
                options = options._with(item)
        if "allow_other" in options.fuse:  # without it every local user could do what the cap's holder can
            options = evolve(options, fuse=options.fuse | {"default_permissions"})
        return options

    def _with(self, item: str) -> MountOptions:
        if FOR_OTHERS.fullmatch(item):
            return self
        name, equals, value = item.partition("=")
        if not equals:
            if name == "ro":
                return evolve(self, read_only=True)
            if name in PASSED_ON:
                return evolve(self, fuse=self.fuse | {name})
        elif name in _VALUES:
            field_name, parse = _VALUES[name]
            try:
                return evolve(self, **{field_name: parse(value)})
            except ValueError as error:
                raise OptionError(f"mount option {name}={value!r}: {error}") from None
        raise OptionError(f"unknown mount option {name!r}")


def parse_size(text: str) -> int:
    """Bytes, with an optional K, M, G or T (powers of 1024)."""
    match = re.fullmatch(r"([0-9]{1,15})([kmgt]?)(i?b)?", text.strip().lower())
    if not match:
        raise ValueError("expected a size such as 512M or 5G")
    return int(match[1]) * SIZE_UNITS[match[2]]


def parse_duration(text: str) -> float:
    """Seconds, from a number with a unit: s, m, h, d or w."""
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text.strip().lower())
    if not match or not int(match[1]):
        raise ValueError("expected a time such as 12h or 7d")
    return float(int(match[1]) * TIME_UNITS[match[2]])


def _lease_renew(text: str) -> float | None:
    if text == "off":
        return None
    if not LEASE_RENEW_S_MIN <= (seconds := parse_duration(text)) <= LEASE_RENEW_S_MAX:
        raise ValueError("expected 'off', or a time from 1h to 30d: servers may drop a lease after 31 days")
    return seconds


def _choice(*allowed: str) -> Any:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return parse


def _identity(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) >= 1 << 32:
        raise ValueError("expected a number")
    return int(text)


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 0 < int(text) < 1 << 16:
        raise ValueError("expected a port")
    return int(text)


def _umask(text: str) -> int:
    if not re.fullmatch(r"[0-7]{1,4}", text) or int(text, 8) > 0o777:
        raise ValueError("expected an octal mask such as 022")
    return int(text, 8)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) or not 0 <= float(text) <= TIMEOUT_S_MAX:
        raise ValueError(f"expected seconds, at most {TIMEOUT_S_MAX:g}")
    return float(text)


def _timeout(text: str) -> float:
    if (seconds := _seconds(text)) < 1:
        raise ValueError("expected at least one second")
    return seconds


_VALUES: Final[dict[str, tuple[str, Any]]] = {
    "uid": ("uid", _identity),
    "gid": ("gid", _identity),
    "umask": ("umask", _umask),
    "cache_dir": ("cache_dir", Path),
    "cache_size": ("cache_size", parse_size),
    "journal_size": ("journal_size", parse_size),
    "durability": ("durability", _choice("journal", "grid")),
    "mutable": ("mutable", _choice(*MUTABLE)),
    "metrics_port": ("metrics_port", _port),
    "poll": ("poll_s", _seconds),
    "timeout": ("timeout_s", _timeout),
    "lease_renew": ("lease_renew_s", _lease_renew),
    "convergence": ("convergence", _choice("node", "none")),
}
