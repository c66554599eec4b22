"""The entropy device."""

from __future__ import annotations

import trio
from support.virtio_driver import Bench, settle

from avmm.devices.virtio.rng import Rng


async def test_the_kernels_random_bytes():
    bench = Bench(Rng())
    async with bench.running() as driver:
        (ring,) = (await driver.start()).values()
        ring.add([(0x8000, 64, True), (0x9000, 64, True)])
        assert ring.kick()
        await settle()
        assert ring.take() == [(0, 128)]
        assert bench.line.pulses == 1
        assert bench.read(0x60) == 1
        assert bench.memory.read(0x8000, 64) != bytes(64)
        assert bench.memory.read(0x9000, 64) != bytes(64)


async def test_a_source_of_ones_own_that_waits():
    given = trio.Event()

    async def source(count: int) -> bytes:
        await given.wait()
        return b"\x07" * min(count, 3)

    bench = Bench(Rng(source))
    async with bench.running() as driver:
        (ring,) = (await driver.start()).values()
        ring.add([(0x8000, 64, True)])
        ring.kick()
        await settle()
        assert ring.take() == []
        given.set()
        await settle()
        assert ring.take() == [(0, 3)]
        assert bench.memory.read(0x8000, 4) == b"\x07\x07\x07\0"
