# ruff: noqa: PTH104, PTH106, PTH115, PTH211, PTH101, PTH102, PTH108
"""Error cases of POSIX calls, each on a real mount and on a directory of the local disk as the control."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tahoefs.mounts import MemoryMount, memory_mount, needs_fuse

NAME_255 = "n" * 255
NAME_256 = "n" * 256


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemoryMount]:
    with memory_mount(tmp_path_factory.mktemp("posix") / "mnt", "-o", "allow_other") as mounted:
        yield mounted


@pytest.fixture(params=["control", pytest.param("mount", marks=[pytest.mark.mount])])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with: file, dir/inner/, empty/, link -> file, dangling -> nowhere, loop -> loop, fifo."""
    if request.param == "control":
        path = tmp_path
    else:
        mounted: MemoryMount = request.getfixturevalue("mount")
        path = mounted.path / str(len(os.listdir(mounted.path)))
        path.mkdir()
    (path / "file").write_bytes(b"data")
    (path / "dir" / "inner").mkdir(parents=True)
    (path / "empty").mkdir()
    (path / "link").symlink_to("file")
    (path / "dangling").symlink_to("nowhere")
    (path / "loop").symlink_to("loop")
    os.mkfifo(path / "fifo")
    return path


def open_close(path: Path, flags: int, mode: int = 0o644) -> None:
    os.close(os.open(path, flags, mode))


CASES: list[tuple[str, int, Callable[[Path], object]]] = [
    ("open missing", errno.ENOENT, lambda p: open_close(p / "none", os.O_RDONLY)),
    ("open in missing", errno.ENOENT, lambda p: open_close(p / "none" / "x", os.O_WRONLY | os.O_CREAT)),
    ("open exclusive", errno.EEXIST, lambda p: open_close(p / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    ("open exclusive link", errno.EEXIST, lambda p: open_close(p / "dangling", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    ("open below file", errno.ENOTDIR, lambda p: open_close(p / "file" / "x", os.O_RDONLY)),
    ("open directory to write", errno.EISDIR, lambda p: open_close(p / "dir", os.O_WRONLY)),
    ("open directory to create", errno.EISDIR, lambda p: open_close(p / "dir", os.O_WRONLY | os.O_CREAT)),
    ("open file as directory", errno.ENOTDIR, lambda p: open_close(p / "file", os.O_RDONLY | os.O_DIRECTORY)),
    ("open link nofollow", errno.ELOOP, lambda p: open_close(p / "link", os.O_RDONLY | os.O_NOFOLLOW)),
    ("open loop", errno.ELOOP, lambda p: open_close(p / "loop", os.O_RDONLY)),
    ("open long", errno.ENAMETOOLONG, lambda p: open_close(p / NAME_256, os.O_RDONLY)),
    ("create long", errno.ENAMETOOLONG, lambda p: open_close(p / NAME_256, os.O_WRONLY | os.O_CREAT)),
    ("fifo nonblocking to write", errno.ENXIO, lambda p: open_close(p / "fifo", os.O_WRONLY | os.O_NONBLOCK)),
    ("stat missing", errno.ENOENT, lambda p: (p / "none").stat()),
    ("stat dangling", errno.ENOENT, lambda p: (p / "dangling").stat()),
    ("stat loop", errno.ELOOP, lambda p: (p / "loop").stat()),
    ("stat long", errno.ENAMETOOLONG, lambda p: (p / NAME_256).stat()),
    ("mkdir existing", errno.EEXIST, lambda p: (p / "dir").mkdir()),
    ("mkdir over file", errno.EEXIST, lambda p: (p / "file").mkdir()),
    ("mkdir over dangling", errno.EEXIST, lambda p: (p / "dangling").mkdir()),
    ("mkdir below file", errno.ENOTDIR, lambda p: (p / "file" / "x").mkdir()),
    ("mkdir in missing", errno.ENOENT, lambda p: (p / "none" / "x").mkdir()),
    ("mkdir long", errno.ENAMETOOLONG, lambda p: (p / NAME_256).mkdir()),
    ("rmdir full", errno.ENOTEMPTY, lambda p: (p / "dir").rmdir()),
    ("rmdir file", errno.ENOTDIR, lambda p: (p / "file").rmdir()),
    ("rmdir link", errno.ENOTDIR, lambda p: (p / "link").rmdir()),
    ("rmdir missing", errno.ENOENT, lambda p: (p / "none").rmdir()),
    ("rmdir dot", errno.EINVAL, lambda p: os.rmdir(f"{p}/empty/.")),
    ("rmdir dotdot", errno.ENOTEMPTY, lambda p: os.rmdir(f"{p}/dir/inner/..")),
    ("unlink directory", errno.EISDIR, lambda p: (p / "empty").unlink()),
    ("unlink missing", errno.ENOENT, lambda p: (p / "none").unlink()),
    ("unlink below file", errno.ENOTDIR, lambda p: (p / "file" / "x").unlink()),
    ("unlink long", errno.ENAMETOOLONG, lambda p: (p / NAME_256).unlink()),
    ("rename missing", errno.ENOENT, lambda p: (p / "none").rename(p / "x")),
    ("rename into missing", errno.ENOENT, lambda p: (p / "file").rename(p / "none" / "x")),
    ("rename file over directory", errno.EISDIR, lambda p: (p / "file").rename(p / "empty")),
    ("rename directory over file", errno.ENOTDIR, lambda p: (p / "dir").rename(p / "file")),
    ("rename directory over full", errno.ENOTEMPTY, lambda p: (p / "empty").rename(p / "dir")),
    ("rename below itself", errno.EINVAL, lambda p: (p / "dir").rename(p / "dir" / "inner" / "x")),
    ("rename over ancestor", errno.ENOTEMPTY, lambda p: (p / "dir" / "inner").rename(p / "dir")),
    ("rename long", errno.ENAMETOOLONG, lambda p: (p / "file").rename(p / NAME_256)),
    ("rename from long", errno.ENAMETOOLONG, lambda p: (p / NAME_256).rename(p / "x")),
    ("rename dot", errno.EBUSY, lambda p: os.rename(f"{p}/dir/.", p / "x")),
    ("symlink existing", errno.EEXIST, lambda p: (p / "file").symlink_to("x")),
    ("symlink long name", errno.ENAMETOOLONG, lambda p: (p / NAME_256).symlink_to("x")),
    ("symlink long target", errno.ENAMETOOLONG, lambda p: (p / "x").symlink_to("t" * 5000)),
    ("symlink empty target", errno.ENOENT, lambda p: os.symlink("", p / "x")),
    ("readlink file", errno.EINVAL, lambda p: os.readlink(p / "file")),
    ("readlink missing", errno.ENOENT, lambda p: os.readlink(p / "none")),
    ("mkfifo existing", errno.EEXIST, lambda p: os.mkfifo(p / "file")),
    ("mkfifo long", errno.ENAMETOOLONG, lambda p: os.mkfifo(p / NAME_256)),
    ("mknod existing", errno.EEXIST, lambda p: os.mknod(p / "dir", stat.S_IFREG | 0o600)),
    ("truncate directory", errno.EISDIR, lambda p: os.truncate(p / "dir", 0)),
    ("truncate missing", errno.ENOENT, lambda p: os.truncate(p / "none", 0)),
    ("truncate negative", errno.EINVAL, lambda p: os.truncate(p / "file", -1)),
    ("chmod missing", errno.ENOENT, lambda p: (p / "none").chmod(0o600)),
    ("chown missing", errno.ENOENT, lambda p: os.chown(p / "none", 0, 0)),
    ("utime missing", errno.ENOENT, lambda p: os.utime(p / "none")),
    ("listdir file", errno.ENOTDIR, lambda p: os.listdir(p / "file")),
    ("listdir missing", errno.ENOENT, lambda p: os.listdir(p / "none")),
    ("link directory", errno.EPERM, lambda p: os.link(p / "dir", p / "x")),
    ("getxattr missing", errno.ENODATA, lambda p: os.getxattr(p / "file", "user.none")),
    ("removexattr missing", errno.ENODATA, lambda p: os.removexattr(p / "file", "user.none")),
    ("setxattr replace", errno.ENODATA, lambda p: os.setxattr(p / "file", "user.none", b"", os.XATTR_REPLACE)),
    ("setxattr big", errno.E2BIG, lambda p: os.setxattr(p / "file", "user.big", bytes(65537))),
    ("setxattr no namespace", errno.EOPNOTSUPP, lambda p: os.setxattr(p / "file", "none", b"")),
    ("setxattr on link", errno.EPERM, lambda p: os.setxattr(p / "link", "user.x", b"", follow_symlinks=False)),
    ("write to reader", errno.EBADF, lambda p: write_to_reader(p)),
    ("truncate reader", errno.EINVAL, lambda p: truncate_reader(p)),
]


def write_to_reader(path: Path) -> None:
    descriptor = os.open(path / "file", os.O_RDONLY)
    try:
        os.write(descriptor, b"x")
    finally:
        os.close(descriptor)


def truncate_reader(path: Path) -> None:
    descriptor = os.open(path / "file", os.O_RDONLY)
    try:
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


@needs_fuse
@pytest.mark.parametrize(("number", "call"), [pytest.param(*rest, id=name) for name, *rest in CASES])
def test_error(place: Path, number: int, call: Callable[[Path], object]) -> None:
    with pytest.raises(OSError) as caught:
        call(place)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


@needs_fuse
def test_names_of_255_bytes_work_everywhere(place: Path) -> None:
    umlauts = "ü" * 127 + "x"
    for name in (NAME_255, umlauts):
        (place / name).write_bytes(b"1")
        (place / name).rename(place / f"{name[:-1]}2")
        assert f"{name[:-1]}2" in os.listdir(place)
        (place / f"{name[:-1]}2").unlink()
        (place / name).mkdir()
        (place / name).rmdir()


@needs_fuse
def test_rename_that_works(place: Path) -> None:
    (place / "dir").rename(place / "empty")  # a directory over an empty one
    assert sorted(os.listdir(place / "empty")) == ["inner"]
    (place / "file").rename(place / "link")  # over a link: the link goes, not what it points to
    assert not (place / "link").is_symlink() and (place / "link").read_bytes() == b"data"
    (place / "link").rename(place / "link")
    (place / "link").rename(place / "empty" / "inner" / "moved")
    assert (place / "empty" / "inner" / "moved").read_bytes() == b"data"


@needs_fuse
def test_attributes_that_are_kept(place: Path) -> None:
    path = place / "file"
    for mode in (0o000, 0o777, 0o4755, 0o2711, 0o1777, 0o640):
        path.chmod(mode)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    os.chown(path, 1234, 5678)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)
    os.utime(path, ns=(1_000_000_001, 2_000_000_000_123_456_789))
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (1_000_000_001, 2_000_000_000_123_456_789)
    os.utime(place / "link", ns=(7, 8), follow_symlinks=False)
    assert (place / "link").lstat().st_mtime_ns == 8 and path.stat().st_mtime_ns != 8
    os.setxattr(path, "user.name", b"value", os.XATTR_CREATE)
    assert (os.getxattr(path, "user.name"), os.listxattr(path)) == (b"value", ["user.name"])
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.name", b"other", os.XATTR_CREATE)


@needs_fuse
def test_times_move_with_what_changes_them(place: Path) -> None:
    path = place / "file"
    os.utime(path, ns=(0, 0))
    changed = path.stat().st_ctime_ns
    path.chmod(0o600)
    assert path.stat().st_mtime_ns == 0 and path.stat().st_ctime_ns >= changed
    with path.open("ab") as file:
        file.write(b"x")
    assert path.stat().st_mtime_ns > 0
    os.utime(path, ns=(0, 0))
    os.truncate(path, 2)
    assert path.stat().st_mtime_ns > 0


def as_somebody_else(place: Path, call: Callable[[], object]) -> int:
    """Run `call` in `place` as another user, in a process of its own; returns its errno, 0 if it succeeded."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chdir(place)  # the way here may be closed to others
            os.setgroups([])
            os.setgid(54321)
            os.setuid(54321)
            call()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


@needs_fuse
@needs_root
def test_set_id_bits_go_when_others_write(place: Path) -> None:
    place.chmod(0o755)
    (place / "file").chmod(0o6777)
    assert as_somebody_else(place, lambda: os.close(os.open("file", os.O_WRONLY | os.O_TRUNC))) == 0
    assert stat.S_IMODE((place / "file").stat().st_mode) == 0o777
    (place / "file").chmod(0o6777)

    def write() -> None:
        descriptor = os.open("file", os.O_WRONLY)
        os.write(descriptor, b"x")
        os.close(descriptor)

    assert as_somebody_else(place, write) == 0
    assert stat.S_IMODE((place / "file").stat().st_mode) == 0o777


@needs_fuse
@needs_root
def test_others_may_do_what_mode_bits_say(place: Path) -> None:
    (place / "file").chmod(0o640)
    place.chmod(0o755)
    refused: list[tuple[int, Callable[[], object]]] = [
        (errno.EACCES, lambda: os.open("file", os.O_RDONLY)),
        (errno.EACCES, lambda: os.open("new", os.O_WRONLY | os.O_CREAT)),
        (errno.EACCES, lambda: os.mkdir("new")),
        (errno.EACCES, lambda: os.unlink("file")),
        (errno.EACCES, lambda: os.rename("file", "x")),
        (errno.EPERM, lambda: os.chmod("file", 0o777)),
        (errno.EPERM, lambda: os.chown("file", 54321, 54321)),
        (errno.EPERM, lambda: os.utime("file", (1, 1))),
        (errno.EACCES, lambda: os.utime("file")),
    ]
    for number, call in refused:
        assert errno.errorcode.get(as_somebody_else(place, call)) == errno.errorcode[number]
    place.chmod(0o1777)  # sticky: make what you like, remove only your own
    assert as_somebody_else(place, lambda: os.mkdir("own")) == 0
    assert (place / "own").stat().st_uid == 54321
    assert as_somebody_else(place, lambda: os.rmdir("own")) == 0
    assert as_somebody_else(place, lambda: os.unlink("file")) == errno.EPERM


@needs_fuse
def test_a_socket_can_be_bound(place: Path) -> None:
    os.chdir(place)  # its path may be longer than a socket address
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    assert stat.S_ISSOCK((place / "socket").stat().st_mode)
    os.chdir("/")


@needs_fuse
def test_link_counts(place: Path) -> None:
    assert (place / "file").stat().st_nlink == 1
    os.listdir(place / "dir")
    assert (place / "dir").stat().st_nlink == 3
    (place / "dir" / "inner").rmdir()
    assert (place / "dir").stat().st_nlink == 2
