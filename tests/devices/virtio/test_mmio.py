"""The registers of virtio-mmio, one by one (VIRTIO 1.2, 4.2), and the device's status (2.1)."""

from __future__ import annotations

import logging

import pytest
import trio
from support.virtio_driver import EVENT_IDX, INDIRECT_DESC, VERSION_1, Bench, settle

import avmm
from avmm.arch.x86_64 import acpi
from avmm.arch.x86_64.board import VIRTIO
from avmm.arch.x86_64.boot.load import named
from avmm.devices.virtio.device import GuestQueue, VirtioDevice
from avmm.devices.virtio.mmio import SIZE, VirtioMmio
from avmm.devices.virtio.rng import Rng
from avmm.errors import ConfigError, DeviceError
from avmm.machine import Machine
from avmm.parts.placing import allocate

MAGIC, VERSION, ID, VENDOR = 0x0, 0x4, 0x8, 0xC
QUEUE_READY = 0x44
STATUS = 0x70


class Echo(VirtioDevice):
    """Answers what it reads; counts what happens to it."""

    device_id = 42
    queue_sizes = (16, 4)
    features = 1 << 5 | 1 << 50

    def __init__(self) -> None:
        self.sessions: list[int] = []
        self.resets = 0
        self.space = bytearray(b"\x01\x02\x03\x04\x05\x06")

    @property
    def config(self) -> bytes:
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        self.space[offset : offset + len(data)] = data

    async def serve(self, queues, features) -> None:
        self.sessions.append(features)
        self.queues = set(queues)
        await super().serve(queues, features)

    async def serve_queue(self, queue: GuestQueue) -> None:
        while True:
            chain = await queue.next()
            queue.push(chain, chain.put(chain.take(4096)))

    def reset(self) -> None:
        self.resets += 1

    def save(self):
        return {}

    def load(self, state) -> None:
        pass


@pytest.fixture
def bench() -> Bench:
    return Bench(Echo())


def test_what_it_is(bench: Bench) -> None:
    assert [bench.read(at) for at in (MAGIC, VERSION, ID)] == [0x74726976, 2, 42]
    assert bench.read(VENDOR).to_bytes(4, "little") == b"AVMM"
    assert bench.read(STATUS) == 0


def test_features_offered_in_two_halves(bench: Bench) -> None:
    halves = []
    for select in (0, 1, 2, 0xFFFF_FFFF):
        bench.write(0x14, select)
        halves.append(bench.read(0x10))
    assert halves == [1 << 5 | 3 << 28, 1 | 1 << 18, 0, 0]


def test_features_that_are_not_offered() -> None:
    bench = Bench(Echo(), event_idx=False, indirect=False)
    bench.write(0x14, 0)
    assert bench.read(0x10) == 1 << 5


def test_queue_registers_go_by_the_selected_queue(bench: Bench) -> None:
    sizes = []
    for index in range(4):
        bench.write(0x30, index)
        sizes.append((bench.read(0x34), bench.read(QUEUE_READY)))
        bench.write(QUEUE_READY, 1)
    assert sizes == [(16, 0), (4, 0), (0, 0), (0, 0)]
    bench.write(0x30, 1)
    assert bench.read(QUEUE_READY) == 1
    bench.write(QUEUE_READY, 0)
    assert bench.read(QUEUE_READY) == 0


def test_settings_of_a_ready_queue_stay(bench: Bench) -> None:
    bench.write(0x80, 0x1000)
    bench.write(0x84, 0x2)
    bench.write(QUEUE_READY, 1)
    bench.write(0x80, 0x3000)
    bench.write(0x38, 2)
    queue = bench.device.save()["queues"][0]
    assert (queue["desc"], queue["size"]) == (0x2_0000_1000, 16)


def test_there_is_no_shared_memory(bench: Bench) -> None:
    bench.write(0xAC, 1)
    assert [bench.read(at) for at in (0xB0, 0xB4, 0xB8, 0xBC)] == [0xFFFF_FFFF] * 4


@pytest.mark.parametrize("size", [1, 2])
def test_odd_sizes_are_ignored_and_reported_once(
    bench: Bench, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert bench.read(MAGIC, size) == 0
        bench.write(STATUS, 1, size)
    assert bench.read(STATUS) == 0
    assert len(caplog.records) == 2


def test_reports_are_bounded(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for at in range(0, 0x100, 2):
        bench.read(at, 2)
        bench.write(at, 0, 2)
    assert len(caplog.records) == 16


def test_config_space_in_any_size(bench: Bench) -> None:
    assert bench.read(0x100, 1) == 1
    assert bench.read(0x102, 2) == 0x0403
    assert bench.read(0x104) == 0x0605  # zeros behind its end
    assert bench.read(0x1FC) == 0
    bench.write(0x101, 0xAABB, 2)
    assert bench.read(0x100) == 0x04AABB01


def features_ok(bench: Bench, features: int) -> bool:
    bench.write(STATUS, 1)
    bench.write(STATUS, 3)
    for half in (0, 1):
        bench.write(0x24, half)
        bench.write(0x20, features >> 32 * half & 0xFFFF_FFFF)
    bench.write(STATUS, 11)
    return bool(bench.read(STATUS) & 8)


@pytest.mark.parametrize(
    ("features", "right"),
    [
        (VERSION_1, True),
        (VERSION_1 | EVENT_IDX | INDIRECT_DESC | 1 << 5 | 1 << 50, True),
        (0, False),
        (EVENT_IDX, False),
        (VERSION_1 | 1, False),
        (VERSION_1 | 1 << 63, False),
    ],
)
def test_features_ok(bench: Bench, features: int, right: bool) -> None:
    assert features_ok(bench, features) is right
    if right:
        bench.write(0x20, 0)  # too late
        assert bench.device.save()["driver_features"] == features


async def test_driver_ok_needs_features_ok(bench: Bench) -> None:
    async with bench.running():
        bench.write(STATUS, 7)
        assert bench.read(STATUS) == 3
        await settle()
        assert bench.model.sessions == []


async def test_status_bits_are_never_cleared_but_by_a_reset(bench: Bench) -> None:
    async with bench.running() as driver:
        await driver.start()
        bench.write(STATUS, 1)
        assert bench.read(STATUS) == 15
        bench.write(STATUS, 0x80 | 0x40)  # NEEDS_RESET is not the driver's to set
        assert bench.read(STATUS) == 0x8F
        await bench.write_and_wait(STATUS, 0)
        assert bench.read(STATUS) == 0
        assert bench.model.sessions == [VERSION_1 | EVENT_IDX | INDIRECT_DESC]


async def test_a_reset_waits_for_what_cannot_be_cancelled() -> None:
    gate = trio.Event()

    class Slow(Echo):
        async def serve_queue(self, queue: GuestQueue) -> None:
            with trio.CancelScope(shield=True):
                await gate.wait()

    bench = Bench(Slow())
    async with bench.running() as driver:
        await driver.start()
        answer = bench.write(STATUS, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_await, answer)
            await settle()
            bench.write(0x30, 1)  # another vCPU's, meanwhile: ignored
            assert bench.read(STATUS) == 15
            gate.set()
        assert bench.read(STATUS) == 0
        assert bench.model.resets == 1
        assert bench.device.save()["queue_sel"] == 0


async def _await(answer) -> None:
    await answer


async def test_a_queue_can_be_taken_back_and_given_again(bench: Bench) -> None:
    async with bench.running() as driver:
        rings = await driver.start()
        assert bench.model.queues == {0, 1}
        bench.write(0x30, 1)
        await bench.write_and_wait(QUEUE_READY, 0)
        await settle()
        assert bench.model.queues == {0}
        rings[1].add([(0x8000, 4, True)])
        rings[1].kick(always=True)
        rings[0].add([(0x8000, 4, True)])
        rings[0].kick()
        await settle()
        assert (rings[0].take(), rings[1].take()) == ([(0, 0)], [])
        bench.memory.write(rings[1].desc, bytes(rings[1].end - rings[1].desc))
        await bench.write_and_wait(QUEUE_READY, 1)
        bench.memory.write(0x8000, b"echo")
        rings[1].added = 0
        rings[1].add([(0x8000, 4, False), (0x9000, 9, True)])
        rings[1].kick(always=True)
        await settle()
        assert rings[1].take() == [(1, 4)]
        assert bench.memory.read(0x9000, 5) == b"echo\0"


async def test_a_change_of_config_space(bench: Bench) -> None:
    bench.device.config_changed()
    assert (bench.read(0xFC), bench.line.pulses) == (1, 0)  # 2.3: no driver yet
    async with bench.running() as driver:
        await driver.start()
        bench.device.config_changed()
        assert (bench.read(0xFC), bench.read(0x60), bench.line.pulses) == (1, 2, 1)
        bench.write(0x64, 2)
        assert bench.read(0x60) == 0
        await bench.device.quiesce()
        bench.device.config_changed()
        assert bench.line.pulses == 1
        await bench.device.resume()
        assert (bench.read(0x60), bench.line.pulses) == (2, 2)


async def test_notifications_of_no_queue(bench: Bench) -> None:
    async with bench.running() as driver:
        await driver.start()
        for value in (2, 0xFFFF, 0xFFFF_FFFF):
            bench.write(0x50, value)
        await settle()


async def test_a_device_that_fails_ends_the_machine() -> None:
    class Broken(Echo):
        async def serve_queue(self, queue: GuestQueue) -> None:
            raise OSError("no backend")

    bench = Bench(Broken())
    with pytest.RaisesGroup(OSError, OSError, flatten_subgroups=True):
        async with bench.running() as driver:
            await driver.start()


async def test_a_queue_is_of_no_use_after_its_session(bench: Bench) -> None:
    class Keeps(Echo):
        async def serve_queue(self, queue: GuestQueue) -> None:
            self.kept = queue
            self.chain = await queue.next()
            await trio.sleep_forever()

    bench = Bench(Keeps())
    async with bench.running() as driver:
        rings = await driver.start()
        for ring in rings.values():
            ring.add([(0x8000, 4, True)])
            ring.kick()
        await settle()
        await bench.device.quiesce()
        kept, pulses = bench.model.kept, bench.line.pulses
        kept.push(bench.model.chain, 4)
        kept.signal()
        assert (rings[0].take(), rings[1].take(), bench.line.pulses) == ([], [], pulses)
        for use in (kept.next, kept.wait):
            with pytest.raises(DeviceError, match="outside of serve"):
                await use()
        with pytest.raises(DeviceError, match="outside of serve"):
            kept.pop()


async def test_a_busy_queue_lets_other_tasks_run() -> None:
    """A guest that refills its queue for ever."""
    bench = Bench(Echo())
    rounds = 0
    async with bench.running() as driver:
        (ring, _) = (await driver.start()).values()
        ring.add([(0x8000, 1, True)])
        push = bench.device._queues[0].push

        def again(chain, written) -> None:
            nonlocal rounds
            rounds += 1
            push(chain, written)
            ring.take()
            ring.add([(0x8000, 1, True)])

        bench.device._queues[0].push = again
        ring.kick()
        with trio.fail_after(5):
            while rounds < 100:
                await trio.lowlevel.checkpoint()


def test_what_cannot_be() -> None:
    class Greedy(Echo):
        features = 1 << 32

    class Odd(Echo):
        queue_sizes = (3,)

    with pytest.raises(DeviceError, match="transport's"):
        VirtioMmio(Greedy())
    with pytest.raises(DeviceError, match="power of 2"):
        Bench(Odd())


def test_devices_without_more_refuse_by_name() -> None:
    class Bare(VirtioDevice):
        pass

    with pytest.raises(DeviceError, match="Bare cannot be saved"):
        Bare().save()
    with pytest.raises(DeviceError, match="Bare cannot be loaded"):
        Bare().load({})


def test_places_are_given_in_order_around_what_is_taken() -> None:
    mine = avmm.mmio(VirtioMmio(Rng()), 0xC000_1000, SIZE, irq=6)
    places = allocate([avmm.virtio(Rng()), mine, avmm.virtio(Rng())], [], VIRTIO)
    found = [(place.base, place.irq) for place in places]
    assert found == [(0xC000_0000, 5), (0xC000_1000, 6), (0xC000_2000, 7)]
    assert named(places[:1]) == ["virtio_mmio.device=0x200@0xc0000000:5"]
    assert named([]) == []


def test_acpi_tells_where_they_are() -> None:
    (described,) = acpi.devices(allocate([avmm.virtio(Rng())], [], VIRTIO))
    assert described.hid == "LNRO0005"
    assert (described.windows, described.gsi) == ([(0xC000_0000, 0x200)], 5)


def test_interrupts_run_out() -> None:
    with pytest.raises(ConfigError, match=r"virtio rng: no interrupt"):
        allocate([avmm.virtio(Rng()) for _ in range(18)], [], VIRTIO)


@pytest.mark.usefixtures("kvm")
async def test_a_place_without_interrupt_is_refused() -> None:
    place = avmm.mmio(VirtioMmio(Rng()), 0xD000_0000, SIZE)
    with pytest.raises(ConfigError, match="without an interrupt"):
        async with Machine(devices=[place]):
            pass


def test_reports_name_the_device(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.read(0xC0)
    assert caplog.record_tuples == [
        ("avmm.virtio", logging.WARNING, "virtio Echo: a read of 4 bytes at 0xc0")
    ]
