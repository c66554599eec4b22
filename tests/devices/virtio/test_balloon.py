"""The memory balloon: pages given back, sizes, statistics, hostile page numbers."""

from __future__ import annotations

import os
import struct

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.virtio_driver import EVENT_IDX, VERSION_1, Bench, Driver, settle

from avmm.arch.x86_64.layout import HOLE_END, HOLE_START, RAM
from avmm.devices.virtio.balloon import Balloon
from avmm.errors import ConfigError, DeviceError, GuestMemoryError
from avmm.memory.pages import PAGE, Bitmap, own_pages
from avmm.memory.ram import GuestMemory

STATS, OOM, REPORTING = 2, 4, 32
FEATURES = VERSION_1 | EVENT_IDX | STATS | OOM


def resident(memory: GuestMemory) -> int:
    """Bytes of RAM that the host has pages for."""
    return os.fstat(memory.fd).st_blocks * 512


class Guest:
    def __init__(self, driver: Driver) -> None:
        self.driver, self.memory, self.rings = driver, driver.bench.memory, driver.rings
        self.at = driver.end

    def tell(self, queue: int, *pages: int) -> None:
        data = struct.pack(f"<{len(pages)}I", *pages)
        self.memory.write(self.at, data)
        self.rings[queue].add([(self.at, len(data), False)])
        self.rings[queue].kick()

    def give_stats(self, *stats: tuple[int, int]) -> None:
        data = b"".join(struct.pack("<HQ", *stat) for stat in stats)
        self.memory.write(self.at + PAGE, data)
        self.rings[2].add([(self.at + PAGE, len(data), False)])
        self.rings[2].kick()


async def test_pages_go_back_to_the_host() -> None:
    balloon = Balloon()
    bench = Bench(balloon)
    bench.memory.write(0, b"x" * bench.memory.size)
    async with bench.running() as driver:
        await driver.start(FEATURES)
        guest = Guest(driver)
        before = resident(bench.memory)
        guest.tell(0, *range(199, 99, -1), 210, 50, 50)
        await settle()
        assert len(driver.rings[0].take()) == 1
        assert before - resident(bench.memory) == 102 * PAGE
        assert bench.memory.read(100 * PAGE, 100 * PAGE) == bytes(100 * PAGE)
        for page in (49, 51, 99, 200, 209, 211):
            assert bench.memory.read(page * PAGE, PAGE) == b"x" * PAGE
        guest.tell(1, *range(100, 200))
        await settle()
        assert len(driver.rings[1].take()) == 1
        bench.memory.write(150 * PAGE, b"again")
        assert bench.memory.read(150 * PAGE, 6) == b"again\0"
        assert balloon.refused == 0


@pytest.mark.parametrize(("features", "queue"), [(FEATURES, 3), (FEATURES & ~STATS, 2)])
async def test_free_pages_go_back_to_the_host(features: int, queue: int) -> None:
    bench = Bench(Balloon())
    bench.memory.write(0, b"x" * bench.memory.size)
    async with bench.running() as driver:
        await driver.start(features | REPORTING)
        before = resident(bench.memory)
        ring = driver.rings[queue]
        bench.memory.log()
        head = ring.add(
            [
                (100 * PAGE, 10 * PAGE, True),
                (120 * PAGE + 1, 3 * PAGE, True),  # two of them whole
                (130 * PAGE + 5, PAGE, True),
            ]
        )
        ring.kick()
        await settle()
        assert ring.take() == [(head, 0)]
        assert before - resident(bench.memory) == 12 * PAGE
        logged = Bitmap(bench.memory.size // PAGE)
        bench.memory.take_dirty(logged)
        assert {*range(100, 110), 121, 122} <= {p for run in logged.runs() for p in range(*run)}
        for first, count in ((100, 10), (121, 2)):
            assert bench.memory.read(first * PAGE, count * PAGE) == bytes(count * PAGE)
        for page in (99, 110, 120, 123, 130, 131):
            assert bench.memory.read(page * PAGE, PAGE) == b"x" * PAGE


async def test_free_pages_of_a_fork_go_back_to_the_host() -> None:
    bench = Bench(Balloon())
    bench.memory.fork().close()
    bench.memory.write(50 * PAGE, b"x" * PAGE)
    async with bench.running() as driver:
        await driver.start(FEATURES | REPORTING)
        driver.rings[3].add([(50 * PAGE, PAGE, True)])
        driver.rings[3].kick()
        await settle()
        own = Bitmap(bench.memory.size // PAGE)
        own_pages(bench.memory.whole, own)
        assert all(not start <= 50 < end for start, end in own.runs())


async def test_a_state_from_before_there_were_reports() -> None:
    bench, other = Bench(Balloon()), Bench(Balloon())
    async with bench.running() as driver:
        await driver.start(FEATURES)
        await bench.device.quiesce()
        state = dict(bench.device.save())
    state["queues"] = state["queues"][:3]
    other.device.load(state)
    assert len(other.device.save()["queues"]) == 4
    for queues in ([], [*state["queues"], *state["queues"]]):
        with pytest.raises(DeviceError, match="queues"):
            other.device.load({**state, "queues": queues})


async def test_a_balloon_that_wants_no_reports() -> None:
    balloon = Balloon(page_reporting=False)
    assert not balloon.features & REPORTING
    bench = Bench(balloon)
    async with bench.running() as driver:
        await driver.start(FEATURES)
        assert len(driver.rings) == 3
        Guest(driver).tell(0, 5)
        await settle()
        assert len(driver.rings[0].take()) == 1


async def test_the_target_is_awaited() -> None:
    balloon = Balloon()
    bench = Bench(balloon)
    async with bench.running() as driver, trio.open_nursery() as nursery:
        await driver.start(FEATURES)
        nursery.start_soon(balloon.set_target, 8 * PAGE)
        await settle()
        assert (bench.read(0x100), bench.read(0x60) & 2) == (8, 2)
        bench.write(0x104, 3)
        await settle()
        assert (balloon.actual, len(nursery.child_tasks)) == (3 * PAGE, 1)
        bench.write(0x100, 99)  # the target is not the guest's to set
        bench.write(0x104, 8)
        await settle()
        assert (balloon.target, balloon.actual) == (8 * PAGE, 8 * PAGE)
        assert not nursery.child_tasks
        with trio.move_on_after(0.01):
            await balloon.set_target(9 * PAGE)
        assert balloon.target == 9 * PAGE
        nursery.start_soon(balloon.set_target, 10 * PAGE)
        await settle()
        with trio.fail_after(20):
            await balloon.set_target(8 * PAGE)  # the other is told that this came instead
        await bench.device.quiesce()
        state = bench.device.save()
    other = Balloon()
    Bench(other).device.load(state)
    assert (other.target, other.actual) == (8 * PAGE, 8 * PAGE)
    for size in (-PAGE, 1, 2 << 20, "1M", None):
        with pytest.raises(ConfigError, match="balloon"):
            await balloon.set_target(size)


async def test_statistics() -> None:
    balloon = Balloon()
    bench = Bench(balloon)
    found: list[dict[str, int]] = []

    async def ask() -> None:
        found.append(await balloon.stats())

    async with bench.running() as driver, trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await driver.start(FEATURES)
        guest = Guest(driver)
        guest.give_stats((4, 1))
        await settle()
        assert len(driver.rings[2].take()) == 1  # what it told at first is old
        assert found == []
        guest.give_stats((4, 12345), (5, 1 << 40), (999, 1))
        await settle()
        assert found == [{"free_memory": 12345, "total_memory": 1 << 40}]
        assert driver.rings[2].take() == []
        await bench.device.quiesce()
        await bench.device.resume()
        await settle()
        nursery.start_soon(ask)
        nursery.start_soon(ask)
        await settle()
        assert len(driver.rings[2].take()) == 1
        guest.give_stats((0, 7))
        await settle()
        assert found[1:] == [{"swap_in": 7}] * 2


async def test_pages_that_are_none() -> None:
    balloon = Balloon()
    bench = Bench(balloon)
    async with bench.running() as driver:
        await driver.start(FEATURES)
        guest = Guest(driver)
        bench.memory.write(255 * PAGE, b"x" * PAGE)
        guest.tell(0, 255, 256, 257, 0xFFFF_FFFF, 1 << 20)
        await settle()
        assert balloon.refused == 4
        assert bench.memory.read(255 * PAGE, PAGE) == bytes(PAGE)
        assert not driver.needs_reset
        assert len(driver.rings[0].take()) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.lists(st.binary(max_size=100), min_size=1, max_size=10),
    st.booleans(),
)
async def test_whatever_the_guest_tells(queue: int, messages: list[bytes], asked: bool) -> None:
    balloon = Balloon()
    bench = Bench(balloon)
    async with bench.running() as driver, trio.open_nursery() as nursery:
        await driver.start(FEATURES | REPORTING)
        if asked:
            nursery.start_soon(balloon.stats)
        for data in messages:
            bench.memory.write(driver.end, data)
            driver.rings[queue].add([(driver.end, len(data), False)])
            driver.rings[queue].kick()
            await settle()
            driver.rings[queue].take()
        nursery.cancel_scope.cancel()


def test_what_memory_gives_back() -> None:
    memory = GuestMemory(HOLE_START + 64 * PAGE, layout=RAM)
    memory.add_readonly(0xFFFF_0000, b"rom")
    memory.write(HOLE_END + PAGE, b"x" * PAGE)
    memory.discard(HOLE_END + PAGE, PAGE)
    assert memory.read(HOLE_END + PAGE, PAGE) == bytes(PAGE)
    for gpa, length in (
        (1, PAGE),
        (0, 1),
        (0, 0),
        (-PAGE, PAGE),
        (HOLE_START - PAGE, 2 * PAGE),
        (HOLE_START, PAGE),
        (HOLE_END + 63 * PAGE, 2 * PAGE),
        (0xFFFF_0000, PAGE),
    ):
        with pytest.raises(GuestMemoryError):
            memory.discard(gpa, length)
    memory.close()


@pytest.mark.parametrize(
    "change", [{"target": -1}, {"actual": 1 << 32}, {"target": "1"}, {"x": 1}]
)
def test_states_that_are_none(change: dict[str, object]) -> None:
    balloon = Balloon()
    with pytest.raises(DeviceError):
        balloon.load({**balloon.save(), **change})
