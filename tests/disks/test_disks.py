"""The disks themselves: files, holes, locks, overlays, threads."""

from __future__ import annotations

import errno
import gc
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from support.threads import ours

from avmm.disks import DiskOptions, OverlayDisk, RawDisk, files, open_disk
from avmm.disks.base import Disk
from avmm.disks.pool import Pool
from avmm.errors import ConfigError, DeviceError
from avmm.plain import decode, encode

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"b" * SIZE)
    os.sync()
    return path


async def contents(disk: Disk, offset: int = 0, length: int = SIZE) -> bytes:
    data = bytearray(length)
    await disk.read(offset, [memoryview(data)[: length // 3], memoryview(data)[length // 3 :]])
    return bytes(data)


def room(path: Path) -> int:
    os.sync()
    return path.stat().st_blocks * 512


@pytest.fixture
def block_device(image: Path) -> Iterator[Path]:
    """What holds `image`."""
    try:
        command = ["losetup", "--find", "--show", image]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device can be had here: {getattr(error, 'stderr', error)}")
    device = Path(done.stdout.strip())
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


async def test_a_block_device(image: Path, block_device: Path) -> None:
    with RawDisk(block_device) as disk:
        assert (disk.size, disk.name) == (SIZE, str(block_device))
        await disk.write(512, [memoryview(b"x" * 512), memoryview(b"y" * 1024)])
        await disk.flush()
        assert image.read_bytes()[:2560] == b"b" * 512 + b"x" * 512 + b"y" * 1024 + b"b" * 512
        await disk.write_zeroes(8192, 65536, unmap=True)
        await disk.discard(SIZE // 2, SIZE // 4)
        await disk.flush()
        assert await contents(disk, 8192, 65536) == bytes(65536)
        assert await contents(disk, 8192 + 65536, 4096) == b"b" * 4096
        with pytest.raises(ConfigError, match=f"disk {block_device}: "):
            RawDisk(block_device)
    with RawDisk(block_device, read_only=True) as disk, RawDisk(block_device, read_only=True):
        assert (await contents(disk))[:1024] == b"b" * 512 + b"x" * 512


async def test_a_file(image: Path) -> None:
    with RawDisk(image) as disk:
        assert (disk.size, disk.read_only, disk.name) == (SIZE, False, str(image))
        await disk.write(512, [memoryview(b"x" * 512), memoryview(b"y" * 1024)])
        await disk.flush()
        assert image.read_bytes()[:2560] == b"b" * 512 + b"x" * 512 + b"y" * 1024 + b"b" * 512
        assert await contents(disk) == image.read_bytes()
    disk.close()


async def test_many_buffers_and_short_transfers(image: Path, monkeypatch: pytest.MonkeyPatch):
    preadv, pwritev = os.preadv, os.pwritev
    whole = memoryview(bytearray(os.urandom(SIZE)))
    parts = [whole[at : at + 512] for at in range(0, SIZE, 512)]
    assert len(parts) > 1024

    def short_read(fd, buffers, offset, flags=0):
        return preadv(fd, [buffers[0][: len(buffers[0]) // 2 + 1]], offset, flags)

    def short_write(fd, buffers, offset, flags=0):
        return pwritev(fd, [buffers[0][: len(buffers[0]) // 2 + 1]], offset, flags)

    with RawDisk(image) as disk:
        await disk.write(0, parts)
        assert image.read_bytes() == whole
        monkeypatch.setattr(os, "pwritev", short_write)
        await disk.write(512, parts[:10])
        assert image.read_bytes()[512:5632] == whole[:5120]
        monkeypatch.setattr(os, "preadv", short_read)
        got = bytearray(5120)
        await disk.read(512, [memoryview(got)[:1000], memoryview(got)[1000:]])
        assert got == whole[:5120]
        assert not disk.read_now(512, [memoryview(got)])


async def test_what_the_page_cache_has_comes_at_once(image: Path) -> None:
    with RawDisk(image) as disk:
        data = bytearray(4096)
        assert disk.read_now(4096, [memoryview(data)])
        assert data == b"b" * 4096


async def test_a_file_system_that_knows_no_such_flag(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(fd, buffers, offset):
        asked.append(offset)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(files, "read_at_once", refuse)
    for disk in (RawDisk(image, read_only=True), OverlayDisk(image)):
        with disk:
            data = memoryview(bytearray(512))
            assert not disk.read_now(0, [data])
            assert not disk.read_now(0, [data])
            assert len(asked) == 1
            asked.clear()


@pytest.mark.parametrize("unmap", [True, False])
async def test_holes(image: Path, unmap: bool) -> None:
    with RawDisk(image) as disk:
        before = room(image)
        await disk.discard(SIZE // 4, SIZE // 4)
        assert room(image) <= before - SIZE // 4
        await disk.write_zeroes(SIZE // 2, SIZE // 4, unmap=unmap)
        if unmap:
            assert room(image) <= before - SIZE // 2
        else:
            assert room(image) >= before - SIZE // 4
        assert await contents(disk) == (b"b" * (SIZE // 4) + bytes(SIZE // 2) + b"b" * (SIZE // 4))
        assert image.stat().st_size == SIZE


async def test_where_there_can_be_no_holes(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "punch", lambda *_: False)
    monkeypatch.setattr(files, "zero", lambda *_: False)
    with RawDisk(image) as disk:
        await disk.discard(0, SIZE // 2)
        assert image.read_bytes() == b"b" * SIZE
        await disk.write_zeroes(512, SIZE - 1024, unmap=True)
        assert image.read_bytes() == b"b" * 512 + bytes(SIZE - 1024) + b"b" * 512
    with OverlayDisk(image) as disk:
        await disk.write_zeroes(0, 1024, unmap=True)
        assert await contents(disk, 0, 2048) == bytes(2048)


async def test_a_flush_that_failed_once_fails_for_ever(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "lost")

    with RawDisk(image) as disk:
        monkeypatch.setattr(os, "fdatasync", fail)
        with pytest.raises(OSError, match="lost"):
            await disk.flush()
        monkeypatch.undo()
        with pytest.raises(OSError, match="lost"):
            await disk.flush()


def test_one_writer_or_many_readers(image: Path) -> None:
    with RawDisk(image):
        for again in (RawDisk, OverlayDisk):
            with pytest.raises(ConfigError, match="image: it is in use; expected one that nobody"):
                again(image)
        with pytest.raises(ConfigError, match="in use"):
            RawDisk(image, read_only=True)
    with (
        RawDisk(image, read_only=True),
        OverlayDisk(image),
        OverlayDisk(image),
        pytest.raises(ConfigError, match="expected one that nobody else uses"),
    ):
        RawDisk(image)
    RawDisk(image).close()


def test_the_lock_keeps_other_processes_out(image: Path) -> None:
    code = f"import avmm; avmm.RawDisk({str(image)!r}).close()"
    command = [sys.executable, "-c", code]
    with RawDisk(image):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "in use" in done.stderr
    assert subprocess.run(command, check=False).returncode == 0


def test_files_that_are_no_disks(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(bytes(1000))
    os.mkfifo(tmp_path / "fifo")
    for name, why in [
        ("none", "none: expected one to read and write: No such file"),
        ("", "Is a directory"),
        ("empty", "empty: its size is 0 bytes, expected a multiple of 512"),
        ("odd", "odd: its size is 1000 bytes, expected a multiple of 512"),
        ("fifo", "fifo: expected a file or a block device"),
    ]:
        with pytest.raises(ConfigError, match=why):
            RawDisk(tmp_path / name)
    with pytest.raises(ConfigError, match="expected a file or a block device"):
        RawDisk(tmp_path, read_only=True)
    with pytest.raises(ConfigError, match="/dev/null: expected a file"):
        RawDisk("/dev/null")


def test_an_overlay_without_a_place(image: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"room for a file of .* bytes in .*/nowhere: No such"):
        OverlayDisk(image, folder=tmp_path / "nowhere")
    RawDisk(image).close()  # not locked any more


def test_nothing_is_left_open(image: Path) -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(ours())

    gc.collect()  # what other tests have left
    before = held()

    async def use() -> None:
        for kind in (RawDisk, OverlayDisk):
            with kind(image) as disk:
                async with trio.open_nursery() as nursery:
                    for _ in range(10):
                        nursery.start_soon(contents, disk)

    trio.run(use)
    assert held() == before


async def test_an_overlay_never_writes_its_base(image: Path, tmp_path: Path) -> None:
    with OverlayDisk(image, folder=tmp_path) as disk, OverlayDisk(image) as other:
        await disk.write(512, [memoryview(b"x" * 1024)])
        await disk.write_zeroes(4096, 8192, unmap=False)
        await disk.discard(SIZE - 512, 512)
        await disk.flush()
        changed = b"b" * 512 + b"x" * 1024 + b"b" * 2560 + bytes(8192)
        assert await contents(disk, 0, len(changed)) == changed
        data = bytearray(len(changed))
        assert disk.read_now(0, [memoryview(data)[:999], memoryview(data)[999:]])
        assert data == changed
        assert await contents(other) == b"b" * SIZE
        assert image.read_bytes() == b"b" * SIZE
        assert [path.name for path in tmp_path.iterdir()] == ["image"]  # its file has no name


async def test_an_overlay_takes_room_for_changes_alone(tmp_path: Path) -> None:
    image = tmp_path / "huge"
    with image.open("wb") as file:
        file.truncate(1 << 40)
    with OverlayDisk(image, folder=tmp_path) as disk:
        await disk.write((1 << 40) - 4096, [memoryview(b"x" * 4096)])
        assert await contents(disk, (1 << 40) - 8192, 8192) == bytes(4096) + b"x" * 4096
        fd = disk._fd
        os.fsync(fd)
        assert os.fstat(fd).st_blocks * 512 < 1 << 20
        await disk.discard((1 << 40) - 4096, 4096)
        os.fsync(fd)
        assert await contents(disk, (1 << 40) - 4096, 4096) == bytes(4096)


def runs(*pairs: tuple[int, int]) -> bytes:
    """(offset, length) of changes, as an overlay's state has them."""
    return b"".join(struct.pack("<QQ", *pair) for pair in pairs)


async def test_changes_here_and_there_fit_into_a_state(tmp_path: Path) -> None:
    """More runs than a state may have entries, and one that is longer than a piece."""
    image = tmp_path / "large"
    with image.open("wb") as file:
        file.truncate(80 << 20)
    with OverlayDisk(image) as disk, OverlayDisk(image) as other:
        for number in range(70_000):
            disk._write(number * 1024, [memoryview(number.to_bytes(512, "little"))])
        await disk.write(75 << 20, [memoryview(b"xyz!" * (640 << 10))])
        other.load(decode(encode(dict(disk.save())), "the disk's state"))
        assert await contents(other, 0, 78 << 20) == await contents(disk, 0, 78 << 20)


async def test_an_overlays_changes_are_saved_with_the_machine(image: Path) -> None:
    with OverlayDisk(image) as disk, OverlayDisk(image) as other:
        await disk.write(512, [memoryview(b"x" * 1024)])
        await disk.write_zeroes(SIZE - 1024, 1024, unmap=True)
        state = disk.save()
        await other.write(8192, [memoryview(b"y" * 512)])
        other.load(state)
        assert await contents(other) == await contents(disk)
        assert other.save() == state
        for changes in (
            None,
            [None],
            [[runs((0, 512))]],
            [[0, bytes(512)]],
            [[b"", b""]],
            [[runs((0, 512))[:-1], bytes(512)]],
            [[runs((0, 512)), bytearray(512)]],
            [[runs((0, 512)), bytes(1024)]],
            [[runs((0, 1024)), bytes(512)]],
            [[runs((1, 512)), bytes(512)]],
            [[runs((0, 511)), bytes(511)]],
            [[runs((0, 0), (0, 512)), bytes(512)]],
            [[runs((SIZE, 512)), bytes(512)]],
            [[runs((SIZE - 512, 1024)), bytes(1024)]],
            [[runs(((1 << 64) - 512, 512)), bytes(512)]],
        ):
            with pytest.raises(DeviceError):
                other.load({**state, "changes": changes})
        assert await contents(other) == await contents(disk)


WRITES = st.tuples(
    st.sampled_from(["write", "zero", "discard", "read"]), st.integers(0, 63), st.integers(1, 16)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(WRITES, max_size=30))
async def test_an_overlay_is_a_disk(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.NamedTemporaryFile() as file:
        base = os.urandom(64 * 512)
        file.write(base)
        file.flush()
        model = bytearray(base)
        with OverlayDisk(file.name) as disk:
            for n, (what, sector, count) in enumerate(steps):
                at = 512 * sector
                length = min(512 * count, len(base) - at)
                if what == "write":
                    model[at : at + length] = bytes([n]) * length
                    await disk.write(at, [memoryview(bytes([n]) * length)])
                elif what in ("zero", "discard"):
                    model[at : at + length] = bytes(length)
                    if what == "zero":
                        await disk.write_zeroes(at, length, unmap=bool(n % 2))
                    else:
                        await disk.discard(at, length)
                assert await contents(disk, at, length) == model[at : at + length]
                assert await contents(disk, 0, len(base)) == model
        file.seek(0)
        assert file.read() == base


async def test_an_embedders_disk_need_not_do_much() -> None:
    disk = Disk()
    with pytest.raises(DeviceError, match="disk cannot be read"):
        await disk.read(0, [])
    with pytest.raises(DeviceError, match="disk cannot be written"):
        await disk.write(0, [])
    with pytest.raises(DeviceError, match="disk cannot be flushed"):
        await disk.flush()
    disk.read_only = True
    await disk.flush()
    with pytest.raises(DeviceError, match="disk cannot be saved: it lacks save"):
        disk.save()
    with pytest.raises(DeviceError, match="disk cannot be loaded: it lacks load"):
        disk.load({"version": 1})
    disk.contents_stay = True
    assert disk.save() == {"version": 1}
    disk.load({"version": 1})
    for wrong in ({}, {"version": 1, "x": 1}):
        with pytest.raises(DeviceError, match="disk's state"):
            disk.load(wrong)

    class Writes(Disk):
        def __init__(self) -> None:
            self.written: list[tuple[int, int]] = []

        async def write(self, offset, buffers) -> None:
            assert all(not any(buffer) for buffer in buffers)
            self.written.append((offset, sum(map(len, buffers))))

    writes = Writes()
    await writes.write_zeroes(512, 100 * 1024, unmap=True)
    assert writes.written == [(512, 65536), (512 + 65536, 100 * 1024 - 65536)]


async def test_threads_side_by_side() -> None:
    pool = Pool("test", 3)
    barrier = threading.Barrier(3)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(pool.run, barrier.wait, 10)
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("test") == 3
    pool.close()
    pool.close()
    assert "test" not in [thread.name for thread in threading.enumerate()]


async def test_a_job_that_ends_just_after_trio_has_looked() -> None:
    """The look that finds nothing more lets the next job end, and the thread go on to another."""
    pool = Pool("test", 1)
    gate, looked, begun, answered = (threading.Event() for _ in range(4))

    class Looks(deque[Any]):
        def __bool__(self) -> bool:
            found = len(self) > 0
            if not found:
                looked.set()
                begun.wait(10)
            return found

    pool._done = Looks()
    in_time = []

    def last() -> None:
        begun.set()
        in_time.append(answered.wait(5))

    async def second() -> None:
        await pool.run(looked.wait, 10)
        answered.set()

    async with trio.open_nursery() as nursery:
        for job in (partial(pool.run, gate.wait, 10), second, partial(pool.run, last)):
            nursery.start_soon(job)
            await trio.testing.wait_all_tasks_blocked()
        gate.set()
    assert in_time == [True]
    pool.close()


async def test_a_thread_at_work_is_waited_for() -> None:
    pool = Pool("test", 1)
    ended = []

    def work() -> None:
        time.sleep(0.1)
        ended.append(1)

    with trio.move_on_after(0.01) as scope:
        await pool.run(work)
        await trio.lowlevel.checkpoint()
    assert ended
    assert scope.cancelled_caught
    pool.close()


async def test_a_system_without_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    none, one = Pool("none", 2), Pool("one", 2)
    await one.run(lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start"):
            await none.run(lambda: None)
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(one.run, lambda: None)
    await none.run(lambda: None)
    none.close()
    one.close()


async def test_what_a_thread_raises() -> None:
    pool = Pool("test", 1)
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0)
    pool.close()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a.img", DiskOptions(Path("a.img"))),
        ("a.img,ro", DiskOptions(Path("a.img"), read_only=True)),
        ("a,overlay,serial=x=y", DiskOptions(Path("a"), overlay=True, serial="x=y")),
    ],
)
def test_options(text: str, options: DiskOptions) -> None:
    assert DiskOptions.parse(text) == options


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "disk '': expected FILE"),
        (",ro", "expected FILE"),
        ("a,rw", "disk a: unknown option 'rw'; expected ro, overlay or serial=NAME"),
        ("a,serial=", "unknown option 'serial='"),
        ("a,", "unknown option ''"),
        ("a,ro,overlay", "disk a: expected ro or overlay, not both"),
    ],
)
def test_options_that_are_none(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        DiskOptions.parse(text)


def test_options_make_disks(image: Path) -> None:
    with open_disk(DiskOptions(image, read_only=True)) as disk:
        assert disk.read_only
    with open_disk(DiskOptions(image, overlay=True)) as disk:
        assert isinstance(disk, OverlayDisk)
    with open_disk(DiskOptions(image)) as disk:
        assert not disk.read_only
