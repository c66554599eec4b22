"""The block device (VIRTIO 1.2, 5.2): one queue of requests to an `avmm.disks` disk.

The device begins every request that it finds in the ring, and then interrupts the guest once for
all that could be done at once. Requests that the disk has to wait for run side by side, in tasks,
or without a task if the disk can do that. They are returned in the order in which they end. A
write that ends in one of the disk's threads is returned in that thread, so that the guest need not
wait for trio as well.

A request that was not returned before a pause is made again from its beginning. That is safe:
every kind can be made twice, and the guest has not been told that it was made.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar, Final

import trio

from avmm.ctrl_c import protected
from avmm.devices.state import DeviceState
from avmm.devices.virtio.device import GuestQueue, VirtioDevice
from avmm.devices.virtio.queue import Chain, QueueError
from avmm.disks.base import SECTOR, Disk
from avmm.errors import ConfigError
from avmm.plain import FLAG, MAPPING, U64

logger = logging.getLogger("avmm.disk")

# 5.2.3
F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_TOPOLOGY: Final = 1 << 10
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14

# 5.2.6
IN: Final = 0
OUT: Final = 1
FLUSH: Final = 4
GET_ID: Final = 8
DISCARD: Final = 11
WRITE_ZEROES: Final = 13
_CHANGES: Final = (OUT, DISCARD, WRITE_ZEROES)
_VERBS: Final = {
    IN: "read",
    OUT: "written",
    FLUSH: "flushed",
    DISCARD: "discarded",
    WRITE_ZEROES: "zeroed",
}

OK: Final = 0
IOERR: Final = 1
UNSUPP: Final = 2

_HEADER: Final = struct.Struct("<I4xQ")
_RANGE: Final = struct.Struct("<QII")
_UNMAP: Final = 1
_ID_BYTES: Final = 20
_RANGES: Final = 16
_RANGE_SECTORS: Final = 1 << 16
"""32 MiB, which a host can write quickly even if it cannot make holes."""
_PHYSICAL: Final = 3
"""log2 of the sectors in a block that the host prefers: 4 KiB."""
_AT_ONCE: Final = 64 * 1024
"""The largest request, in bytes, that is copied while other tasks of the program wait."""
_BATCH: Final = 64
"""The most requests that are begun before the guest is interrupted for those that have ended."""
_LINES: Final = 64
"""The most lines in the log about one disk's errors."""
_CONFIG: Final = struct.Struct("<QII4xIBBHIBxHIIIIIB3x")


class VirtioBlock(VirtioDevice):
    """A disk for the guest, backed by `disk`. Whoever made `disk` closes it.

    `serial` is the serial number that the guest can ask for: at most 20 ASCII characters. It is
    also part of the device's name. `queue_size` is how many requests can be in flight, a power of
    2.
    """

    class State(DeviceState, version=1):
        sectors = U64
        read_only = FLAG
        disk = MAPPING

    device_id: ClassVar[int] = 2

    def __init__(self, disk: Disk, *, serial: str = "", queue_size: int = 128) -> None:
        if type(disk.size) is not int or disk.size <= 0 or disk.size % SECTOR:
            raise ConfigError(
                f"{disk.name} has {disk.size!r} bytes: expected a multiple of {SECTOR}"
            )
        if not serial.isascii() or len(serial) > _ID_BYTES or not serial.isprintable():
            raise ConfigError(
                f"disk {disk.name}: serial {serial!r}: expected at most {_ID_BYTES} ASCII "
                "characters"
            )
        if queue_size < 4:
            raise ConfigError(f"disk {disk.name}: a queue of {queue_size}: expected 4 or more")
        self.disk = disk
        self.queue_sizes = (queue_size,)
        self._serial = serial
        self.sectors = disk.size // SECTOR
        self.identity = serial.encode().ljust(_ID_BYTES, b"\0")
        self._failing: set[int] = set()
        self._lines_left = _LINES
        self._telling = threading.Lock()
        """Protects the two above, because a write may fail in a thread of the disk."""
        discards = disk.can_discard and not disk.read_only
        self.supported = {IN, FLUSH, GET_ID}
        self.features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        if disk.read_only:
            self.features |= F_RO
        else:
            self.features |= F_WRITE_ZEROES
            self.supported |= {OUT, WRITE_ZEROES}
        if discards:
            self.features |= F_DISCARD
            self.supported.add(DISCARD)
        self._config = _CONFIG.pack(
            self.sectors,
            0,  # size_max: not offered
            queue_size - 2,  # header and status take one part each
            SECTOR,
            _PHYSICAL,
            0,
            1 << _PHYSICAL,
            0,
            0,  # F_FLUSH says whether writes go through
            0,
            _RANGE_SECTORS if discards else 0,
            _RANGES if discards else 0,
            1 << _PHYSICAL if discards else 0,
            0 if disk.read_only else _RANGE_SECTORS,
            0 if disk.read_only else _RANGES,
            int(discards),
        )

    @property
    def name(self) -> str:
        return f"disk {self._serial}" if self._serial else "disk"

    @property
    def config(self) -> bytes:
        return self._config

    async def serve(self, queues: Mapping[int, GuestQueue], features: int) -> None:
        if 0 in queues:
            await _Service(self, queues[0], flushes=bool(features & F_FLUSH)).run()

    def failed(self, kind: int, sector: int, error: OSError) -> None:
        """Log one line, and then none until a request of that kind has succeeded. The number of
        lines is bounded, because the guest decides how often it asks."""
        with self._telling:
            is_new = kind not in self._failing and self._lines_left > 0
            if is_new:
                self._failing.add(kind)
                self._lines_left -= 1
        if is_new:
            logger.error(
                "%s (%s) cannot be %s at sector %d: %s; the guest gets an I/O error",
                self.name,
                self.disk.name,
                _VERBS[kind],
                sector,
                error.strerror or error,
            )

    def succeeded(self, kind: int) -> None:
        """See `failed`."""
        self._failing.discard(kind)

    @property
    def saves_in_thread(self) -> bool:
        return self.disk.saves_in_thread

    async def release(self) -> None:
        await self.disk.release()

    async def acquire(self) -> None:
        await self.disk.acquire()

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(
            sectors=self.sectors, read_only=self.disk.read_only, disk=dict(self.disk.save())
        )

    def load(self, state: Mapping[str, Any]) -> None:
        saved = self.State.load(self.name, state)
        if saved.sectors != self.sectors:
            raise saved.wrong("sectors", f"the {self.sectors} of {self.disk.name}")
        if saved.read_only is not self.disk.read_only:
            raise saved.wrong("read_only", f"{self.disk.read_only}, as {self.disk.name} is")
        self.disk.load(saved.disk)


@protected
async def _fail_with(error: Exception) -> None:
    """Raise `error` in a task, as the request would have done. The frame must not keep a reference
    to the error, because the error's traceback refers to the frame."""
    try:
        raise error
    finally:
        del error


class _Request:
    """The part of a chain that remains to be answered."""

    __slots__ = ("chain", "kind", "sector", "status")

    def __init__(self, chain: Chain, status: memoryview, kind: int, sector: int) -> None:
        self.chain = chain
        self.status = status
        self.kind = kind
        self.sector = sector


class _Service:
    """The queue at work, until cancelled."""

    def __init__(self, device: VirtioBlock, queue: GuestQueue, *, flushes: bool) -> None:
        self._device = device
        self._disk = device.disk
        self._queue = queue
        self._flushes = flushes
        self._pushed = False
        self._finished = trio.Event()
        self._changes: dict[int, None] = {}
        """The requests that change the disk and have not ended, by number, the oldest first."""
        self._begun = 0
        self._ended = trio.lowlevel.ParkingLot()
        self._without_task = 0
        """How many of them the disk does without a task. `run` waits for these before it ends."""
        self._over: deque[tuple[int, Exception | None]] = deque()
        """Those of them that have ended and that trio has not counted yet, each with the bug that
        ended it, if any."""
        self._waiting = 0
        """How many tasks wait for one of these to end."""
        self._token = trio.lowlevel.current_trio_token()
        self._nursery: trio.Nursery

    @protected
    async def run(self) -> None:
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._tell)
                try:
                    await self._take()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._until(lambda: not self._without_task)
        finally:
            self._signal()

    async def _take(self) -> None:
        queue = self._queue
        while True:
            chain: Chain | None = await queue.next()
            self._count_ends()
            left = _BATCH
            while chain is not None:
                self._begin(chain)
                left -= 1
                chain = queue.pop() if left else None
            self._signal()

    @protected
    async def _tell(self) -> None:
        """Interrupt the guest once for all requests that ended in the same round of the
        scheduler."""
        while True:
            await self._finished.wait()
            self._finished = trio.Event()
            self._signal()

    def _signal(self) -> None:
        if self._pushed:
            self._pushed = False
            self._queue.signal()

    # -- one request -----------------------------------------------------------------------------

    def _begin(self, chain: Chain) -> None:
        """Do the request, if that can be done at once, or start a task for it."""
        header = chain.take(_HEADER.size)
        if len(header) < _HEADER.size or not chain.writable:
            raise QueueError("a disk's request without a header or without room for its status")
        (status,) = chain.cut_last_writable(1)
        kind, sector = _HEADER.unpack(header)
        request = _Request(chain, status, kind, sector)
        if kind == IN:
            self._begin_read(request)
        elif kind == GET_ID:
            written = chain.put(self._device.identity)
            self._finish(request, OK, written)
        elif self._disk.read_only and kind in _CHANGES:
            self._finish(request, IOERR)
        elif kind not in self._device.supported:
            self._finish(request, UNSUPP)
        elif kind == OUT:
            self._begin_write(request)
        elif kind == FLUSH:
            self._nursery.start_soon(self._flush, request, self._begun)
        else:
            self._begin_ranges(request)

    def _begin_read(self, request: _Request) -> None:
        buffers = request.chain.writable
        length = sum(map(len, buffers))
        if not self._is_within(request.sector, length):
            self._finish(request, IOERR)
            return
        if length <= _AT_ONCE:
            try:
                done = self._disk.read_now(request.sector * SECTOR, buffers)
            except OSError as error:
                self._fail(request, error)
                return
            if done:
                self._finish(request, OK, length)
                return
        self._nursery.start_soon(self._read, request, buffers, length)

    @protected
    async def _read(self, request: _Request, buffers: Sequence[memoryview], length: int) -> None:
        try:
            await self._disk.read(request.sector * SECTOR, buffers)
        except OSError as error:
            self._fail(request, error)
        else:
            self._finish(request, OK, length)
        self._finished.set()

    def _begin_write(self, request: _Request) -> None:
        buffers = request.chain.readable
        length = request.chain.readable_bytes
        if not self._is_within(request.sector, length):
            self._finish(request, IOERR)
            return
        if length <= _AT_ONCE and self._flushes:
            try:
                done = self._disk.write_now(request.sector * SECTOR, buffers)
            except OSError as error:
                self._fail(request, error)
                return
            if done:
                self._finish(request, OK)
                return
        number = self._number()
        if self._flushes:
            ended = partial(self._written, request, number)
            self._without_task += 1
            try:
                if self._disk.begin_write(request.sector * SECTOR, buffers, ended):
                    return
            except OSError as error:
                self._fail(request, error)
                self._end(number)
                self._without_task -= 1
                return
            except BaseException:
                self._without_task -= 1
                raise
            self._without_task -= 1
        self._nursery.start_soon(self._write, request, buffers, number)

    def _written(self, request: _Request, number: int, error: Exception | None) -> None:
        """End a write that has no task. Any thread."""
        try:
            if error is None:
                self._answer(request, OK)
            elif isinstance(error, OSError):
                self._device.failed(request.kind, request.sector, error)
                self._answer(request, IOERR)
                error = None
            self._queue.signal()
        except Exception as broken:
            # Raised in trio's thread: here it would end a thread that other requests need.
            error = broken
        # After trio has been told, guest memory may be unmapped, while the disk's thread still
        # refers to the request.
        del request.chain, request.status
        self._over.append((number, error))
        # A task that waits counts itself before it looks at what has ended.
        if error or self._waiting:
            with suppress(trio.RunFinishedError):  # trio has crashed: nobody is waiting
                self._token.run_sync_soon(self._count_ends)

    def _count_ends(self) -> None:
        """In trio: count the writes that have ended without a task."""
        while self._over:
            number, error = self._over.popleft()
            self._without_task -= 1
            self._end(number)
            if error is not None:
                self._nursery.start_soon(_fail_with, error)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Return when `is_so()` is true. That can only change when a change of the disk ends."""
        self._waiting += 1
        try:
            self._count_ends()
            while not is_so():
                await self._ended.park()
        finally:
            self._waiting -= 1

    @protected
    async def _write(self, request: _Request, buffers: Sequence[memoryview], number: int) -> None:
        try:
            await self._disk.write(request.sector * SECTOR, buffers)
            if not self._flushes:  # 5.2.6.2: the driver assumes that finished writes are durable
                await self._disk.flush()
        except OSError as error:
            self._fail(request, error)
        else:
            self._finish(request, OK)
        self._end(number)
        self._finished.set()

    @protected
    async def _flush(self, request: _Request, begun: int) -> None:
        """Flush after all changes that were requested before, and not only those that have
        ended."""
        try:
            await self._until(lambda: not self._changes or next(iter(self._changes)) > begun)
            await self._disk.flush()
        except OSError as error:
            self._fail(request, error)
        else:
            self._finish(request, OK)
        self._finished.set()

    def _begin_ranges(self, request: _Request) -> None:
        data = request.chain.take(_RANGES * _RANGE.size + 1)
        if not data or len(data) % _RANGE.size or len(data) > _RANGES * _RANGE.size:
            self._finish(request, IOERR)
            return
        ranges = list(_RANGE.iter_unpack(data))
        known = _UNMAP if request.kind == WRITE_ZEROES else 0
        if any(flags & ~known for _, _, flags in ranges):
            self._finish(request, UNSUPP)
        elif any(
            count > _RANGE_SECTORS or not self._is_within(sector, count * SECTOR)
            for sector, count, _ in ranges
        ):
            self._finish(request, IOERR)
        else:
            self._nursery.start_soon(self._change_ranges, request, ranges, self._number())

    @protected
    async def _change_ranges(
        self, request: _Request, ranges: Sequence[tuple[int, int, int]], number: int
    ) -> None:
        try:
            for sector, count, flags in ranges:
                offset, length = sector * SECTOR, count * SECTOR
                if request.kind == DISCARD and length:
                    await self._disk.discard(offset, length)
                elif length:
                    await self._disk.write_zeroes(offset, length, unmap=bool(flags & _UNMAP))
            if not self._flushes:
                await self._disk.flush()
        except OSError as error:
            self._fail(request, error)
        else:
            self._finish(request, OK)
        self._end(number)
        self._finished.set()

    # -- its end ---------------------------------------------------------------------------------

    def _is_within(self, sector: int, length: int) -> bool:
        return not length % SECTOR and sector + length // SECTOR <= self._device.sectors

    def _number(self) -> int:
        self._begun += 1
        self._changes[self._begun] = None
        return self._begun

    def _end(self, number: int) -> None:
        del self._changes[number]
        self._ended.unpark_all()

    def _fail(self, request: _Request, error: OSError) -> None:
        self._device.failed(request.kind, request.sector, error)
        self._finish(request, IOERR)

    def _finish(self, request: _Request, status: int, written: int = 0) -> None:
        """Answer it now. The guest is interrupted later, once for everything that trio answers
        until then."""
        self._answer(request, status, written)
        self._pushed = True

    def _answer(self, request: _Request, status: int, written: int = 0) -> None:
        """Return the request to the guest; `written` bytes were put before its status. Any thread.

        The driver is told how many bytes were written without a gap from the beginning of its
        buffers (2.7.8.2). So the status byte counts only if everything before it was written.
        """
        if status == OK:
            self._device.succeeded(request.kind)
        request.status[0] = status
        chain = request.chain
        room = sum(map(len, chain.writable))
        whole = room == (0 if request.kind == GET_ID else written)
        self._queue.push(chain, written + whole, signal=False)
