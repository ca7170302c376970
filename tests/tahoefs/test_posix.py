"""Error cases of POSIX calls, each on a real mount and on a directory of a local file system as the control."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tahoefs.mounts import memory_mount
from tests.tahoefs.posix_calls import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    getxattr_into,
    listxattr_into,
    needs_root,
    opened,
    outcome,
    renameat2,
    utimensat,
)

NAME_256 = "n" * 256
PATH_5000 = "d/" * 2500
Call = Callable[[Path], object]


def open_close(path: Path | str, flags: int, mode: int = 0o644) -> None:
    os.close(os.open(path, flags, mode))


def with_reader(path: Path, call: Callable[[int], object]) -> None:
    with opened(path, os.O_RDONLY) as descriptor:
        call(descriptor)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # its path may be longer than a socket address
        server.bind(path.name)


def chain(path: Path, links: int) -> None:
    """Read a file through so many links."""
    for number in range(links):
        (path / f"link{number}").symlink_to(f"link{number + 1}" if number + 1 < links else "file")
    (path / "link0").read_bytes()


def in_removed(path: Path, call: Callable[[int], object]) -> None:
    """`call` with the descriptor of a directory that was removed."""
    with opened(path / "empty", os.O_RDONLY) as descriptor:
        (path / "empty").rmdir()
        call(descriptor)


def with_xattr(path: Path, call: Call) -> None:
    os.setxattr(path / "file", "user.x", b"abc")
    call(path / "file")


NEW = os.O_WRONLY | os.O_CREAT
EXCLUSIVE = NEW | os.O_EXCL

OPENING: list[tuple[str, str, Call]] = [
    ("open missing", "ENOENT", lambda p: open_close(p / "none", os.O_RDONLY)),
    ("open nothing", "ENOENT", lambda p: open_close("", os.O_RDONLY)),
    ("open dangling", "ENOENT", lambda p: open_close(p / "dangling", os.O_RDONLY)),
    ("open in missing", "ENOENT", lambda p: open_close(p / "none" / "x", NEW)),
    ("open in removed", "ENOENT", lambda p: in_removed(p, lambda fd: os.open("x", NEW, dir_fd=fd))),
    ("open exclusive", "EEXIST", lambda p: open_close(p / "file", EXCLUSIVE)),
    ("open exclusive link", "EEXIST", lambda p: open_close(p / "dangling", EXCLUSIVE)),
    ("open exclusive directory", "EEXIST", lambda p: open_close(p / "dir", EXCLUSIVE)),
    ("open below file", "ENOTDIR", lambda p: open_close(p / "file" / "x", os.O_RDONLY)),
    ("create below file", "ENOTDIR", lambda p: open_close(p / "file" / "x", NEW)),
    ("open file with slash", "ENOTDIR", lambda p: open_close(f"{p}/file/", os.O_RDONLY)),
    ("open link with slash", "ENOTDIR", lambda p: open_close(f"{p}/link/", os.O_RDONLY)),
    ("create with slash", "EISDIR", lambda p: open_close(f"{p}/new/", NEW)),
    ("open directory to write", "EISDIR", lambda p: open_close(p / "dir", os.O_WRONLY)),
    ("open directory to read and write", "EISDIR", lambda p: open_close(p / "dir", os.O_RDWR)),
    ("open directory to create", "EISDIR", lambda p: open_close(p / "dir", NEW)),
    ("open directory to empty", "EISDIR", lambda p: open_close(p / "dir", os.O_RDONLY | os.O_TRUNC)),
    ("open file as directory", "ENOTDIR", lambda p: open_close(p / "file", os.O_RDONLY | os.O_DIRECTORY)),
    ("open link as directory", "ENOTDIR", lambda p: open_close(p / "link", os.O_RDONLY | os.O_DIRECTORY)),
    ("create a directory", "EINVAL", lambda p: open_close(p / "new", NEW | os.O_DIRECTORY)),
    ("open link nofollow", "ELOOP", lambda p: open_close(p / "link", os.O_RDONLY | os.O_NOFOLLOW)),
    ("create link nofollow", "ELOOP", lambda p: open_close(p / "dangling", NEW | os.O_NOFOLLOW)),
    ("open loop", "ELOOP", lambda p: open_close(p / "loop", os.O_RDONLY)),
    ("create loop", "ELOOP", lambda p: open_close(p / "loop", NEW)),
    ("open through 41 links", "ELOOP", lambda p: chain(p, 41)),
    ("open long", "ENAMETOOLONG", lambda p: open_close(p / NAME_256, os.O_RDONLY)),
    ("open long path", "ENAMETOOLONG", lambda p: open_close(p / PATH_5000, os.O_RDONLY)),
    ("create long", "ENAMETOOLONG", lambda p: open_close(p / NAME_256, NEW)),
    ("create below long", "ENAMETOOLONG", lambda p: open_close(p / NAME_256 / "x", NEW)),
    ("fifo nonblocking to write", "ENXIO", lambda p: open_close(p / "fifo", os.O_WRONLY | os.O_NONBLOCK)),
    ("open socket", "ENXIO", lambda p: (bind(p / "socket"), open_close(p / "socket", os.O_RDONLY))),
    ("write to reader", "EBADF", lambda p: with_reader(p / "file", lambda fd: os.write(fd, b"x"))),
    ("truncate reader", "EINVAL", lambda p: with_reader(p / "file", lambda fd: os.ftruncate(fd, 0))),
    ("write to directory", "EBADF", lambda p: with_reader(p / "dir", lambda fd: os.write(fd, b"x"))),
    ("read directory", "EISDIR", lambda p: with_reader(p / "dir", lambda fd: os.read(fd, 1))),
    ("seek before start", "EINVAL", lambda p: with_reader(p / "file", lambda fd: os.lseek(fd, -1, os.SEEK_SET))),
    ("seek for data at end", "ENXIO", lambda p: with_reader(p / "file", lambda fd: os.lseek(fd, 4, os.SEEK_DATA))),
    ("seek for hole past end", "ENXIO", lambda p: with_reader(p / "file", lambda fd: os.lseek(fd, 9, os.SEEK_HOLE))),
    ("chdir to file", "ENOTDIR", lambda p: os.chdir(p / "file")),
    ("execute without a bit", "EACCES", lambda p: subprocess.run([p / "file"], check=False)),
]

NAMES: list[tuple[str, str, Call]] = [
    ("mkdir existing", "EEXIST", lambda p: os.mkdir(p / "dir")),
    ("mkdir over file", "EEXIST", lambda p: os.mkdir(p / "file")),
    ("mkdir over dangling", "EEXIST", lambda p: os.mkdir(p / "dangling")),
    ("mkdir dot", "EEXIST", lambda p: os.mkdir(f"{p}/dir/.")),
    ("mkdir dotdot", "EEXIST", lambda p: os.mkdir(f"{p}/dir/..")),
    ("mkdir below file", "ENOTDIR", lambda p: os.mkdir(p / "file" / "x")),
    ("mkdir in missing", "ENOENT", lambda p: os.mkdir(p / "none" / "x")),
    ("mkdir in removed", "ENOENT", lambda p: in_removed(p, lambda fd: os.mkdir("x", dir_fd=fd))),
    ("mkdir in loop", "ELOOP", lambda p: os.mkdir(p / "loop" / "x")),
    ("mkdir long", "ENAMETOOLONG", lambda p: os.mkdir(p / NAME_256)),
    ("rmdir full", "ENOTEMPTY", lambda p: os.rmdir(p / "dir")),
    ("rmdir file", "ENOTDIR", lambda p: os.rmdir(p / "file")),
    ("rmdir link", "ENOTDIR", lambda p: os.rmdir(p / "link")),
    ("rmdir missing", "ENOENT", lambda p: os.rmdir(p / "none")),
    ("rmdir dot", "EINVAL", lambda p: os.rmdir(f"{p}/empty/.")),
    ("rmdir dotdot", "ENOTEMPTY", lambda p: os.rmdir(f"{p}/dir/inner/..")),
    ("rmdir long", "ENAMETOOLONG", lambda p: os.rmdir(p / NAME_256)),
    ("unlink directory", "EISDIR", lambda p: os.unlink(p / "empty")),
    ("unlink missing", "ENOENT", lambda p: os.unlink(p / "none")),
    ("unlink below file", "ENOTDIR", lambda p: os.unlink(p / "file" / "x")),
    ("unlink with slash", "ENOTDIR", lambda p: os.unlink(f"{p}/file/")),
    ("unlink link with slash", "ENOTDIR", lambda p: os.unlink(f"{p}/link/")),
    ("unlink dot", "EISDIR", lambda p: os.unlink(f"{p}/empty/.")),
    ("unlink below loop", "ELOOP", lambda p: os.unlink(p / "loop" / "x")),
    ("unlink long", "ENAMETOOLONG", lambda p: os.unlink(p / NAME_256)),
    ("rename missing", "ENOENT", lambda p: os.rename(p / "none", p / "x")),
    ("rename into missing", "ENOENT", lambda p: os.rename(p / "file", p / "none" / "x")),
    ("rename into removed", "ENOENT", lambda p: in_removed(p, lambda fd: os.rename(p / "file", "x", dst_dir_fd=fd))),
    ("rename below file", "ENOTDIR", lambda p: os.rename(p / "link", p / "file" / "x")),
    ("rename file over directory", "EISDIR", lambda p: os.rename(p / "file", p / "empty")),
    ("rename link over directory", "EISDIR", lambda p: os.rename(p / "link", p / "empty")),
    ("rename directory over file", "ENOTDIR", lambda p: os.rename(p / "dir", p / "file")),
    ("rename directory over link", "ENOTDIR", lambda p: os.rename(p / "dir", p / "link")),
    ("rename directory over full", "ENOTEMPTY", lambda p: os.rename(p / "empty", p / "dir")),
    ("rename below itself", "EINVAL", lambda p: os.rename(p / "dir", p / "dir" / "inner" / "x")),
    ("rename onto below itself", "EINVAL", lambda p: os.rename(p / "dir", p / "dir" / "inner")),
    ("rename over ancestor", "ENOTEMPTY", lambda p: os.rename(p / "dir" / "inner", p / "dir")),
    ("rename file to slash", "ENOTDIR", lambda p: os.rename(p / "file", f"{p}/new/")),
    ("rename loop", "ELOOP", lambda p: os.rename(p / "loop" / "x", p / "x")),
    ("rename long", "ENAMETOOLONG", lambda p: os.rename(p / "file", p / NAME_256)),
    ("rename from long", "ENAMETOOLONG", lambda p: os.rename(p / NAME_256, p / "x")),
    ("rename dot", "EBUSY", lambda p: os.rename(f"{p}/dir/.", p / "x")),
    ("rename to dotdot", "EBUSY", lambda p: os.rename(p / "file", f"{p}/dir/..")),
    ("rename elsewhere", "EXDEV", lambda p: os.rename(p / "file", "/dev/shm/elsewhere")),
    ("rename noreplace", "EEXIST", lambda p: renameat2(p / "file", p / "link", RENAME_NOREPLACE)),
    ("rename noreplace itself", "EEXIST", lambda p: renameat2(p / "file", p / "file", RENAME_NOREPLACE)),
    ("exchange with missing", "ENOENT", lambda p: renameat2(p / "file", p / "none", RENAME_EXCHANGE)),
    ("exchange missing", "ENOENT", lambda p: renameat2(p / "none", p / "file", RENAME_EXCHANGE)),
    ("exchange with above", "EINVAL", lambda p: renameat2(p / "dir" / "inner", p / "dir", RENAME_EXCHANGE)),
    ("exchange with below", "EINVAL", lambda p: renameat2(p / "dir", p / "dir" / "inner", RENAME_EXCHANGE)),
    ("rename with both flags", "EINVAL", lambda p: renameat2(p / "file", p / "x", RENAME_NOREPLACE | RENAME_EXCHANGE)),
    ("rename with an unknown flag", "EINVAL", lambda p: renameat2(p / "file", p / "x", 1 << 10)),
    ("symlink existing", "EEXIST", lambda p: os.symlink("x", p / "file")),
    ("symlink over dangling", "EEXIST", lambda p: os.symlink("x", p / "dangling")),
    ("symlink in missing", "ENOENT", lambda p: os.symlink("x", p / "none" / "x")),
    ("symlink with slash", "ENOENT", lambda p: os.symlink("x", f"{p}/new/")),
    ("symlink below file", "ENOTDIR", lambda p: os.symlink("x", p / "file" / "x")),
    ("symlink long name", "ENAMETOOLONG", lambda p: os.symlink("x", p / NAME_256)),
    ("symlink long target", "ENAMETOOLONG", lambda p: os.symlink("t" * 4096, p / "x")),
    ("symlink empty target", "ENOENT", lambda p: os.symlink("", p / "x")),
    ("readlink file", "EINVAL", lambda p: os.readlink(p / "file")),
    ("readlink directory", "EINVAL", lambda p: os.readlink(p / "dir")),
    ("readlink missing", "ENOENT", lambda p: os.readlink(p / "none")),
    ("readlink below file", "ENOTDIR", lambda p: os.readlink(p / "file" / "x")),
    ("link missing", "ENOENT", lambda p: os.link(p / "none", p / "x")),
    ("link existing", "EEXIST", lambda p: os.link(p / "file", p / "link")),
    ("link directory", "EPERM", lambda p: os.link(p / "dir", p / "x")),
    ("mkfifo existing", "EEXIST", lambda p: os.mkfifo(p / "file")),
    ("mkfifo in missing", "ENOENT", lambda p: os.mkfifo(p / "none" / "x")),
    ("mkfifo long", "ENAMETOOLONG", lambda p: os.mkfifo(p / NAME_256)),
    ("mknod existing", "EEXIST", lambda p: os.mknod(p / "dir", stat.S_IFREG | 0o600)),
    ("mknod directory", "EPERM", lambda p: os.mknod(p / "x", stat.S_IFDIR | 0o700)),
    ("mknod link", "EINVAL", lambda p: os.mknod(p / "x", stat.S_IFLNK | 0o700)),
    ("bind existing", "EADDRINUSE", lambda p: bind(p / "file")),
    ("listdir file", "ENOTDIR", lambda p: os.listdir(p / "file")),
    ("listdir missing", "ENOENT", lambda p: os.listdir(p / "none")),
    ("listdir loop", "ELOOP", lambda p: os.listdir(p / "loop")),
]

ATTRIBUTES: list[tuple[str, str, Call]] = [
    ("stat missing", "ENOENT", lambda p: os.stat(p / "none")),
    ("stat dangling", "ENOENT", lambda p: os.stat(p / "dangling")),
    ("stat loop", "ELOOP", lambda p: os.stat(p / "loop")),
    ("stat below file", "ENOTDIR", lambda p: os.lstat(p / "file" / "x")),
    ("stat file dot", "ENOTDIR", lambda p: os.lstat(f"{p}/file/.")),
    ("stat long", "ENAMETOOLONG", lambda p: os.stat(p / NAME_256)),
    ("truncate directory", "EISDIR", lambda p: os.truncate(p / "dir", 0)),
    ("truncate missing", "ENOENT", lambda p: os.truncate(p / "none", 0)),
    ("truncate below file", "ENOTDIR", lambda p: os.truncate(p / "file" / "x", 0)),
    ("truncate loop", "ELOOP", lambda p: os.truncate(p / "loop", 0)),
    ("truncate long", "ENAMETOOLONG", lambda p: os.truncate(p / NAME_256, 0)),
    ("truncate fifo", "EINVAL", lambda p: os.truncate(p / "fifo", 0)),
    ("truncate negative", "EINVAL", lambda p: os.truncate(p / "file", -1)),
    ("truncate huge", "EFBIG", lambda p: os.truncate(p / "file", 1 << 62)),
    ("chmod missing", "ENOENT", lambda p: os.chmod(p / "none", 0o600)),
    ("chmod dangling", "ENOENT", lambda p: os.chmod(p / "dangling", 0o600)),
    ("chmod below file", "ENOTDIR", lambda p: os.chmod(p / "file" / "x", 0o600)),
    ("chmod loop", "ELOOP", lambda p: os.chmod(p / "loop", 0o600)),
    ("chown missing", "ENOENT", lambda p: os.chown(p / "none", 0, 0)),
    ("chown loop", "ELOOP", lambda p: os.chown(p / "loop", 0, 0)),
    ("chown long", "ENAMETOOLONG", lambda p: os.chown(p / NAME_256, 0, 0)),
    ("utime missing", "ENOENT", lambda p: os.utime(p / "none")),
    ("utime loop", "ELOOP", lambda p: os.utime(p / "loop")),
    ("utime too many nanoseconds", "EINVAL", lambda p: utimensat(p / "file", (1, 0), (1, 10**9))),
    ("access below file", "ENOTDIR", lambda p: os.stat(p / "file" / "x")),
    ("getxattr missing", "ENODATA", lambda p: os.getxattr(p / "file", "user.none")),
    ("getxattr of missing", "ENOENT", lambda p: os.getxattr(p / "none", "user.none")),
    ("getxattr little room", "ERANGE", lambda p: with_xattr(p, lambda file: getxattr_into(file, b"user.x", 2))),
    ("listxattr little room", "ERANGE", lambda p: with_xattr(p, lambda file: listxattr_into(file, 6))),
    ("removexattr missing", "ENODATA", lambda p: os.removexattr(p / "file", "user.none")),
    ("setxattr replace", "ENODATA", lambda p: os.setxattr(p / "file", "user.none", b"", os.XATTR_REPLACE)),
    ("setxattr create", "EEXIST", lambda p: [os.setxattr(p / "file", "user.x", b"", os.XATTR_CREATE) for _ in "12"]),
    ("setxattr big", "E2BIG", lambda p: os.setxattr(p / "file", "user.big", bytes(65537))),
    ("setxattr long name", "ERANGE", lambda p: os.setxattr(p / "file", "user." + "n" * 251, b"")),
    ("setxattr empty name", "EINVAL", lambda p: os.setxattr(p / "file", "user.", b"x")),
    ("setxattr no namespace", "ENOTSUP", lambda p: os.setxattr(p / "file", "none", b"")),
    ("setxattr unknown namespace", "ENOTSUP", lambda p: os.setxattr(p / "file", "other.x", b"")),
    ("setxattr on link", "EPERM", lambda p: os.setxattr(p / "link", "user.x", b"", follow_symlinks=False)),
    ("setxattr on fifo", "EPERM", lambda p: os.setxattr(p / "fifo", "user.x", b"")),
    ("getxattr on fifo", "ENODATA", lambda p: os.getxattr(p / "fifo", "user.x")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "call"), [pytest.param(*rest, id=name) for name, *rest in OPENING + NAMES + ATTRIBUTES]
)
def test_error(furnished: Path, name: str, call: Call) -> None:
    before = sorted(os.listdir(furnished))
    assert outcome(lambda: call(furnished)) == name
    after = set(os.listdir(furnished)) | {"empty"}  # one family of calls removes it first
    assert set(before) <= after and "new" not in after and "x" not in after


WRITING: list[tuple[str, Call]] = [
    ("open to write", lambda p: open_close(p / "literal.txt", os.O_WRONLY)),
    ("open to read and write", lambda p: open_close(p / "literal.txt", os.O_RDWR)),
    ("open to empty", lambda p: open_close(p / "literal.txt", os.O_RDONLY | os.O_TRUNC)),
    ("create", lambda p: open_close(p / "new", NEW)),
    ("create in a directory", lambda p: open_close(p / "dir-readonly" / "new", NEW)),
    ("mkdir", lambda p: os.mkdir(p / "new")),
    ("rmdir", lambda p: os.rmdir(p / "dir-readonly")),
    ("unlink", lambda p: os.unlink(p / "literal.txt")),
    ("rename", lambda p: os.rename(p / "literal.txt", p / "new")),
    ("exchange", lambda p: renameat2(p / "literal.txt", p / "dir-readonly", RENAME_EXCHANGE)),
    ("symlink", lambda p: os.symlink("x", p / "new")),
    ("link", lambda p: os.link(p / "literal.txt", p / "new")),
    ("mkfifo", lambda p: os.mkfifo(p / "new")),
    ("truncate", lambda p: os.truncate(p / "literal.txt", 1)),
    ("chmod", lambda p: os.chmod(p / "literal.txt", 0o600)),
    ("chmod the top", lambda p: os.chmod(p, 0o700)),
    ("chown", lambda p: os.chown(p / "literal.txt", 1, 1)),
    ("utime", lambda p: os.utime(p / "literal.txt", (1, 1))),
    ("utime of access", lambda p: utimensat(p / "literal.txt", (1, 1), (0, (1 << 30) - 2))),
    ("setxattr", lambda p: os.setxattr(p / "literal.txt", "user.x", b"x")),
    ("removexattr", lambda p: os.removexattr(p / "literal.txt", "user.x")),
]  # fmt: skip


@pytest.fixture(scope="module", params=["control", pytest.param("mount", marks=pytest.mark.mount)])
def read_only(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that cannot be written to, with: literal.txt, dir-readonly/file."""
    path = tmp_path_factory.mktemp("read-only")
    if request.param == "control":
        (path / "dir-readonly").mkdir()
        (path / "literal.txt").write_bytes(b"literal\n")
        (path / "dir-readonly" / "file").write_bytes(b"data")
        for options in (("--bind", path, path), ("-o", "remount,bind,ro", path)):
            if subprocess.run(["mount", *options], capture_output=True, check=False).returncode != 0:
                pytest.skip("no right to mount a directory read-only")
        yield path
        subprocess.run(["umount", path], check=True)
        return
    with memory_mount(path, "--ro-root") as mounted:
        yield mounted.path


@needs_root
@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in WRITING])
def test_a_read_only_file_system_refuses_changes_before_it_looks_further(read_only: Path, call: Call) -> None:
    assert outcome(lambda: call(read_only)) == "EROFS"


def test_a_read_only_file_system_answers_what_changes_nothing(read_only: Path) -> None:
    assert (read_only / "literal.txt").read_bytes() == b"literal\n"
    assert outcome(lambda: os.mkdir(read_only / "literal.txt")) == "EEXIST"
    assert outcome(lambda: os.unlink(read_only / "none")) == "EROFS"
    assert not os.access(read_only, os.W_OK) and os.access(read_only, os.R_OK | os.X_OK)
    assert os.statvfs(read_only).f_flag & os.ST_RDONLY
