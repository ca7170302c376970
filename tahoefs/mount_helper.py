"""`mount.tahoefs`, which mount(8) runs for `mount -t tahoefs WHAT DIR -o …` and for lines of /etc/fstab.

    mount.tahoefs WHAT DIR [-f] [-n] [-s] [-v] [-N NAMESPACE] [-t TYPE] [-o OPT[,OPT…]]

It is `tahoefs mount` under the arguments of mount(8). One option is its own: `node_dir=DIR`, for `--node-dir`.

    -f    do everything but mount        -s    overlook unknown options
    -v    say what is done               -n    nothing to do: there is no mtab

It may run as root with hardly any environment, without HOME even. mount(8) finds it as /sbin/mount.tahoefs.
Exit codes are those of mount(8): 0 mounted, 1 wrong usage, 32 failed.
"""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from attrs import field, frozen

from tahoefs.options import MountOptions, OptionError

USAGE: Final = "usage: mount.tahoefs WHAT DIR [-fnsv] [-o OPT[,OPT...]]"
EXIT_USAGE: Final = 1
EXIT_FAILED: Final = 32
PATH_DEFAULT: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class UsageError(Exception):
    """The arguments make no sense; the text says why."""


@frozen
class Request:
    """What mount(8) wants."""

    what: str = field(repr=False)
    mountpoint: str
    options: tuple[str, ...] = ()
    node_dir: str | None = None
    fake: bool = False
    verbose: bool = False


def parse_arguments(arguments: Sequence[str]) -> Request:
    """Raises UsageError, OptionError."""
    try:
        flags, names = getopt.gnu_getopt(list(arguments), "fnsvhN:t:o:")
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg}; {USAGE}") from None
    given = {flag for flag, _ in flags}
    if len(names) != 2 or "-h" in given:
        raise UsageError(USAGE)
    if "-N" in given:
        raise UsageError("other mount namespaces (-N) are not supported; run mount inside the namespace")
    node_dir, options = None, []
    for item in (item.strip() for flag, value in flags if flag == "-o" for item in value.split(",")):
        name, _, value = item.partition("=")
        if name == "node_dir":
            node_dir = value
        elif not ("-s" in given and _is_unknown(item)):
            options.append(item)
    MountOptions.parse(options)
    return Request(names[0], names[1], tuple(options), node_dir, "-f" in given, "-v" in given)


def _is_unknown(item: str) -> bool:
    try:
        MountOptions.parse([item])
    except OptionError as error:
        return str(error).startswith("unknown")
    return False


def main(arguments: Sequence[str] | None = None) -> None:
    """The program. Never returns: ends the process with the exit code."""
    try:
        request = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    except (UsageError, OptionError) as error:
        print(f"mount.tahoefs: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    os.environ.setdefault("PATH", PATH_DEFAULT)
    sys.exit(_mount(request))


def _mount(request: Request) -> int:
    from grid import NodeDirectoryError
    from tahoefs import cli
    from tahoefs.mountpoint import MountPointError, prepare
    from tahoefs.registry import absolute
    from tahoefs.what import WhatError, resolve_what

    node_dir = Path(request.node_dir) if request.node_dir else cli.default_node_dir()
    if request.fake:
        try:
            resolve_what(request.what, node_dir, may_be_new=True)
            prepare(absolute(request.mountpoint))
        except (WhatError, MountPointError, NodeDirectoryError) as error:
            print(f"mount.tahoefs: {error}", file=sys.stderr)
            return EXIT_FAILED
        return 0
    if request.verbose:
        print(f"mount.tahoefs: mounting on {request.mountpoint}, node directory {node_dir}", file=sys.stderr)
    options = [argument for option in request.options for argument in ("-o", option)]
    try:
        cli.main(["mount", "-d", str(node_dir), *options, "--", request.what, request.mountpoint])
    except SystemExit as ended:
        return EXIT_FAILED if ended.code else 0
    return EXIT_FAILED
