"""The block device, by a driver in Python, on disks in memory and on real files."""

from __future__ import annotations

import errno
import gc
import logging
import struct
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.virtio_cases import GatedDisk
from support.virtio_driver import EVENT_IDX, VERSION_1, Bench, Driver, settle

from avmm.devices.virtio.block import VirtioBlock
from avmm.disks import OverlayDisk, RawDisk
from avmm.disks.base import Disk, Done
from avmm.errors import ConfigError, DeviceError
from avmm.memory.pages import PAGE, Bitmap

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
F_FLUSH = 1 << 9
DATA = 0x2_0000
SIZE = 1 << 20
AT_ONCE = 4


class Requests:
    """Puts requests into the ring, and waits for them."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.memory = driver.bench.memory
        self.ring = driver.rings[0]
        self.at = driver.end
        self.sent: dict[int, tuple[int, int, int]] = {}
        self.done: dict[int, int] = {}

    def send(
        self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, *, kick: bool = True
    ) -> int:
        """Header, data in two parts, room in two parts, status; the chain's number."""
        at = self.at
        self.memory.write(at, struct.pack("<IIQ", kind, 0xAAAA_AAAA, sector))
        parts = [(at, 16, False)]
        where = at + 16
        for size, writable in ((len(data), False), (room, True)):
            for half in (size // 2, size - size // 2) if size > 1 else (size,) if size else ():
                parts.append((where, half, writable))
                where += half
        self.memory.write(at + 16, data)
        self.memory.write(where, b"\xee")
        parts.append((where, 1, True))
        head = self.ring.add(parts)
        self.sent[head] = (at + 16 + len(data), room, where)
        self.at = where + 1
        if kick:
            self.ring.kick()
        return head

    async def answer(self, head: int) -> tuple[int, bytes]:
        """(status, what was read)."""
        with trio.fail_after(10):
            while head not in self.done:
                self.done |= dict(self.ring.take())
                await trio.sleep(0.0005)
        at, room, status = self.sent.pop(head)
        self.written = self.done.pop(head)
        return self.memory.read(status, 1)[0], self.memory.read(at, room)

    async def do(
        self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0
    ) -> tuple[int, bytes]:
        self.at = self.driver.end
        return await self.answer(self.send(kind, sector, data, room))


@asynccontextmanager
async def served(
    disk: Disk, features: int = VERSION_1 | EVENT_IDX | F_FLUSH, **options: object
) -> AsyncIterator[Requests]:
    bench = Bench(VirtioBlock(disk, **options))  # type: ignore[arg-type]
    async with bench.running() as driver:
        await driver.start(features)
        yield Requests(driver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bench.memory.close()


def pattern(size: int) -> bytes:
    return b"".join(struct.pack("<Q", n) for n in range(size // 8))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(pattern(SIZE))
    return path


@pytest.fixture(params=["raw", "overlay"])
def disk(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Disk]:
    made = RawDisk(image) if request.param == "raw" else OverlayDisk(image, folder=tmp_path)
    with made:
        yield made


class MemoryDisk(Disk):
    """Does everything at once and notes it down."""

    name, size, can_discard = "memory", SIZE, True

    def __init__(self) -> None:
        self.data = bytearray(pattern(SIZE))
        self.did: list[str] = []
        self.error: OSError | None = None

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.did.append("read")
        if self.error is not None:
            raise self.error
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.did.append("write")
        if self.error is not None:
            raise self.error
        data = b"".join(buffers)
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        self.did.append("flush")
        if self.error is not None:
            raise self.error

    async def discard(self, offset: int, length: int) -> None:
        self.did.append("discard")


def test_what_it_says_of_itself() -> None:
    block = VirtioBlock(MemoryDisk(), serial="root", queue_size=64)
    assert block.name == "disk root"
    assert block.queue_sizes == (64,)
    assert block.features == 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14
    config = block.config
    assert len(config) == 60
    assert struct.unpack_from("<QII", config, 0) == (SIZE // 512, 0, 62)
    assert struct.unpack_from("<IBBHI", config, 20) == (512, 3, 0, 8, 0)
    most, segments, alignment, most_zeroes, zero_segments, unmap = struct.unpack_from(
        "<IIIIIB", config, 36
    )
    assert (most, segments, alignment) == (1 << 16, 16, 8)
    assert (most_zeroes, zero_segments, unmap) == (1 << 16, 16, 1)


def test_a_read_only_one_offers_no_way_to_write() -> None:
    disk = MemoryDisk()
    disk.read_only = True
    block = VirtioBlock(disk)
    assert block.features == 1 << 2 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10
    assert block.config[36:] == bytes(24)


@pytest.mark.parametrize("size", [0, -512, 511, 513, None])
def test_sizes_that_no_disk_has(size: int) -> None:
    disk = MemoryDisk()
    disk.size = size
    with pytest.raises(ConfigError, match=r"memory has .* bytes: expected a multiple of 512"):
        VirtioBlock(disk)


@pytest.mark.parametrize("serial", ["x" * 21, "ü", "a\nb"])
def test_serials_that_cannot_be(serial: str) -> None:
    with pytest.raises(ConfigError, match="expected at most 20 ASCII"):
        VirtioBlock(MemoryDisk(), serial=serial)


async def test_what_is_written_is_read(disk: Disk) -> None:
    async with served(disk) as requests:
        assert await requests.do(IN, 3, room=4096) == (OK, pattern(SIZE)[1536 : 1536 + 4096])
        assert requests.written == 4097
        data = bytes(range(256)) * 6
        assert await requests.do(OUT, 7, data) == (OK, b"")
        assert requests.written == 1
        expected = pattern(SIZE)[6 * 512 : 7 * 512] + data + pattern(SIZE)[10 * 512 : 11 * 512]
        assert await requests.do(IN, 6, room=5 * 512) == (OK, expected)
        assert await requests.do(FLUSH) == (OK, b"")
        last = SIZE // 512 - 1
        assert await requests.do(OUT, last, data[:512]) == (OK, b"")
        assert await requests.do(IN, last, room=512) == (OK, data[:512])


async def test_large_requests(disk: Disk) -> None:
    async with served(disk) as requests:
        assert await requests.do(IN, 0, room=512 * 1024) == (OK, pattern(SIZE)[: 512 * 1024])
        data = bytes(512 * 1024 - 512) + b"e" * 512
        assert await requests.do(OUT, 1024, data) == (OK, b"")
        assert await requests.do(IN, 1024, room=512 * 1024) == (OK, data)


async def test_its_serial() -> None:
    async with served(MemoryDisk(), serial="root disk") as requests:
        assert await requests.do(GET_ID, room=20) == (OK, b"root disk" + bytes(11))
        assert requests.written == 21
        assert await requests.do(GET_ID, room=4) == (OK, b"root")
        assert await requests.do(GET_ID, room=32) == (OK, b"root disk" + bytes(23))
        assert requests.written == 20


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room", "status"),
    [
        (IN, SIZE // 512, b"", 512, IOERR),
        (IN, SIZE // 512 - 1, b"", 1024, IOERR),
        (IN, (1 << 64) - 1, b"", 512, IOERR),
        (IN, (1 << 55) - 1, b"", 512, IOERR),
        (IN, 1 << 55, b"", 512, IOERR),
        (IN, 0, b"", 511, IOERR),
        (IN, 0, b"", 513, IOERR),
        (IN, 0, b"", 0, OK),
        (OUT, SIZE // 512, bytes(512), 0, IOERR),
        (OUT, (1 << 64) - 1, bytes(512), 0, IOERR),
        (OUT, 0, bytes(100), 0, IOERR),
        (OUT, 0, b"", 0, OK),
        (2, 0, b"", 0, UNSUPP),
        (99, 0, bytes(512), 512, UNSUPP),
        (0xFFFF_FFFF, 0, b"", 0, UNSUPP),
        (DISCARD, 0, b"", 0, IOERR),
        (DISCARD, 0, bytes(15), 0, IOERR),
        (DISCARD, 0, bytes(17 * 16), 0, IOERR),
        (DISCARD, 0, struct.pack("<QII", 0, 8, 1), 0, UNSUPP),
        (DISCARD, 0, struct.pack("<QII", 0, 8, 2), 0, UNSUPP),
        (DISCARD, 0, struct.pack("<QII", SIZE // 512, 8, 0), 0, IOERR),
        (DISCARD, 0, struct.pack("<QII", (1 << 64) - 1, 8, 0), 0, IOERR),
        (DISCARD, 0, struct.pack("<QII", 0, (1 << 32) - 1, 0), 0, IOERR),
        (DISCARD, 0, struct.pack("<QII", 0, 0, 0), 0, OK),
        (WRITE_ZEROES, 0, struct.pack("<QII", 0, 8, 2), 0, UNSUPP),
        (WRITE_ZEROES, 0, struct.pack("<QII", SIZE // 512 - 7, 8, 1), 0, IOERR),
    ],
)
async def test_requests_that_are_refused(
    kind: int, sector: int, data: bytes, room: int, status: int
) -> None:
    disk = MemoryDisk()
    async with served(disk) as requests:
        before = bytes(disk.data)
        assert (await requests.do(kind, sector, data, room))[0] == status
        assert requests.written == (0 if room else 1)
        assert disk.data == before
        assert not requests.driver.needs_reset
        assert (await requests.do(IN, 0, room=512))[0] == OK


@pytest.mark.parametrize(
    "parts",
    [
        [(DATA, 15, False), (DATA + 512, 1, True)],
        [(DATA, 16, False)],
        [(DATA, 16, True)],
        [(DATA, 16, False), (DATA + 512, 512, False)],
        [(DATA, 1, True)],
    ],
)
async def test_requests_that_cannot_be_answered(parts: list[tuple[int, int, bool]]) -> None:
    async with served(MemoryDisk()) as requests:
        requests.ring.add(parts)
        requests.ring.kick()
        await settle()
        assert requests.driver.needs_reset
        assert requests.ring.take() == []


async def test_a_broken_request_leaves_no_view_of_those_beside_it() -> None:
    """They are known to the tracebacks of what ended them, which know each other."""
    gc.disable()
    try:
        async with served(GatedDisk()) as requests:
            for _ in range(3):
                requests.send(FLUSH)
            await settle()
            requests.ring.add([(DATA, 8, False)])
            requests.ring.kick()
            await settle()
            assert requests.driver.needs_reset
    finally:
        gc.enable()


async def test_a_header_in_pieces_and_a_status_behind_the_data() -> None:
    """2.7.4.2: how a driver cuts its message into descriptors means nothing."""
    async with served(MemoryDisk()) as requests:
        requests.memory.write(DATA, struct.pack("<IIQ", IN, 0, 1))
        requests.ring.add([(DATA, 5, False), (DATA + 5, 11, False), (DATA + 64, 513, True)])
        requests.ring.kick()
        await settle()
        assert [written for _, written in requests.ring.take()] == [513]
        assert requests.memory.read(DATA + 64, 513) == pattern(SIZE)[512:1024] + b"\0"


async def test_nothing_changes_a_read_only_disk(image: Path) -> None:
    with RawDisk(image, read_only=True) as disk:
        async with served(disk) as requests:
            some = struct.pack("<QII", 0, 8, 0)
            assert (await requests.do(OUT, 0, bytes(512)))[0] == IOERR
            assert (await requests.do(WRITE_ZEROES, 0, some))[0] == IOERR
            assert (await requests.do(DISCARD, 0, some))[0] == IOERR
            assert (await requests.do(FLUSH))[0] == OK
            assert await requests.do(IN, 0, room=512) == (OK, pattern(512))
    assert image.read_bytes() == pattern(SIZE)


async def test_zeroes_and_discards(disk: Disk) -> None:
    async with served(disk) as requests:
        ranges = [(0, 8, 1), (16, 3, 0), (1001, 9, 1)]
        data = b"".join(struct.pack("<QII", *each) for each in ranges)
        assert await requests.do(WRITE_ZEROES, 0, data) == (OK, b"")
        expected = bytearray(pattern(SIZE))
        for sector, count, _ in ranges:
            expected[512 * sector : 512 * (sector + count)] = bytes(512 * count)
        assert await requests.do(IN, 0, room=512 * 1024) == (OK, expected[: 512 * 1024])
        assert await requests.do(DISCARD, 0, struct.pack("<QII", 32, 64, 0)) == (OK, b"")
        status, data = await requests.do(IN, 31, room=66 * 512)
        assert status == OK
        assert data[:512] == expected[31 * 512 : 32 * 512]
        assert data[-512:] == expected[96 * 512 : 97 * 512]


async def test_one_interrupt_for_all_that_is_done_at_once(image: Path) -> None:
    with RawDisk(image) as disk:
        async with served(disk, VERSION_1 | F_FLUSH) as requests:
            for n in range(4):
                requests.send(IN, 8 * n, room=512, kick=False)
            requests.ring.kick()
            await settle()
            assert len(requests.ring.take()) == 4
            assert requests.driver.bench.line.pulses == 1


async def test_requests_side_by_side_and_one_interrupt_when_they_end() -> None:
    disk = GatedDisk()
    async with served(disk) as requests:
        heads = [requests.send(IN, n, room=512) for n in range(4)]
        await settle()
        assert requests.ring.take() == []
        disk.gate.set()
        await settle()
        assert sorted(head for head, _ in requests.ring.take()) == sorted(heads)
        assert requests.driver.bench.line.pulses == 1


async def test_a_slow_request_keeps_no_other_waiting() -> None:
    class Slow(MemoryDisk):
        gate = trio.Event()

        async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
            if offset == 0:
                await self.gate.wait()
            await super().read(offset, buffers)

    disk = Slow()
    async with served(disk) as requests:
        slow = requests.send(IN, 0, room=512)
        for n in range(1, 50):
            head = requests.send(IN, n, room=512)
            assert (await requests.answer(head))[0] == OK
        assert slow not in requests.done
        disk.gate.set()
        assert await requests.answer(slow) == (OK, pattern(512))


async def test_a_flush_waits_for_the_changes_before_it() -> None:
    class Slow(MemoryDisk):
        gate = trio.Event()

        async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
            if offset == 0:
                await self.gate.wait()
            await super().write(offset, buffers)

    disk = Slow()
    async with served(disk) as requests:
        requests.send(OUT, 0, bytes(512))
        requests.send(OUT, 1, bytes(512))
        flush = requests.send(FLUSH)
        await settle()
        requests.send(OUT, 2, bytes(512))  # comes later: nobody waits for it
        await settle()
        assert disk.did == ["write", "write"]
        assert len(requests.ring.take()) == 2
        disk.gate.set()
        assert await requests.answer(flush) == (OK, b"")
        assert disk.did == ["write", "write", "write", "flush"]


async def test_a_driver_without_flushes_has_each_write_made_durable() -> None:
    disk = MemoryDisk()
    async with served(disk, VERSION_1) as requests:
        assert await requests.do(OUT, 0, bytes(512)) == (OK, b"")
        assert disk.did == ["write", "flush"]
        zeroes = struct.pack("<QII", 0, 8, 0)
        assert await requests.do(DISCARD, 0, zeroes) == (OK, b"")
        assert disk.did == ["write", "flush", "discard", "flush"]


@pytest.mark.parametrize(
    ("kind", "number", "words"),
    [
        (OUT, errno.ENOSPC, "cannot be written at sector 5: No space left"),
        (IN, errno.EIO, "cannot be read at sector 5: Input/output error"),
        (FLUSH, errno.EIO, "cannot be flushed"),
        (WRITE_ZEROES, errno.EIO, "cannot be zeroed"),
    ],
)
async def test_errors_of_the_host_are_the_guests(
    kind: int, number: int, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    disk = MemoryDisk()
    data = {OUT: bytes(512), WRITE_ZEROES: struct.pack("<QII", 0, 8, 0)}.get(kind, b"")
    room = 512 if kind == IN else 0
    async with served(disk, serial="root") as requests:
        for rounds in (1, 2):
            disk.error = OSError(number, "x")
            disk.error.strerror = {errno.ENOSPC: "No space left"}.get(number, "Input/output error")
            for _ in range(20):
                assert (await requests.do(kind, 5, data, room))[0] == IOERR
            assert [words in record.message for record in caplog.records] == [True] * rounds
            assert "disk root (memory)" in caplog.text
            disk.error = None
            assert (await requests.do(kind, 5, data, room))[0] == OK


async def test_a_guest_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    disk = MemoryDisk()
    async with served(disk) as requests:
        for n in range(200):
            disk.error = OSError(errno.EIO, "x") if n % 2 else None
            assert (await requests.do(IN, 0, room=512))[0] == n % 2
        disk.error = None  # its traceback knows the buffers
    assert len(caplog.records) == 64


async def test_a_file_that_was_cut_short(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RawDisk(image) as disk:
        image.write_bytes(b"short")
        async with served(disk) as requests:
            assert (await requests.do(IN, 100, room=512))[0] == IOERR
            assert "shorter than it was" in caplog.text


async def test_a_host_without_room(
    full_up_to: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    image = full_up_to(1 << 20) / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    with RawDisk(image) as disk:
        full_up_to(0)
        async with served(disk) as requests:
            for _ in range(2):
                assert await requests.do(OUT, 8, b"x" * 4096) == (IOERR, b"")
            assert "cannot be written at sector 8: No space left on device" in caplog.text
            full_up_to(1 << 20)
            assert await requests.do(OUT, 8, b"x" * 4096) == (OK, b"")
        assert image.read_bytes()[4096:8192] == b"x" * 4096


async def test_saved_for_a_disk_of_this_size_alone(disk: Disk) -> None:
    block = VirtioBlock(disk)
    state = block.save()
    for change in (
        {"sectors": 1},
        {"sectors": True},
        {"read_only": True},
        {"disk": None},
        {"disk": {"version": 1, "changes": [[0, b"x"]]}},
        {"more": 1},
    ):
        with pytest.raises(DeviceError):
            block.load({**state, **change})
    block.load(state)


async def test_a_pause_while_a_thread_is_at_work(image: Path, tmp_path: Path) -> None:
    """What a thread does to guest memory ends before the device says that it stands still."""
    with RawDisk(image) as disk:
        disk.read_now = lambda offset, buffers: False  # type: ignore[method-assign]
        async with served(disk) as requests:
            bench = requests.driver.bench
            for _ in range(30):
                requests.at = requests.driver.end
                heads = [requests.send(IN, 8 * n, room=4096) for n in range(3)]
                await bench.device.quiesce()
                before = bench.memory.read(0, bench.memory.size)
                await trio.sleep(0.001)
                assert bench.memory.read(0, bench.memory.size) == before
                state = bench.device.save()
                bench.device.load(state)
                await bench.device.resume()
                for n, head in enumerate(heads):
                    assert await requests.answer(head) == (
                        OK,
                        pattern(SIZE)[4096 * n : 4096 * (n + 1)],
                    )


class ThreadedDisk(MemoryDisk):
    """Takes writes without a task, and ends them when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[Done] = []

    def begin_write(self, offset: int, buffers: Sequence[memoryview], done: Done) -> bool:
        self.begun.append(done)
        return True


async def test_what_a_disk_ends_without_a_task_is_told_at_once() -> None:
    disk = ThreadedDisk()
    async with served(disk) as requests:
        heads = [requests.send(OUT, n, bytes(512)) for n in range(3)]
        flush = requests.send(FLUSH)
        await settle()
        interrupts = requests.driver.bench.line.pulses
        disk.begun.pop(1)(None)
        disk.begun.pop(0)(OSError(errno.EIO, "x"))
        assert requests.driver.bench.line.pulses == interrupts + 1
        assert await requests.answer(heads[1]) == (OK, b"")
        assert await requests.answer(heads[0]) == (IOERR, b"")
        assert disk.did == []  # the flush waits for the third
        disk.begun.pop()(None)
        assert await requests.answer(heads[2]) == (OK, b"")
        assert await requests.answer(flush) == (OK, b"")


async def test_a_write_ends_in_a_threads_own_time_while_trio_is_busy() -> None:
    disk = ThreadedDisk()
    async with served(disk) as requests:
        head = requests.send(OUT, 0, bytes(512))
        await settle()
        pulses = requests.driver.bench.line.pulses
        thread = threading.Thread(target=disk.begun.pop(), args=(None,))
        thread.start()
        thread.join()
        assert requests.ring.take() == [(head, 1)]
        assert requests.driver.bench.line.pulses == pulses + 1


@pytest.mark.parametrize("error", [None, OSError(errno.ENOSPC, "full")])
async def test_a_flush_and_a_pause_are_told_by_a_thread(error: OSError | None) -> None:
    disk = ThreadedDisk()
    async with served(disk) as requests:
        heads = [requests.send(OUT, 0, bytes(512)), requests.send(FLUSH)]
        await settle()
        await trio.to_thread.run_sync(disk.begun.pop(), error)
        statuses = [(await requests.answer(head))[0] for head in heads]
        assert statuses == [IOERR if error else OK, OK]
        requests.send(OUT, 0, bytes(512))
        await settle()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(requests.driver.bench.device.quiesce)
            await settle()
            await trio.to_thread.run_sync(disk.begun.pop(), error)
        assert len(requests.ring.take()) == 1


async def test_who_has_written_knows_no_guest_memory_any_more() -> None:
    disk = ThreadedDisk()
    async with served(disk) as requests:
        for n in range(2):
            requests.send(OUT, n, bytes(512))
        await settle()
        kept = disk.begun.copy()
        kept[0](None)
        kept[1](OSError(errno.ENOSPC, "full"))
    assert kept  # and `served` has closed the memory without a warning


async def test_what_the_end_of_a_write_raises_ends_the_machine() -> None:
    """A filter of the user's for the log, say."""

    def stumble(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError("a bug")

    disk, log = ThreadedDisk(), logging.getLogger("avmm.disk")
    log.addFilter(stumble)
    try:
        with pytest.raises(ExceptionGroup) as caught:
            async with served(disk) as requests:
                requests.send(OUT, 0, bytes(512))
                await settle()
                disk.begun.pop()(OSError(errno.ENOSPC, "full"))
                await trio.sleep_forever()
    finally:
        log.removeFilter(stumble)
    assert caught.group_contains(ZeroDivisionError, match="a bug")


async def test_a_write_that_cannot_begin_ends_the_machine() -> None:
    class NoThreads(ThreadedDisk):
        def begin_write(self, offset: int, buffers: Sequence[memoryview], done: Done) -> bool:
            raise RuntimeError("can't start new thread")

    with pytest.raises(ExceptionGroup) as caught:
        async with served(NoThreads()) as requests:
            requests.send(OUT, 0, bytes(512))
            await trio.sleep_forever()
    assert caught.group_contains(RuntimeError, match="can't start")


async def test_thousands_of_writes_end_in_two_threads(image: Path) -> None:
    """Each is answered once, and is on the disk; pages are logged meanwhile, now and then."""
    with RawDisk(image) as disk:
        disk.write_now = lambda offset, buffers: False  # type: ignore[method-assign]
        async with served(disk) as requests:
            memory = requests.driver.bench.memory
            for turn in range(300):
                requests.at = requests.driver.end
                heads = [
                    requests.send(OUT, 8 * n, bytes([(turn + n) % 256]) * 4096)
                    for n in range(AT_ONCE)
                ]
                pages = {requests.sent[head][2] // PAGE for head in heads}
                memory.log() if turn % 2 else memory.unlog()
                logged = Bitmap(memory.size // PAGE)
                assert [await requests.answer(head) for head in heads] == [(OK, b"")] * len(heads)
                await requests.driver.bench.device.quiesce()
                memory.take_dirty(logged)
                await requests.driver.bench.device.resume()
                found = {page for start, end in logged.runs() for page in range(start, end)}
                assert pages < found if turn % 2 else not found
                assert all(
                    image.read_bytes()[4096 * n : 4096 * (n + 1)]
                    == bytes([(turn + n) % 256]) * 4096
                    for n in range(AT_ONCE)
                )


async def test_a_pause_waits_for_writes_without_a_task() -> None:
    disk = ThreadedDisk()
    async with served(disk) as requests:
        head = requests.send(OUT, 0, bytes(512))
        await settle()
        device = requests.driver.bench.device
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(0.05) as scope:
                await device.quiesce()
            assert scope.cancelled_caught
            nursery.start_soon(device.quiesce)
            await settle()
            disk.begun.pop()(None)
        assert requests.ring.take() == [(head, 1)]  # and not made again after it
        await device.resume()
        await settle()
        assert disk.begun == []


async def test_a_bug_in_a_disk_ends_the_machine_by_its_own_name() -> None:
    disk = ThreadedDisk()
    with pytest.raises(ExceptionGroup) as caught:
        async with served(disk) as requests:
            requests.send(OUT, 0, bytes(512))
            await settle()
            disk.begun.pop()(ZeroDivisionError("a bug"))
            await trio.sleep_forever()
    assert caught.group_contains(ZeroDivisionError, match="a bug")


def sectors(count: int) -> bytes:
    return b"o" * 512 * count


RANGES = st.binary(max_size=40) | st.builds(
    lambda sector, count, flags: struct.pack("<QII", sector, count, flags),
    st.integers(0, SIZE // 512 + 2) | st.integers(0, (1 << 64) - 1),
    st.integers(0, 70) | st.integers(0, (1 << 32) - 1),
    st.integers(0, 3),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES])
            | st.integers(0, (1 << 32) - 1),
            st.integers(0, SIZE // 512 + 2) | st.integers(0, (1 << 64) - 1),
            st.lists(RANGES, max_size=2).map(b"".join)
            | st.integers(0, 4).map(lambda n: b"o" * 512 * n),
            st.integers(0, 2100),
        ),
        max_size=12,
    )
)
async def test_whatever_is_asked_is_answered(
    asked: list[tuple[int, int, bytes, int]],
) -> None:
    """By a model: 1 MiB in memory."""
    disk = MemoryDisk()
    model = bytearray(pattern(SIZE))
    async with served(disk) as requests:
        for kind, sector, data, room in asked:
            status, got = await requests.do(kind, sector, data, room)
            assert status in (OK, IOERR, UNSUPP)
            if kind == OUT:
                fits = not len(data) % 512 and sector * 512 + len(data) <= SIZE
                assert status == (OK if fits else IOERR)
                if fits:
                    model[sector * 512 : sector * 512 + len(data)] = data
            elif kind == IN:
                fits = not room % 512 and sector * 512 + room <= SIZE
                assert status == (OK if fits else IOERR)
                if fits:
                    assert got == model[sector * 512 : sector * 512 + room]
            elif kind == WRITE_ZEROES and status == OK:
                for start, count, _ in struct.iter_unpack("<QII", data):
                    model[start * 512 : (start + count) * 512] = bytes(count * 512)
            assert disk.data == model
