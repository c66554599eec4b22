"""What is slow in the host keeps its own device waiting, and no other, under a real guest."""

from __future__ import annotations

import fcntl
import math
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from support.guest import machine

import avmm
from avmm.devices.virtio.mmio import VirtioMmio

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm", "nothing_left")]

DISK, CONSOLE = 0xC000_0000, 0xC000_1000
DISK_RING, CONSOLE_RING = 0x20_0000, 0x21_0000
HEADER, DATA, STATUS, TEXT = 0x22_0000, 0x22_1000, 0x22_2000, 0x22_3000
READS, WORDS = 0x22_4000, 0x22_5000


def set_up(base: int, ring: int, queue: int, *parts: tuple[int, int, int, int]) -> str:
    """A driver with the version-1 feature alone, one queue, and one chain in its table."""
    registers = [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, queue), (0x38, 4)]
    registers += [
        (0x80, ring),
        (0x90, ring + 0x1000),
        (0xA0, ring + 0x2000),
        (0x44, 1),
        (0x70, 15),
    ]
    lines = [f"mov rbx, {base}", f"mov rdi, {ring}"]
    lines += [f"mov dword ptr [rbx + {offset}], {value}" for offset, value in registers]
    for at, (address, length, flags, following) in enumerate(parts):
        lines += [
            f"mov dword ptr [rdi + {16 * at}], {address}",
            f"mov dword ptr [rdi + {16 * at + 8}], {length}",
            f"mov dword ptr [rdi + {16 * at + 12}], {following << 16 | flags}",
        ]
    return "\n".join(lines)


def offer(base: int, ring: int, queue: int, count: int, extra: str = "") -> str:
    """Offer the chain, once more if it has come back, and count that."""
    return f"""
        mov rdi, {ring}
        mov ax, [rdi + 0x1002]
        cmp ax, [rdi + 0x2002]
        jne 2f
        mov rdx, {count}
        {extra}
        inc dword ptr [rdx]
        inc word ptr [rdi + 0x1002]
        mov rbx, {base}
        mov dword ptr [rbx + 0x50], {queue}
    2:
    """


NUMBER = f"""
    mov eax, [rdx]
    mov rsi, {TEXT}
    mov [rsi], eax
"""
GUEST = f"""
    {set_up(DISK, DISK_RING, 0, (HEADER, 16, 1, 1), (DATA, 512, 3, 2), (STATUS, 1, 2, 0))}
    {set_up(CONSOLE, CONSOLE_RING, 1, (TEXT, 4, 0, 0))}
1:  {offer(DISK, DISK_RING, 0, READS)}
    {offer(CONSOLE, CONSOLE_RING, 1, WORDS, NUMBER)}
    pause
    jmp 1b
"""
"""Reads sector 0 again and again, and prints how often it has printed, neither waiting for the
other."""


class Stalled(avmm.Disk):
    """Does nothing but wait, which cannot be cut short, as a thread cannot."""

    name, size, read_only = "stalled", 1 << 20, True

    def __init__(self, wait: Callable[[], Awaitable[object]], *, shield: bool = True) -> None:
        self._wait = wait
        self._shield = shield
        self.asked = 0
        self.begun = trio.Event()

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.asked += 1
        self.begun.set()
        with trio.CancelScope(shield=self._shield):
            await self._wait()
        for buffer in buffers:
            buffer[:] = b"D" * len(buffer)


class Guest:
    def __init__(self, vm: avmm.Machine, port: avmm.Port) -> None:
        self.vm = vm
        self.port = port
        self.printed = b""

    def counted(self, count: int) -> int:
        value: int = struct.unpack("<I", self.vm.memory.read(count, 4))[0]
        return value

    async def until(self, count: int, least: int) -> None:
        with trio.fail_after(30):
            while self.counted(count) < least:  # noqa: ASYNC110 - a guest sets no event
                await trio.sleep(0.002)

    async def read(self) -> None:
        async for data in self.port:
            self.printed += data

    async def goes_on(self, count: int) -> None:
        await self.until(count, self.counted(count) + 100)

    def check_printed(self) -> None:
        """Every number once."""
        whole = len(self.printed) // 4
        assert whole > 100
        numbers = struct.unpack(f"<{whole}I", self.printed[: 4 * whole])
        assert numbers == tuple(range(whole))


@asynccontextmanager
async def running(
    folder: Path, disk: avmm.Disk, port: avmm.Port | None = None
) -> AsyncIterator[Guest]:
    port = port or avmm.Port("hvc0", console=True)
    devices = [
        avmm.mmio(VirtioMmio(avmm.VirtioBlock(disk)), DISK, 0x200, irq=5),
        avmm.mmio(VirtioMmio(avmm.Console(port)), CONSOLE, 0x200, irq=6),
    ]
    async with machine(folder, GUEST, devices=devices) as vm:
        yield Guest(vm, port)


async def stall(folder: Path, disk: Stalled, release: Callable[[], None], deadline: float) -> None:
    async with running(folder, disk) as guest, trio.open_nursery() as nursery:
        nursery.start_soon(guest.read)
        await disk.begun.wait()
        await guest.goes_on(WORDS)
        late = f"given up after {deadline} s: virtio disk has not finished what it has in flight"
        with pytest.raises(avmm.PauseTimeout, match=late):
            async with guest.vm.paused(deadline=deadline):
                pass
        await guest.goes_on(WORDS)
        assert (guest.counted(READS), disk.asked) == (1, 1)
        release()
        await guest.until(READS, 2)
        assert guest.vm.memory.read(DATA, 512) == b"D" * 512
        assert guest.vm.memory.read(STATUS, 1) == b"\0"
        await guest.goes_on(WORDS)
        guest.check_printed()
        nursery.cancel_scope.cancel()


async def test_a_disk_that_does_not_answer_stalls_its_own_requests_alone(tmp_path: Path) -> None:
    released = trio.Event()
    await stall(tmp_path, Stalled(released.wait), released.set, 1.0)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_disk_that_takes_ten_seconds(tmp_path: Path) -> None:
    ready = trio.current_time() + 10
    await stall(tmp_path, Stalled(partial(trio.sleep_until, ready)), lambda: None, 1.0)


async def test_a_disk_that_lets_itself_be_cancelled_is_asked_again(tmp_path: Path) -> None:
    released = trio.Event()
    disk = Stalled(released.wait, shield=False)
    async with running(tmp_path, disk) as guest, trio.open_nursery() as nursery:
        nursery.start_soon(guest.read)
        await disk.begun.wait()
        async with guest.vm.paused(deadline=10):
            asked = disk.asked
            released.set()
        await guest.until(READS, 2)
        assert asked == 1
        nursery.cancel_scope.cancel()


class Quick(avmm.Disk):
    name, size, read_only = "quick", 1 << 20, True

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            buffer[:] = b"Q" * len(buffer)


async def console_stands(
    folder: Path, port: avmm.Port, wait: Callable[[], Awaitable[None]]
) -> None:
    """Nobody reads, for as long as `wait` takes; then somebody does."""
    async with running(folder, Quick(), port) as guest, trio.open_nursery() as nursery:
        await guest.until(WORDS, port.output_size // 4)
        await guest.goes_on(READS)
        stands = guest.counted(WORDS)
        await wait()
        await guest.goes_on(READS)
        assert guest.counted(WORDS) == stands == port.output_size // 4 + 1
        assert len(port.output) == port.output_size
        async with guest.vm.paused(deadline=5):
            pass
        nursery.start_soon(guest.read)
        await guest.goes_on(WORDS)
        guest.check_printed()
        assert port.lost == 0
        nursery.cancel_scope.cancel()


async def test_a_console_without_a_reader_costs_no_other_device_anything(tmp_path: Path) -> None:
    await console_stands(tmp_path, avmm.Port("a", output_size=4096), trio.lowlevel.checkpoint)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_reader_that_stops_for_a_minute(tmp_path: Path) -> None:
    port = avmm.Port("a", output_size=4096, stall=math.inf)
    await console_stands(tmp_path, port, partial(trio.sleep, 60))


@pytest.mark.parametrize("direct", [False, True], ids=["stream", "pipe"])
async def test_a_console_that_nobody_reads_keeps_the_newest_of_it(
    tmp_path: Path, direct: bool
) -> None:
    """After `stall` the guest waits no more, and what is kept does not grow."""
    near, far = os.pipe()
    fcntl.fcntl(far, fcntl.F_SETPIPE_SZ, 4096)
    os.write(far, bytes(4000))
    port = avmm.Port("hvc0", console=True, output_size=512, stall=0.05)
    try:
        async with running(tmp_path, Quick(), port) as guest, trio.open_nursery() as nursery:
            if direct:
                nursery.start_soon(port.write_to, far)
            await guest.until(WORDS, 400)
            assert port.lost
            assert len(port.output) <= 512
            await guest.goes_on(READS)
            async with guest.vm.paused(deadline=5):
                last = guest.counted(WORDS) - 1
                newest = struct.unpack("<I", port.output[-4:])[0]
                assert newest in (last, last - 1)  # or it is in the ring
            nursery.cancel_scope.cancel()
    finally:
        os.close(near)
        os.close(far)
