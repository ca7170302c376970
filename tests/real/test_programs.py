"""Real programs on a real mount of a real grid: each does its usual work there, and finds what it left.

A program that is not installed skips its test by name. All work in one mount, each in a folder of its own, while
uploads of the one before may still be on their way: as it is in a home directory.
"""

from __future__ import annotations

import filecmp
import importlib.util
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.mounting import Mount, can_mount, tahoefs
from tests.real.tahoe_grid import TahoeGrid

pytestmark = [pytest.mark.interop, pytest.mark.mount]

PUBLISHES_MAX = 5  # of a directory that gets many files
VIM_SAVES = 100 if os.environ.get("TAHOEFS_SOAK") else 5
FILES = 1000 if os.environ.get("TAHOEFS_SOAK") else 400


@pytest.fixture(scope="module")
def mount(real_grid: TahoeGrid, node_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    if (reason := can_mount()) is not None:
        pytest.skip(reason)
    where = tmp_path_factory.mktemp("programs") / "mnt"
    where.mkdir()
    tahoefs("mount", "-", where, "-d", node_dir, stdin=real_grid.mkdir())
    yield Mount(where)
    tahoefs("umount", where)


@pytest.fixture
def folder(mount: Mount, request: pytest.FixtureRequest) -> Path:
    path = mount.path / str(request.node.name)
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local tree with what trees have: nested folders, an empty one, links, modes, old times, odd names."""
    root = tmp_path_factory.mktemp("tree") / "tree"
    for number in range(60):
        path = root / f"part{number % 6}" / f"deeper {number % 3}" / f"file{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"line {number}\n".encode() * (number * number))
    (root / "empty").mkdir()
    (root / ".hidden \u00fc\u00f1\u00ef \U0001f600").write_text("x")
    (root / "link").symlink_to("part1/deeper 1")
    (root / "dangling").symlink_to("/nowhere/at/all")
    script = root / "script.sh"
    script.write_text("#!/bin/sh\necho ran\n")
    script.chmod(0o750)
    os.utime(script, ns=(1, 981173106_123456789))
    return root


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """Standard output; a failure tells what the program said."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def differences(one: Path, other: Path) -> str:
    return run("diff", "-r", "--no-dereference", one, other)


def test_cp_keeps_everything(folder: Path, tree: Path) -> None:
    run("cp", "-a", tree, folder / "copy")
    assert differences(tree, folder / "copy") == ""
    ours, theirs = (folder / "copy" / "script.sh").stat(), (tree / "script.sh").stat()
    assert (ours.st_mode, ours.st_mtime_ns, ours.st_size) == (theirs.st_mode, theirs.st_mtime_ns, theirs.st_size)
    assert run(folder / "copy" / "script.sh") == "ran\n"


def test_rsync_has_nothing_to_do_the_second_time(folder: Path, tree: Path) -> None:
    run("rsync", "-a", f"{tree}/", folder)
    assert run("rsync", "-ai", f"{tree}/", folder) == ""
    assert run("rsync", "-aic", f"{tree}/", folder) == ""


def test_tar_there_and_back(folder: Path, tree: Path) -> None:
    run("tar", "cf", folder / "tree.tar", "-C", tree.parent, "tree")
    run("tar", "xf", folder / "tree.tar", "-C", folder)
    run("tar", "df", folder / "tree.tar", "-C", folder)
    assert differences(tree, folder / "tree") == ""


def test_git(folder: Path, tree: Path) -> None:
    def git(*arguments: str | Path, cwd: Path) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main")
        return run("git", *identity, *arguments, cwd=cwd, GIT_CONFIG_GLOBAL=os.devnull, GIT_CONFIG_SYSTEM=os.devnull)

    work, clone = folder / "work", folder / "clone"
    shutil.copytree(tree, work, symlinks=True)
    git("init", "-q", cwd=work)
    git("add", "-A", cwd=work)
    git("commit", "-qm", "one", cwd=work)
    assert git("status", "--porcelain", cwd=work) == ""
    with (work / "script.sh").open("a") as file:
        file.write("# more\n")
    git("commit", "-qam", "two", cwd=work)
    git("clone", "-q", work, clone, cwd=folder)
    git("gc", "-q", cwd=clone)
    git("fsck", "--full", "--strict", cwd=clone)
    assert len(git("log", "--oneline", cwd=clone).splitlines()) == 2
    assert filecmp.cmp(work / "script.sh", clone / "script.sh", shallow=False)


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_sqlite(mount: Mount, mode: str) -> None:
    path = mount.path / f"{mode}.sqlite"
    for batch in range(3):
        with sqlite3.connect(path) as database:
            database.execute(f"pragma journal_mode={mode}")
            database.execute("create table if not exists numbers (number integer primary key, text)")
            rows = ((batch * 500 + number, "x" * 200) for number in range(500))
            database.executemany("insert into numbers values (?, ?)", rows)
        database.close()
    database = sqlite3.connect(path)
    assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert database.execute("select count(*) from numbers").fetchall() == [(1500,)]
    database.close()


def test_editors_and_sed(folder: Path) -> None:
    """Written beside and renamed over, with a backup; and in place."""
    text = folder / "text"
    text.write_text("one\n")
    for number in range(3):
        (folder / "text.new").write_text(f"saved {number}\n")
        text.replace(folder / "text~")
        (folder / "text.new").rename(text)
    assert (text.read_text(), (folder / "text~").read_text()) == ("saved 2\n", "saved 1\n")
    run("sed", "-i.bak", "s/saved/kept/", text)
    assert (text.read_text(), (folder / "text.bak").read_text()) == ("kept 2\n", "saved 2\n")
    assert sorted(os.listdir(folder)) == ["text", "text.bak", "text~"]


@pytest.mark.parametrize("backupcopy", ["no", "yes"])
def test_vim(folder: Path, backupcopy: str) -> None:
    """With a swap file and a backup, flushed: the old file is renamed away, or copied and written in place."""
    vim = shutil.which("vim") or shutil.which("vim.tiny") or "vim"
    settings = f"set nocompatible backup backupskip= backupcopy={backupcopy} swapfile updatecount=1 fsync"
    text = folder / "text"
    text.write_text("said 0\n" * 3000)
    text.chmod(0o640)
    os.setxattr(text, "user.note", b"kept")
    for number in range(1, 1 + VIM_SAVES):
        change = ("-c", f"%s/said {number - 1}$/said {number}/", "-c", "$normal oadded")
        run(vim, "-es", "-u", "NONE", "-i", "NONE", "--cmd", settings, *change, "-c", "wq", text)
        assert text.read_text() == f"said {number}\n" * 3000 + "added\n" * number
        assert (folder / "text~").read_text() == f"said {number - 1}\n" * 3000 + "added\n" * (number - 1)
        assert sorted(os.listdir(folder)) == ["text", "text~"]  # no swap file is left
        assert text.stat().st_mode & 0o777 == 0o640
    assert backupcopy == "no" or os.getxattr(text, "user.note") == b"kept"


def test_a_file_that_vim_left_is_recovered(folder: Path) -> None:
    """The swap file is all there is of what was typed before it was killed."""
    vim = shutil.which("vim") or shutil.which("vim.tiny") or "vim"
    text, recovered = folder / "text", folder / "recovered"
    text.write_text("saved\n")
    quiet = (vim, "-es", "-u", "NONE", "-i", "NONE", "--cmd", "set nocompatible swapsync=fsync")
    if shutil.which(vim) is None:
        pytest.skip("vim is not installed")
    typed = ("-c", "normal otyped", "-c", "preserve", "-c", "!kill -KILL $PPID", text)
    killed = subprocess.run([*map(str, (*quiet, *typed))], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(folder)) == [".text.swp", "text"] and text.read_text() == "saved\n"
    run(*quiet, "-r", "-c", f"w! {recovered}", "-c", "q!", text)
    assert recovered.read_text() == "saved\ntyped\n"


def test_appending_and_writers_side_by_side(folder: Path) -> None:
    shell = "for line in 1 2 3 4 5 6 7 8 9 10; do echo $0 $line >> shared; echo $0 $line >> own$0; done"
    writers = [subprocess.Popen(["sh", "-c", shell, str(number)], cwd=folder) for number in range(8)]
    assert [writer.wait() for writer in writers] == [0] * 8
    lines = sorted(f"{writer} {line}" for writer in range(8) for line in range(1, 11))
    assert sorted((folder / "shared").read_text().splitlines()) == lines
    own = "".join(path.read_text() for path in folder.glob("own*"))
    assert sorted(own.splitlines()) == lines


def test_make(folder: Path) -> None:
    (folder / "Makefile").write_text("prog: a.o b.o\n\tcc -o $@ $^\n%.o: %.c\n\tcc -c -o $@ $<\n")
    (folder / "a.c").write_text("int f(void);\nint main(void) { return f(); }\n")
    (folder / "b.c").write_text("int f(void) { return 0; }\n")
    if shutil.which("cc") is None:
        pytest.skip("cc is not installed")
    run("make", cwd=folder)
    run(folder / "prog")
    assert "up to date" in run("make", cwd=folder)


def test_a_venv(folder: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    assert run(folder / "venv" / "bin" / "python", "-c", "import sys; print(sys.prefix)") == f"{folder / 'venv'}\n"


def write_wheel(path: Path) -> None:
    """A package of three modules, as pip takes it."""
    info = "small-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for number in range(3):
            wheel.writestr(f"small/module{number}.py" if number else "small/__init__.py", f"number = {number}\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_pip_installs_there(folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    write_wheel(tmp_path / "small-1.0-py3-none-any.whl")
    options = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", "--root-user-action=ignore")
    run(sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", *tmp_path.glob("*.whl"))
    program = "import small.module2; print(small.module2.number)"
    assert run(sys.executable, "-c", program, PYTHONPATH=str(folder / "site")) == "2\n"


def test_many_small_files_are_a_few_publishes(mount: Mount, folder: Path) -> None:
    mount.sync()
    before = mount.status()["publishes"]
    (folder / "many").mkdir()
    for number in range(FILES):
        (folder / "many" / f"file{number:04}").write_bytes(number.to_bytes(4, "big") * 1024)
    mount.sync(240)
    assert mount.status()["publishes"] - before <= PUBLISHES_MAX + 1  # and one of the folder above
    (folder / "many").rename(mount.path / "moved")
    assert (mount.path / "moved" / "file0399").read_bytes() == (399).to_bytes(4, "big") * 1024
    shutil.rmtree(mount.path / "moved")
    mount.sync()


def test_nothing_of_all_this_was_a_fault(mount: Mount, node_dir: Path) -> None:
    mount.sync()
    status = mount.status()
    assert status["errors"] == [] and status["conflicts"] == 0
    log = mount.log(node_dir)
    assert "Traceback" not in log and "ERROR" not in log and "URI:" not in log
