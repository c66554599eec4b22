"""The guest's side of virtio, without a guest: rings in guest memory, registers by `VirtioMmio`.

`Bench` is a device on a fake machine, `Driver` its driver. Written from VIRTIO 1.2, not from what
it tests: it shares no code with avmm.devices.virtio.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

import trio
import trio.testing

from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.mmio import VirtioMmio
from avmm.memory.ram import GuestMemory
from support.front import FrontHost

NEXT, WRITE, INDIRECT = 1, 2, 4
VERSION_1, EVENT_IDX, INDIRECT_DESC = 1 << 32, 1 << 29, 1 << 28
NEEDS_RESET = 0x40


class Line:
    def __init__(self) -> None:
        self.pulses = 0

    def set(self, asserted: bool) -> None:
        self.pulses += asserted

    def pulse(self) -> None:
        self.pulses += 1


class Bell:
    """A doorbell, and a wake-up; the guest's write reaches the device, which rings it."""

    def __init__(self) -> None:
        self._rung = False
        self._event: trio.Event | None = None
        self.rings = 0

    def ring(self) -> None:
        self.rings += 1
        self._rung = True
        if self._event is not None:
            self._event.set()

    set = ring

    async def wait(self) -> None:
        assert self._event is None, "two tasks wait for one bell"
        self._event = trio.Event()
        try:
            if self._rung:
                await trio.lowlevel.checkpoint()
            else:
                await self._event.wait()
        finally:
            self._event = None
        self._rung = False


class FakeHost(FrontHost):
    def __init__(self, device: VirtioMmio, memory: GuestMemory) -> None:
        self.line = Line()
        super().__init__(device, memory, self.line)
        self.bells: dict[int, Bell] = {}

    def wakeup(self) -> Bell:
        return Bell()

    def doorbell(self, offset: int, size: int, value: int, *, by_exit: bool = False) -> Bell:
        assert (offset, size) == (0x50, 4)
        bell = self.bells[value] = Bell()
        return bell


class Bench:
    """A virtio device on a fake machine of `memory` bytes; its `run` runs inside of `running`."""

    def __init__(self, model: VirtioDevice, memory: GuestMemory | None = None, **kwargs: Any):
        self.memory = memory or GuestMemory("1M")
        self.model = model
        self.device = VirtioMmio(model, **kwargs)
        self.host = FakeHost(self.device, self.memory)
        self.line = self.host.line
        self.device.attach(self.host)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Driver]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.device.run)
            yield Driver(self)
            nursery.cancel_scope.cancel()

    def read(self, offset: int, size: int = 4) -> int:
        with self.host.lock:
            value = self.host.registers.read(offset, size)
        assert isinstance(value, int)
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, value: int, size: int = 4) -> Any:
        with self.host.lock:
            return self.host.registers.write(offset, size, value)

    async def write_and_wait(self, offset: int, value: int, size: int = 4) -> None:
        answer = self.write(offset, value, size)
        if answer is not None:
            await answer


class Ring:
    """A queue as the driver has it: descriptor table, available ring, used ring from `at` on."""

    def __init__(self, bench: Bench, index: int, size: int, at: int, event_idx: bool) -> None:
        self.bench, self.index, self.size, self.event_idx = bench, index, size, event_idx
        self.memory = bench.memory
        self.desc = at
        self.avail = at + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size
        self.added = 0
        self.kicked = 0
        self.seen = 0
        self.free = list(range(size))

    def u16(self, at: int) -> int:
        return struct.unpack("<H", self.memory.read(at, 2))[0]

    def set16(self, at: int, value: int) -> None:
        self.memory.write(at, struct.pack("<H", value & 0xFFFF))

    def describe(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        data = struct.pack("<QIHH", address, length, flags, following)
        self.memory.write(self.desc + 16 * index, data)

    def offer(self, head: int) -> None:
        self.set16(self.avail + 4 + 2 * (self.added % self.size), head)
        self.added = self.added + 1 & 0xFFFF
        self.set16(self.avail + 2, self.added)

    def add(self, parts: Sequence[tuple[int, int, bool]]) -> int:
        """A chain of (address, length, writable); its head."""
        indices = [self.free.pop(0) for _ in parts]
        for n, (address, length, writable) in enumerate(parts):
            last = n == len(parts) - 1
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            self.describe(indices[n], address, length, flags, 0 if last else indices[n + 1])
        self.chains = getattr(self, "chains", {})
        self.chains[indices[0]] = indices
        self.offer(indices[0])
        return indices[0]

    def wants_kick(self) -> bool:
        old, new = self.kicked, self.added
        self.kicked = new
        if not self.event_idx:
            return not self.u16(self.used) & 1
        event = self.u16(self.used + 4 + 8 * self.size)
        return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF

    def kick(self, *, always: bool = False) -> bool:
        wanted = self.wants_kick() or always
        if wanted:
            self.bench.write(0x50, self.index)
        return wanted

    def take(self) -> list[tuple[int, int]]:
        """(head, written) of what came back."""
        found = []
        while self.seen != self.u16(self.used + 2):
            at = self.used + 4 + 8 * (self.seen % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            found.append((head, written))
            self.seen = self.seen + 1 & 0xFFFF
            self.free += getattr(self, "chains", {}).pop(head, [])
            if self.event_idx:
                self.set16(self.avail + 4 + 2 * self.size, self.seen)
        return found


class Driver:
    """Does what 3.1.1 tells a driver to do."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rings: dict[int, Ring] = {}

    async def start(
        self, features: int = VERSION_1 | EVENT_IDX | INDIRECT_DESC, *, size: int = 16, at: int = 0
    ) -> dict[int, Ring]:
        bench = self.bench
        await bench.write_and_wait(0x70, 0)
        assert bench.read(0x70) == 0
        bench.write(0x70, 1)
        bench.write(0x70, 3)
        for half in (0, 1):
            bench.write(0x24, half)
            bench.write(0x20, features >> 32 * half & 0xFFFF_FFFF)
        bench.write(0x70, 11)
        assert bench.read(0x70) == 11
        self.rings = {}
        index = 0
        while True:
            bench.write(0x30, index)
            if not (most := bench.read(0x34)):
                break
            ring = Ring(bench, index, min(size, most), at, bool(features & EVENT_IDX))
            bench.memory.write(ring.desc, bytes(ring.end - ring.desc))
            self.set_up(ring)
            bench.write(0x44, 1)
            self.rings[index] = ring
            at = (ring.end + 0xFFF) & ~0xFFF
            index += 1
        self.end = at
        bench.write(0x70, 15)
        await settle()
        return self.rings

    def set_up(self, ring: Ring) -> None:
        bench = self.bench
        bench.write(0x30, ring.index)
        bench.write(0x38, ring.size)
        for offset, value in ((0x80, ring.desc), (0x90, ring.avail), (0xA0, ring.used)):
            bench.write(offset, value & 0xFFFF_FFFF)
            bench.write(offset + 4, value >> 32)

    @property
    def needs_reset(self) -> bool:
        return bool(self.bench.read(0x70) & NEEDS_RESET)


async def settle() -> None:
    """Let the device's tasks run until they wait."""
    await trio.testing.wait_all_tasks_blocked()
