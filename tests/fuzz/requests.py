"""Well-formed chains with requests that may be anything: what each kind of device is asked for."""

from __future__ import annotations

import errno
import itertools
import os
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import atheris
import trio
from support.hostile import HALF, a_while
from support.virtio_driver import EVENT_IDX, VERSION_1, Driver

from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.frame import Backend, Frame
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.port import Port
from avmm.devices.virtio.vsock import Vsock
from avmm.disks.base import Disk
from fuzz.harness import fuzz, hostile_guest

Data = atheris.FuzzedDataProvider
_REQUESTS: Final = 12


class Request:
    """What a chain says, and how it is cut: header and rest readable, then what is writable."""

    def __init__(self, queue: int, data: bytes, writable: int = 0) -> None:
        self.queue, self.data, self.writable = queue, data, writable


class MemoryDisk(Disk):
    """64 KiB, some of it broken."""

    name, size, can_discard, contents_stay = "memory", 1 << 16, True, True

    def __init__(self) -> None:
        self.data = bytearray(self.size)

    def _check(self, offset: int, length: int) -> None:
        assert 0 <= offset <= offset + length <= self.size
        assert not offset % 512 and not length % 512
        if offset <= 0x8000 < offset + length:
            raise OSError(errno.EIO, "broken")

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._check(offset, sum(map(len, buffers)))
        await trio.lowlevel.checkpoint()
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        data = b"".join(buffers)
        self._check(offset, len(data))
        await trio.lowlevel.checkpoint()
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def discard(self, offset: int, length: int) -> None:
        self._check(offset, length)


class Echo(Backend):
    """Sends back what it gets, at most 4 frames of it."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[Frame](4)

    async def send(self, frame: Frame) -> None:
        assert frame.is_sound
        frame.complete()
        try:
            self._send.send_nowait(frame)
        except trio.WouldBlock:
            await trio.lowlevel.checkpoint()

    async def receive(self) -> Frame:
        return await self._receive.receive()


def block(data: Data) -> Request:
    kind = data.PickValueInList([0, 1, 4, 8, 11, 13, data.ConsumeIntInRange(0, (1 << 32) - 1)])
    most = data.PickValueInList([140, 1 << 64])
    sector = data.ConsumeIntInRange(0, most - 1)
    if kind in (11, 13):
        rest = b"".join(
            struct.pack(
                "<QII", data.ConsumeIntInRange(0, 140), data.ConsumeIntInRange(0, 70), flag
            )
            for flag in data.ConsumeIntListInRange(data.ConsumeIntInRange(0, 18), 0, 2)
        )
    else:
        rest = bytes(data.PickValueInList([0, 512, 1024, 4096, data.ConsumeIntInRange(0, 4096)]))
    header = struct.pack("<IIQ", kind, 0, sector) + rest
    return Request(
        0, header, data.PickValueInList([1, 513, 1025, data.ConsumeIntInRange(0, 4097)])
    )


def console(data: Data) -> Request:
    queue = data.PickValueInList([0, 1, 2, 3, 3, 3, 4, 5])
    if queue == 3:
        fields = [data.ConsumeIntInRange(0, 3), data.ConsumeIntInRange(0, 8)]
        message = struct.pack("<IHH", *fields, data.ConsumeIntInRange(0, 2))
        return Request(3, message[: data.PickValueInList([8, 8, 8, 3])])
    if queue in (1, 5):
        return Request(queue, data.ConsumeBytes(200))
    return Request(queue, b"", data.ConsumeIntInRange(1, 300))


def net(data: Data) -> Request:
    if data.ConsumeBool():
        return Request(0, b"", data.ConsumeIntInRange(1, 2000))
    header = struct.pack(
        "<BBHHHHH",
        data.PickValueInList([0, 1, 2, 255]),
        data.PickValueInList([0, 0, 0, 1, 255]),
        *data.ConsumeIntListInRange(2, 0, 0xFFFF),
        *(data.PickValueInList([0, 14, 34, 0xFFFF, data.ConsumeIntInRange(0, 99)]),) * 2,
        data.ConsumeIntInRange(0, 2),
    )
    return Request(1, header + data.ConsumeBytes(100))


def vsock(data: Data) -> Request:
    if data.ConsumeIntInRange(0, 3) == 0:
        return Request(data.PickValueInList([0, 2]), b"", data.ConsumeIntInRange(1, 200))
    rest = data.ConsumeBytes(60)
    packet = struct.pack(
        "<QQIIIHHIII",
        data.PickValueInList([3, 3, 3, 4]),
        data.PickValueInList([2, 2, 2, 1]),
        data.PickValueInList([1000, 1001, 5]),
        data.PickValueInList([5, 6, 1 << 30]),
        data.PickValueInList([len(rest), len(rest), 0, (1 << 32) - 1]),
        data.PickValueInList([1, 1, 1, 2]),
        data.PickValueInList([1, 2, 3, 4, 5, 5, 6, 7, 0, 99]),
        data.ConsumeIntInRange(0, 3),
        data.PickValueInList([0, 1000, (1 << 32) - 1]),
        data.PickValueInList([0, 60, (1 << 32) - 1]),
    )
    return Request(1, packet + rest)


def balloon(data: Data) -> Request:
    queue = data.PickValueInList([0, 1, 2, 3])
    if queue >= 2:
        return Request(queue, data.ConsumeBytes(100))
    most = data.PickValueInList([HALF // 4096 + 4, (1 << 32) - 1])
    pages = data.ConsumeIntListInRange(data.ConsumeIntInRange(0, 30), 32, most)
    return Request(queue, struct.pack(f"<{len(pages)}I", *pages) + data.ConsumeBytes(3))


async def _talk(vsock: Vsock) -> None:
    """The host's end: echo to who connects, connect to the guest."""
    vsock.request(1000)

    async def echo(stream: trio.abc.Stream) -> None:
        try:
            async for received in stream:
                await stream.send_all(received)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await stream.aclose()

    async with vsock.listen(5) as listener:
        await trio.serve_listeners(echo, [listener])


async def _ask(balloon: Balloon) -> None:
    while True:
        await balloon.stats()


async def _read(console: Console) -> None:
    """One port goes to a pipe that nobody reads, the other to somebody who answers."""
    first, second = console.ports.values()
    near, far = os.pipe()

    async def answer() -> None:
        async for received in second:
            await second.send_all(received)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first.write_to, far)
            await answer()
    finally:
        os.close(near)
        os.close(far)


async def _nothing(model: VirtioDevice) -> None:
    """Nobody is there."""


Kind = tuple[
    Callable[[], VirtioDevice], Callable[[Data], Request], Callable[[Any], Awaitable[None]]
]
KINDS: Final[list[Kind]] = [
    (lambda: VirtioBlock(MemoryDisk(), queue_size=16), block, _nothing),
    (lambda: Console(Port("a", output_size=300), Port("b", output_size=99)), console, _read),
    (lambda: Net(Echo()), net, _nothing),
    (Vsock, vsock, _talk),
    (Balloon, balloon, _ask),
]


def submit(driver: Driver, request: Request, cuts: Sequence[int], at: int) -> None:
    """Cut it up into parts, of which each is a descriptor."""
    ring = driver.rings[request.queue]
    ends = sorted({min(cut, len(request.data)) for cut in cuts} | {0, len(request.data)})
    parts = [(at + a, b - a, False) for a, b in itertools.pairwise(ends)]
    if request.writable:
        parts.append((at + 0x4000, request.writable, True))
    if parts and len(ring.free) >= len(parts):
        driver.bench.memory.write(at, request.data)
        ring.add(parts)
        ring.kick()


async def one(data: Data) -> None:
    make, request, host = data.PickValueInList(KINDS)
    model = make()
    features = VERSION_1 | EVENT_IDX * data.ConsumeBool() | model.features * data.ConsumeBool()
    async with trio.open_nursery() as nursery:
        async with hostile_guest(model) as driver:
            await driver.start(features)
            nursery.start_soon(host, model)
            for number in range(_REQUESTS):
                if not data.remaining_bytes():
                    break
                action = data.ConsumeIntInRange(0, 15)
                if action == 0:
                    await driver.bench.device.quiesce()
                    await driver.bench.device.resume()
                elif action == 1:
                    await driver.start(features)
                asked = request(data)
                cuts = data.ConsumeIntListInRange(data.ConsumeIntInRange(0, 3), 0, 600)
                at = HALF // 2 + 0x8000 * (number % 3)
                if asked.queue in driver.rings:
                    submit(driver, asked, cuts, at)
                if action & 1:
                    await a_while()
                for ring in driver.rings.values():
                    assert all(head < ring.size for head, _ in ring.take())
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    fuzz(one)
