"""Contents written anywhere, over a base or not, against a bytearray; and what becomes of them when sealed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.contents import FILE_BYTES_MAX, FileTooLargeError, WritableContents
from cache.convergence import FileEncoding
from cache.layers import BytesContents
from cache.sealed import SealedFile
from cache.spans import Spans
from cache.spool import DISK_RESERVE_BYTES, Spool, SpoolFullError
from cache.uploadables import SpoolUploadable, uploadable_of
from grid.errors import NotEnoughSharesError
from grid.formats.hashutil import convergence_hasher

ENCODING = FileEncoding(3, 7, 10, b"secret", max_segment_size=64)  # small segments: keys taken on the way are used
MARKER = b"plaintext that must not be seen on the disk"

Step = tuple[str, int, bytes]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 300), st.binary(min_size=1, max_size=90)),
        st.tuples(st.just("truncate"), st.integers(0, 400), st.just(b"")),
        st.tuples(st.just("append"), st.just(0), st.binary(min_size=1, max_size=90)),
        st.tuples(st.just("read"), st.integers(0, 400), st.just(b"")),
    ),
    max_size=25,
)


class Base(BytesContents):
    """Notes what it is asked for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.asked: list[tuple[int, int]] = []
        self.closed = False
        self.broken = False

    async def read(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise NotEnoughSharesError(3, 0)
        return await super().read(offset, length)

    def close(self) -> None:
        self.closed = True


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


def open_spool(state_dir: Path, limit: int = 1 << 30) -> Spool:
    state_dir.mkdir(exist_ok=True)
    return Spool(state_dir, limit_bytes=limit, keep_bytes=0)


def expected_key(data: bytes, encoding: FileEncoding = ENCODING) -> bytes:
    assert encoding.convergence is not None
    hasher = convergence_hasher(encoding.convergence, encoding.k, encoding.n, encoding.segment_size(len(data)))
    hasher.update(data)
    return hasher.digest()[:16]


async def upload(sealed: SealedFile, spool: Spool, *, fill: bool = True) -> tuple[bytes, bytes]:
    """(key, plaintext) as an uploader gets them: from the spool alone, or not."""
    if fill:
        await sealed.fill(spool, 1)
        assert sealed.complete
    used = spool.used_bytes
    uploadable = uploadable_of(sealed, lambda count: None)
    assert isinstance(uploadable, SpoolUploadable) or not fill
    size = await uploadable.get_size()
    parameters = await uploadable.get_all_encoding_parameters()
    assert parameters.segment_size == ENCODING.segment_size(size)
    key = await uploadable.get_encryption_key()
    data = b""
    while piece := b"".join(await uploadable.read(64)):
        data += piece
    assert len(data) == size
    assert spool.used_bytes == used
    await uploadable.close()
    return key, data


async def do(contents: WritableContents, model: bytearray, step: Step) -> None:
    """The same to both."""
    what, number, data = step
    if what == "write":
        await contents.write(number, data)
        model.extend(bytes(max(0, number + len(data) - len(model))))
        model[number : number + len(data)] = data
    elif what == "append":
        await contents.write(contents.size, memoryview(data))
        model += data
    elif what == "truncate":
        await contents.truncate(number)
        model[:] = model[:number] + bytes(max(0, number - len(model)))
    else:
        assert await contents.read(number, 70) == model[number : number + 70]
    assert contents.size == len(model)


@settings(max_examples=100)
@given(steps, st.none() | st.binary(max_size=300), st.none() | st.integers(0, 350), st.booleans())
def test_writing_is_like_a_bytearray(
    state_dir: Path, todo: list[Step], base: bytes | None, keep: int | None, fill: bool
) -> None:
    async def run() -> None:
        spool = open_spool(state_dir)
        under = None if base is None else Base(base)
        contents = WritableContents(spool, ENCODING, 1, under, keep)
        model = bytearray(base or b"")[:keep]
        for step in todo:
            await do(contents, model, step)
        assert await contents.read(0, len(model) + 9) == model
        sealed = await contents.seal()
        contents.close()
        reader = sealed.open()
        assert await reader.read(0, sealed.size) == model
        key, data = await upload(sealed, spool, fill=fill)
        assert data == model and key == expected_key(data)
        assert under is None or under.closed or not fill
        sealed.release()
        assert await reader.read(0, len(model)) == model  # outlives its owner
        reader.close()
        assert spool.used_bytes == 0

    trio.run(run)


async def test_only_what_is_needed_is_fetched(state_dir: Path) -> None:
    spool = open_spool(state_dir)
    base = Base(bytes(1000))
    contents = WritableContents(spool, ENCODING, 1, base)
    assert not contents.dirty
    await contents.write(100, b"x" * 800)
    await contents.truncate(950)
    await contents.read(100, 800)
    assert base.asked == [] and contents.dirty
    await contents.read(90, 20)
    assert base.asked == [(90, 10)]
    base.asked.clear()
    sealed = await contents.seal(complete=True)
    assert base.asked == [(0, 100), (900, 50)]
    assert sealed.complete
    sealed.release()


async def test_a_huge_truncate_costs_nothing(state_dir: Path) -> None:
    spool = open_spool(state_dir, limit=1000)
    contents = WritableContents(spool, ENCODING, 0.01)
    await contents.truncate(FILE_BYTES_MAX)
    await contents.write(FILE_BYTES_MAX - 3, b"end")
    assert spool.used_bytes == 3
    assert await contents.read(FILE_BYTES_MAX - 5, 10) == b"\0\0end"
    assert await contents.read(1 << 40, 100) == bytes(100)
    for impossible in (contents.truncate(FILE_BYTES_MAX + 1), contents.write(FILE_BYTES_MAX, b"x")):
        with pytest.raises(FileTooLargeError):
            await impossible
    contents.close()
    assert spool.used_bytes == 0


async def test_a_failed_seal_leaves_the_contents_open(state_dir: Path) -> None:
    spool = open_spool(state_dir)
    base = Base(b"x" * 500)
    contents = WritableContents(spool, ENCODING, 1, base)
    await contents.write(10, b"y")
    base.broken = True
    with pytest.raises(NotEnoughSharesError):
        await contents.seal(complete=True)
    base.broken = False
    await contents.write(500, b"z")
    sealed = await contents.seal()
    with pytest.raises(ValueError, match="sealed"):
        await contents.write(0, b"")
    with pytest.raises(ValueError, match="sealed"):
        await contents.read(0, 1)
    assert (await upload(sealed, spool))[1] == b"x" * 10 + b"y" + b"x" * 489 + b"z"
    sealed.release()


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


async def test_the_disk_shows_no_plaintext(state_dir: Path) -> None:
    spool = open_spool(state_dir)
    contents = WritableContents(spool, ENCODING, 1)
    await contents.write(0, MARKER * 100)
    files = files_under(state_dir)
    assert [path.stat().st_size for path in files] == [len(MARKER) * 100]
    assert all(MARKER not in path.read_bytes() and path.stat().st_mode & 0o777 == 0o600 for path in files)
    contents.close()


async def test_some_of_the_disk_is_left_free(state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the journal, which has to be written though the disk is full. Files kept for reading give way."""
    free = DISK_RESERVE_BYTES + 100
    monkeypatch.setattr("cache.spool.free_bytes", lambda path: free)
    spool = open_spool(state_dir)
    await spool.room(100, 0)
    with pytest.raises(SpoolFullError, match="disk is full"):
        await spool.room(101, 0.01)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spool.room, 200, 60)
        await trio.testing.wait_all_tasks_blocked()
        free += 100  # another program removes something: nobody tells


async def test_a_writer_waits_for_room(state_dir: Path) -> None:
    spool = open_spool(state_dir, limit=100)
    first, second = WritableContents(spool, ENCODING, 0.01), WritableContents(spool, ENCODING, 60)
    await first.write(0, bytes(90))
    await first.write(0, bytes(90))  # the same place takes no more room
    with pytest.raises(SpoolFullError):
        await first.write(90, bytes(20))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(second.write, 0, bytes(50))
        await trio.testing.wait_all_tasks_blocked()
        assert second.size == 0
        first.close()
    assert second.size == 50 and spool.used_bytes == 50
    second.close()


async def test_what_nobody_knows_is_swept(state_dir: Path) -> None:
    """A file that was open when its process died: its key is gone."""
    before = open_spool(state_dir)
    kept, lost = before.create(), before.create()
    kept.write(0, b"sealed")
    after = open_spool(state_dir)
    again = after.restore(kept.number, kept.key, Spans([(0, 6)]))
    after.sweep({kept.number})
    assert [path.name for path in files_under(state_dir)] == [str(kept.number)]
    assert not (state_dir / str(lost.number)).exists()
    assert again.open().read(0, 6) == b"sealed" and after.used_bytes == 6
    assert after.create().number > lost.number
    again.shut()


async def test_large_reads_and_random_keys(state_dir: Path) -> None:
    spool = open_spool(state_dir)
    encoding = FileEncoding(3, 7, 10, None)
    data = hashlib.sha256(b"seed").digest() * 100_000  # 3.2 MB: past every inline bound
    keys = []
    for _ in range(2):
        contents = WritableContents(spool, encoding, 1)
        await contents.write(5, data)
        sealed = await contents.seal()
        reader = sealed.open()
        assert await reader.read(0, sealed.size) == bytes(5) + data
        reader.close()
        keys.append(await sealed.encryption_key())
        assert await sealed.encryption_key() == keys[-1]
        sealed.release()
    assert keys[0] != keys[1]
