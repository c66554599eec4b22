"""Rings that may hold anything: what comes out of them is what a model of 2.7 gets out of them.

The model is Python, written from VIRTIO 1.2 and from what avmm.native.vring says that it refuses.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Final

import atheris
from support.hostile import HALF, Island

from avmm.devices.virtio.queue import Chain, QueueError, Virtqueue
from fuzz.harness import fuzz

NEXT, WRITE, INDIRECT = 1, 2, 4
DESC, AVAIL, USED, TABLE = 0x1000, 0x2000, 0x3000, 0x4000
MOST_PARTS: Final = 1024


class Broken(Exception):
    """The guest broke a rule."""


@atheris.instrument_func
def walk(memory: Island, size: int, head: int, indirect: bool) -> tuple[list, list]:
    """The (address, length) of what is readable and writable of a chain."""
    table, entries, index, seen, within = DESC, size, head, 0, False
    readable: list[tuple[int, int]] = []
    writable: list[tuple[int, int]] = []
    writing = False
    while True:
        if index >= entries:
            raise Broken("beyond its table")
        seen += 1
        if seen > entries:
            raise Broken("circle")
        address, length, flags, following = struct.unpack(
            "<QIHH", memory.read(table + 16 * index, 16)
        )
        if flags & INDIRECT:
            if not indirect or within or flags & NEXT:
                raise Broken("nested, chained or was not negotiated")
            if not length or length % 16 or length // 16 > MOST_PARTS:
                raise Broken("invalid length")
            if address + length > HALF:
                raise Broken("outside of RAM")
            table, entries, index, seen, within = address, length // 16, 0, 0, True
            continue
        if flags & WRITE:
            writing = True
        elif writing:
            raise Broken("after a writable one")
        if sum(n for _, n in readable + writable) + length > 0xFFFF_FFFF:
            raise Broken("4 GiB")
        if length:
            if address + length > HALF:
                raise Broken("outside of RAM")
            (writable if writing else readable).append((address, length))
        if not flags & NEXT:
            return readable, writable
        index = following


@atheris.instrument_func
def expected(memory: Island, size: int, at: int, indirect: bool) -> tuple[int, list, list] | None:
    """The chain that is the next one when `at` were taken; None: there is none."""
    available = struct.unpack("<H", memory.read(AVAIL + 2, 2))[0]
    waiting = available - at & 0xFFFF
    if not waiting:
        return None
    if waiting > size:
        raise Broken("ahead")
    head = struct.unpack("<H", memory.read(AVAIL + 4 + 2 * (at % size), 2))[0]
    return head, *walk(memory, size, head, indirect)


@atheris.instrument_func
def fill(data: atheris.FuzzedDataProvider, memory: Island, size: int) -> None:
    """Tables and rings, in most of which something is right."""
    for table in (DESC, TABLE):
        for index in range(data.ConsumeIntInRange(0, size)):
            address = data.PickValueInList([0x8000, 0x9000, TABLE, DESC, HALF - 16])
            length = data.PickValueInList([0, 8, 16, 32, 64, 100, 4096, data.ConsumeInt(4)])
            row = (
                address if data.ConsumeIntInRange(0, 15) else data.ConsumeIntInRange(0, 2 * HALF),
                length & 0xFFFF_FFFF,
                data.ConsumeIntInRange(0, 7),
                data.ConsumeIntInRange(0, size),
            )
            memory.write(table + 16 * index, struct.pack("<QIHH", *row))
    for index in range(size):
        head = data.ConsumeIntInRange(0, size)
        memory.write(AVAIL + 4 + 2 * index, struct.pack("<H", head))


class Comparison:
    """A queue and its model, side by side. Methods raise `Broken` where both agree on that."""

    def __init__(self, data: atheris.FuzzedDataProvider, memory: Island) -> None:
        self.memory = memory
        self.queue = Virtqueue(memory, 16)
        self.size = self.queue.size = data.PickValueInList([1, 4, 16])
        self.queue.desc, self.queue.driver, self.queue.device = DESC, AVAIL, USED
        self.indirect = data.ConsumeBool()
        self.queue.start(event_idx=data.ConsumeBool(), indirect=self.indirect)
        self.taken = self.given = 0
        self.flying: dict[int, Chain] = {}

    def next(self) -> tuple[int, list, list] | None:
        return expected(self.memory, self.size, self.taken, self.indirect)

    def send(self, sink: int) -> None:
        before = self.taken
        try:
            while self.next() is not None:
                self.taken += 1
        except Broken as rule:
            refused(lambda: self.queue.send(sink, False, 1 << 31), rule)
            raise
        assert self.queue.send(sink, False, 1 << 31) == (self.taken - before, None)
        self.given += self.taken - before

    def pop(self) -> None:
        try:
            found = self.next()
            if found is not None and found[0] in self.flying:
                raise Broken("in use")
        except Broken as rule:
            refused(self.queue.pop, rule)
            raise
        chain = self.queue.pop()
        assert (chain is None) is (found is None)
        if chain is not None and found is not None:
            self.taken += 1
            parts = [list(map(len, side)) for side in (chain.readable, chain.writable)]
            assert (chain.head, parts) == (found[0], [[n for _, n in side] for side in found[1:]])
            for part in chain.writable:
                part[:] = bytes(len(part))
            self.flying[chain.head] = chain

    def push(self) -> None:
        _, chain = self.flying.popitem()
        self.queue.push(chain, 1)
        self.given += 1
        self.queue.wants_interrupt()

    def check(self) -> None:
        assert struct.unpack("<H", self.memory.read(USED + 2, 2))[0] == self.given & 0xFFFF
        assert self.queue.in_flight == len(self.flying)


def refused(call: Callable[[], object], rule: Broken) -> None:
    try:
        call()
    except QueueError as error:
        assert str(rule) in str(error), (rule, error)
    else:
        raise AssertionError(f"not refused: {rule}")


async def one(data: atheris.FuzzedDataProvider) -> None:
    memory = Island()
    both = Comparison(data, memory)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        while data.remaining_bytes():
            fill(data, memory, both.size)
            ahead = both.taken + data.ConsumeIntInRange(0, both.size + 1)
            memory.write(AVAIL + 2, struct.pack("<H", ahead & 0xFFFF))
            action = data.ConsumeIntInRange(0, 7)
            if action == 0 and not both.flying:
                both.send(null)
            elif action < 5:
                both.pop()
            elif action == 5 and both.flying:
                both.push()
            elif action == 6:
                assert both.queue.listen() is (ahead != both.taken)
            both.check()
    except Broken:
        pass
    finally:
        os.close(null)
    both.queue.reset()
    assert memory.canaries_live()
    memory.close()


if __name__ == "__main__":
    fuzz(one)
