"""The guest's side of a socket device, as its driver would be, without a guest."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from avmm.devices.virtio.vsock import Vsock
from support.virtio_driver import EVENT_IDX, VERSION_1, Bench, Driver, settle

HEADER = struct.Struct("<QQIIIHHIII")
REQUEST, RESPONSE, RST, SHUTDOWN, RW, UPDATE, ASK = range(1, 8)
FEATURES = VERSION_1 | EVENT_IDX | 1
SLOT = 4096 + HEADER.size
Packet = tuple[int, int, int, int, bytes]


class Guest:
    """The guest's end of the transport; `room` and `taken` are the credit that it tells."""

    def __init__(self, driver: Driver, *, buffers: int = 16) -> None:
        self.driver, self.memory, self.rings = driver, driver.bench.memory, driver.rings
        self.slots: dict[int, int] = {}
        self.room, self.taken = 65536, 0
        self.credit: tuple[int, int] = (0, 0)
        self.flags = 0
        for n in range(buffers):
            self.give(driver.end + n * 8192)
        self.out = driver.end + 16 * 8192

    def give(self, at: int, size: int = SLOT) -> None:
        self.slots[self.rings[0].add([(at, size, True)])] = at
        self.rings[0].kick()

    def raw(self, data: bytes) -> None:
        self.memory.write(self.out, data)
        self.rings[1].take()
        self.rings[1].add([(self.out, len(data), False)])
        self.rings[1].kick()

    def pack(self, op: int, ours: int, theirs: int, data: bytes = b"", **other: int) -> bytes:
        fields = {"cid": 3, "to": 2, "length": len(data), "kind": 1, "flags": 0} | other
        fields = {"room": self.room, "taken": self.taken} | fields
        ports = (fields["cid"], fields["to"], ours, theirs, fields["length"], fields["kind"])
        return HEADER.pack(*ports, op, fields["flags"], fields["room"], fields["taken"]) + data

    async def send(self, op: int, ours: int, theirs: int, data: bytes = b"", **other: int) -> None:
        self.raw(self.pack(op, ours, theirs, data, **other))
        await settle()

    def got(self) -> list[Packet]:
        """(op, our port, the host's port, flags, data) of what came."""
        found = []
        for head, written in self.rings[0].take():
            at = self.slots.pop(head)
            data = self.memory.read(at, written)
            cid, to, theirs, ours, length, kind, op, flags, *credit = HEADER.unpack(data[:44])
            assert (cid, to, kind, length) == (2, 3, 1, written - 44)
            self.credit = (credit[0], credit[1])
            found.append((op, ours, theirs, flags, data[44:]))
            self.give(at)
        return found

    async def stream(self, vsock: Vsock, port: int = 1024):
        """A connection that the host has asked for."""
        stream = vsock.request(port)
        await settle()
        assert self.got() == [(REQUEST, port, stream.host_port, 0, b"")]
        await self.send(RESPONSE, port, stream.host_port)
        with trio.fail_after(20):
            await stream.connected()
        return stream


@asynccontextmanager
async def guest_of(vsock: Vsock, **kwargs: int) -> AsyncIterator[Guest]:
    bench = Bench(vsock)
    async with bench.running() as driver:
        await driver.start(FEATURES)
        assert bench.read(0x100) | bench.read(0x104) << 32 == vsock.cid
        yield Guest(driver, **kwargs)


async def packets(guest: Guest, count: int) -> list[Packet]:
    """The next packets for the guest."""
    found: list[Packet] = []
    with trio.fail_after(20):
        while len(found) < count:
            await trio.sleep(0.001)
            found += guest.got()
    return found
