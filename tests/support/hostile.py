"""What a hostile guest does to a virtio device, and memory that shows where it got out of hand."""

from __future__ import annotations

import trio

from avmm.errors import GuestMemoryError
from avmm.memory.ram import GuestMemory
from support.virtio_driver import VERSION_1, Driver

REGISTERS = [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94]
REGISTERS += [0xA0, 0xA4, 0xAC, 0xC0, 0xFC, 0x100, 0x104, 0x108, 0x1FC]
CANARY = b"\xc5"
HALF = 0x4_0000


class Island(GuestMemory):
    """Guest memory whose RAM is the middle half of the mapping; canaries live around it."""

    def __init__(self) -> None:
        super().__init__(2 * HALF)
        region = self.table.struct.regions[0]
        region.offset, region.size = HALF // 2, HALF
        region.host += HALF // 2
        self.whole[:] = CANARY * 2 * HALF
        self.whole[HALF // 2 : -HALF // 2] = bytes(HALF)

    def discard(self, gpa: int, length: int) -> None:
        if not (0 <= gpa <= HALF - length and gpa + length <= HALF):
            raise GuestMemoryError("outside of the island")
        super().discard(HALF // 2 + gpa, length)

    def canaries_live(self) -> bool:
        around = bytes(self.whole[: HALF // 2]) + bytes(self.whole[-HALF // 2 :])
        return around == CANARY * HALF

    def read(self, gpa: int, length: int) -> bytes:
        assert 0 <= gpa <= HALF - length
        return bytes(self.whole[HALF // 2 + gpa : HALF // 2 + gpa + length])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        assert 0 <= gpa <= HALF - len(data)
        self.whole[HALF // 2 + gpa : HALF // 2 + gpa + len(data)] = data


async def step(driver: Driver, what: str, where: int, size, value: int) -> None:
    bench = driver.bench
    if what == "write":
        where &= ~(size - 1)
        await bench.write_and_wait(where, value & (1 << 8 * size) - 1, size)
    elif what == "read":
        bench.read(where & ~(size - 1), size)
    elif what == "start":
        await driver.start(VERSION_1 | (value & 3) << 28)
    elif what == "settle":
        await a_while()
    elif what == "pause":
        await bench.device.quiesce()
        await bench.device.resume()
    else:
        ring = driver.rings[value % len(driver.rings)]
        if what == "ring":
            at = ring.desc + where
            bench.memory.write(min(at, HALF - len(size)), size)
        elif ring.free:
            index = ring.free[0]
            ring.describe(index, where, size, value & 3, value)
            ring.offer(index)
        ring.kick(always=True)


async def a_while() -> None:
    """A few rounds of the scheduler: there may be no end of work."""
    for _ in range(10):
        await trio.lowlevel.checkpoint()
