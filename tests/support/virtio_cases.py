"""The virtio devices that the conformance suite runs, each with a request that it holds on to."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.frame import Backend, Frame
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.port import Port
from avmm.devices.virtio.queue import Chain
from avmm.devices.virtio.rng import Rng
from avmm.devices.virtio.vsock import Vsock
from avmm.disks.base import Disk
from support.virtio_driver import Driver


@dataclass(frozen=True)
class Case:
    """`make` gives a device that does not finish what `submit` makes the driver send before
    `let_go`. `queue` is where that is sent, `written` what the device writes for it in all."""

    name: str
    make: Callable[[], VirtioDevice]
    submit: Callable[[Driver], None]
    let_go: Callable[[Any], None]
    queue: int
    written: int
    another: Callable[[Driver], list[tuple[int, int, bool]]] | None = None
    """One more request, after `submit`; None: any 8 bytes are one."""
    listened: int | None = None
    """A queue that it takes chains from at once, where `queue` is none."""


def _rng() -> Rng:
    gate = trio.Event()

    async def source(count: int) -> bytes:
        await gate.wait()
        return b"r" * count

    rng = Rng(source)
    rng.gate = gate  # type: ignore[attr-defined]
    return rng


def _submit_rng(driver: Driver) -> None:
    ring = driver.rings[0]
    for n in range(3):
        ring.add([(driver.end + 64 * n, 64, True)])
    ring.kick()


def _console() -> Console:
    return Console(Port("hvc0", output_size=100), Port("data"), queue_size=8)


def _submit_console(driver: Driver) -> None:
    ring = driver.rings[1]
    driver.bench.memory.write(driver.end, bytes(range(240)))
    for n in range(3):
        ring.add([(driver.end + 80 * n, 40, False), (driver.end + 80 * n + 40, 40, False)])
    ring.kick()


def _read_console(console: Console) -> None:
    """From now on it waits for no reader."""
    port = console.ports["hvc0"]
    port.stall = 0
    port.drained.set()


class GatedDisk(Disk):
    """1 MiB in memory, which answers nothing before its gate is opened."""

    name, size, can_discard, contents_stay = "gated", 1 << 20, True, True

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.data = bytearray(b"d" * self.size)

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self.gate.wait()
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self.gate.wait()
        data = b"".join(buffers)
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        await self.gate.wait()

    async def discard(self, offset: int, length: int) -> None:
        await self.gate.wait()
        self.data[offset : offset + length] = bytes(length)


def _submit_block(driver: Driver) -> None:
    """Two reads and a write."""
    ring, memory, at = driver.rings[0], driver.bench.memory, driver.end
    for n, (kind, writable) in enumerate([(0, True), (1, False), (0, True)]):
        memory.write(at + 16 * n, struct.pack("<IIQ", kind, 0, 8 * n))
        data = at + 0x1000 + 0x400 * n
        ring.add([(at + 16 * n, 16, False), (data, 0x400, writable), (at + 64 + n, 1, True)])
    ring.kick()


def _another_block(driver: Driver) -> list[tuple[int, int, bool]]:
    at = driver.end
    return [(at, 16, False), (at + 0x1000, 0x400, True), (at + 64, 1, True)]


def _submit_vsock(driver: Driver) -> None:
    """Room for packets, and for the event that a load makes."""
    for index, count in ((0, 3), (2, 1)):
        ring = driver.rings[index]
        for n in range(count):
            ring.add([(driver.end + 128 * n, 128, True)])
        ring.kick()


def _connect_three(vsock: Vsock) -> None:
    for port in range(3):
        vsock.request(port)


class Gated(Backend):
    """A network on which nothing goes either way before the gate is open; then frames come for
    ever."""

    def __init__(self) -> None:
        self.gate = trio.Event()

    async def receive(self) -> Frame:
        await self.gate.wait()
        await trio.lowlevel.checkpoint()
        return Frame(bytes(60))

    async def send(self, frame: Frame) -> None:
        await self.gate.wait()
        await trio.lowlevel.checkpoint()


def _submit_frames(driver: Driver) -> None:
    ring = driver.rings[1]
    for n in range(3):
        ring.add([(driver.end + 128 * n, 12, False), (driver.end + 128 * n + 12, 60, False)])
    ring.kick()


def _submit_buffers(driver: Driver) -> None:
    ring = driver.rings[0]
    for n in range(3):
        ring.add([(driver.end + 128 * n, 128, True)])
    ring.kick()


def _open_net(net: Net) -> None:
    net.backend.gate.set()  # type: ignore[attr-defined]


class HeldBalloon(Balloon):
    """Takes nothing before it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = trio.Event()

    async def _inflate(self, chain: Chain) -> None:
        await self.gate.wait()
        await super()._inflate(chain)


def _submit_pages(driver: Driver) -> None:
    ring = driver.rings[0]
    pages = struct.pack("<2I", driver.end // 4096 + 8, driver.end // 4096 + 9)
    driver.bench.memory.write(driver.end, pages)
    for _ in range(3):
        ring.add([(driver.end, 8, False)])
    ring.kick()


CASES = [
    Case("rng", _rng, _submit_rng, lambda rng: rng.gate.set(), 0, 192),
    Case("console", _console, _submit_console, _read_console, 1, 0),
    Case(
        "block",
        lambda: VirtioBlock(GatedDisk(), queue_size=16),
        _submit_block,
        lambda block: block.disk.gate.set(),
        0,
        2 * 0x401 + 1,
        _another_block,
    ),
    Case("vsock", Vsock, _submit_vsock, _connect_three, 0, 3 * 44, listened=1),
    Case("net out", lambda: Net(Gated()), _submit_frames, _open_net, 1, 0),
    Case("net in", lambda: Net(Gated()), _submit_buffers, _open_net, 0, 3 * 72, listened=1),
    Case("balloon", HeldBalloon, _submit_pages, lambda balloon: balloon.gate.set(), 0, 0),
]
