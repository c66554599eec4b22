"""What every virtio device has to do, whichever it is: reset, pause, save, and hostile rings."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from support.hostile import HALF, REGISTERS, Island, a_while, step
from support.virtio_cases import CASES, Case
from support.virtio_driver import EVENT_IDX, INDIRECT, NEXT, VERSION_1, Bench, Driver, settle

from avmm.errors import DeviceError
from avmm.memory.ram import GuestMemory

FEATURES = [VERSION_1 | EVENT_IDX, VERSION_1]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def bench(case: Case) -> Iterator[Bench]:
    bench = Bench(case.make())
    yield bench
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of the device keeps guest memory mapped
        bench.memory.close()


def twin(case: Case, bench: Bench) -> Bench:
    """The same device with a copy of the guest's memory."""
    other = Bench(case.make(), GuestMemory(bench.memory.size))
    other.memory.write(0, bench.memory.read(0, bench.memory.size))
    return other


def heads(ring) -> list[int]:
    return [head for head, _ in ring.take()]


async def test_requests_are_served(case: Case, bench: Bench) -> None:
    async with bench.running() as driver:
        await driver.start()
        case.let_go(bench.model)
        case.submit(driver)
        await settle()
        done = driver.rings[case.queue].take()
        assert len(done) == 3
        assert sum(written for _, written in done) == case.written
        assert bench.line.pulses >= 1
        assert bench.read(0x60) & 1
        bench.write(0x64, 1)
        assert bench.read(0x60) == 0


async def test_a_notification_that_exits_does_it_as_well(case: Case) -> None:
    bench = Bench(case.make(), doorbells=False)
    async with bench.running() as driver:
        await driver.start()
        case.let_go(bench.model)
        case.submit(driver)
        await settle()
        assert len(driver.rings[case.queue].take()) == 3


@pytest.mark.parametrize("features", FEATURES, ids=["event_idx", "flags"])
async def test_nothing_happens_while_quiesced(case: Case, bench: Bench, features: int) -> None:
    async with bench.running() as driver:
        await driver.start(features)
        case.submit(driver)
        await settle()
        await bench.device.quiesce()
        await bench.device.quiesce()
        before = bench.memory.read(0, bench.memory.size), bench.line.pulses
        state = bench.device.save()
        case.let_go(bench.model)
        driver.rings[case.queue].kick(always=True)
        await settle()
        assert (bench.memory.read(0, bench.memory.size), bench.line.pulses) == before
        assert bench.device.save()["queues"] == state["queues"]
        await bench.device.resume()
        await bench.device.resume()
        await settle()
        assert len(driver.rings[case.queue].take()) == 3
        assert bench.line.pulses > before[1]


async def test_a_quiesce_that_is_cancelled_can_be_resumed(case: Case, bench: Bench) -> None:
    async with bench.running() as driver:
        await driver.start()
        case.submit(driver)
        await settle()
        with trio.CancelScope() as scope:
            scope.cancel()
            await bench.device.quiesce()
        await bench.device.resume()
        case.let_go(bench.model)
        await settle()
        assert len(driver.rings[case.queue].take()) == 3


async def test_a_reset_in_the_midst_of_requests(case: Case, bench: Bench) -> None:
    async with bench.running() as driver:
        await driver.start()
        case.submit(driver)
        await settle()
        await bench.write_and_wait(0x70, 0)
        assert bench.read(0x70) == 0
        before = bench.memory.read(0, bench.memory.size), bench.line.pulses
        case.let_go(bench.model)
        driver.rings[case.queue].kick(always=True)
        await settle()
        assert (bench.memory.read(0, bench.memory.size), bench.line.pulses) == before
        fresh = Bench(case.make()).device.save()
        assert {**bench.device.save(), "model": None} == {**fresh, "model": None}
        await driver.start()
        case.submit(driver)
        await settle()
        assert len(driver.rings[case.queue].take()) == 3


@pytest.mark.parametrize("features", FEATURES, ids=["event_idx", "flags"])
async def test_saved_with_requests_in_flight(case: Case, bench: Bench, features: int) -> None:
    async with bench.running() as driver:
        await driver.start(features)
        case.submit(driver)
        await settle()
        await bench.device.quiesce()
        state = copy.deepcopy(bench.device.save())
        other = twin(case, bench)
        rings = driver.rings
    other.device.load(state)
    assert other.device.save() == state
    async with other.running():
        case.let_go(other.model)
        await settle()
        ring = rings[case.queue]
        ring.bench, ring.memory = other, other.memory
        done = ring.take()
        assert len(done) == 3
        assert sum(written for _, written in done) == case.written
        assert other.line.pulses
    other.memory.close()


async def test_a_state_takes_the_place_of_another(case: Case, bench: Bench) -> None:
    async with bench.running() as driver:
        await driver.start()
        case.submit(driver)
        await settle()
        await bench.device.quiesce()
        state = copy.deepcopy(bench.device.save())
        case.let_go(bench.model)
        await bench.device.resume()
        await settle()
        bench.write(0x14, 1)
        bench.write(0x30, 7)
        with pytest.raises(DeviceError, match="at work"):
            bench.device.load(state)
        await bench.device.quiesce()
        assert bench.device.save() != state
        bench.device.load(state)
        assert bench.device.save() == state


async def test_a_notification_that_was_lost_with_the_old_machine(case: Case, bench: Bench) -> None:
    """The guest has rung and looks no more, the state was taken before the device heard it."""
    async with bench.running() as driver:
        await driver.start()
        await bench.device.quiesce()
        case.submit(driver)
        state = bench.device.save()
        other = twin(case, bench)
        ring = driver.rings[case.queue]
    other.device.load(state)
    async with other.running():
        case.let_go(other.model)
        await settle()
        ring.bench, ring.memory = other, other.memory
        assert len(ring.take()) == 3
    other.memory.close()


async def test_an_interrupt_that_was_not_acknowledged_comes_again(
    case: Case, bench: Bench
) -> None:
    async with bench.running() as driver:
        await driver.start()
        case.let_go(bench.model)
        case.submit(driver)
        await settle()
        await bench.device.quiesce()
        state = bench.device.save()
    assert state["interrupt_status"] == 1
    other = Bench(case.make())
    other.device.load(state)
    assert other.line.pulses == 1
    quiet = Bench(case.make())
    quiet.device.load({**state, "interrupt_status": 0})
    assert quiet.line.pulses == 0


async def test_states_that_are_none(case: Case, bench: Bench) -> None:
    state = bench.device.save()
    changes = [
        {"version": 2},
        {"status": 0x100},
        {"status": 0x10},
        {"status": 4},
        {"status": 12, "driver_features": 0},
        {"status": 12, "driver_features": 1 << 63 | 1 << 32},
        {"driver_features": 1 << 64},
        {"interrupt_status": 4},
        {"queues": []},
        {"queues": None},
        {"queues": [None] * len(state["queues"])},
        {"model": None},
        {"model": {"x": 1}},
        {"x": 1},
    ]
    for change in changes:
        with pytest.raises(DeviceError):
            bench.device.load({**state, **change})
        assert bench.device.save() == state
    for wrong in (None, [], {}, 5):
        with pytest.raises(DeviceError):
            bench.device.load(wrong)


def _circle(driver: Driver, queue: int) -> None:
    ring = driver.rings[queue]
    ring.describe(0, 0x8000, 4, NEXT, 0)
    ring.offer(0)


def _ahead(driver: Driver, queue: int) -> None:
    ring = driver.rings[queue]
    ring.set16(ring.avail + 2, 1000)


def _outside(driver: Driver, queue: int) -> None:
    driver.rings[queue].add([(1 << 40, 4, False)])


def _nested(driver: Driver, queue: int) -> None:
    ring = driver.rings[queue]
    ring.memory.write(0x80000, bytes(12) + bytes([INDIRECT, 0, 0, 0]))
    ring.describe(0, 0x80000, 16, INDIRECT, 0)
    ring.offer(0)


@pytest.mark.parametrize("breaks", [_circle, _ahead, _outside, _nested])
async def test_a_broken_rule_stops_the_device_until_it_is_reset(
    case: Case, bench: Bench, breaks, caplog: pytest.LogCaptureFixture
) -> None:
    async with bench.running() as driver:
        for _ in range(3):
            await driver.start()
            queue = case.queue if case.listened is None else case.listened
            breaks(driver, queue)
            driver.rings[queue].kick(always=True)
            await settle()
            assert driver.needs_reset
            assert bench.read(0x60) & 2
            before = bench.memory.read(0, bench.memory.size), bench.line.pulses
            case.submit(driver)
            driver.rings[case.queue].kick(always=True)
            await settle()
            assert (bench.line.pulses) == before[1]
            await bench.device.quiesce()
            await bench.device.resume()
            await settle()
            assert driver.needs_reset
        assert sum("needs a reset" in record.message for record in caplog.records) == 1
        await driver.start()
        case.let_go(bench.model)
        case.submit(driver)
        await settle()
        assert len(driver.rings[case.queue].take()) == 3


async def test_a_guest_that_refills_for_ever_keeps_nobody_from_a_pause_or_reset(
    case: Case, bench: Bench
) -> None:
    async with bench.running() as driver:
        case.let_go(bench.model)
        await driver.start()
        number = case.queue if case.listened is None else case.listened
        ring, queue = driver.rings[number], bench.device._queues[number]
        push, served = queue.push, 0

        def push_and_refill(chain, written) -> None:
            nonlocal served
            served += 1
            push(chain, written)
            ring.take()
            another = case.another or (lambda _: [(driver.end, 8, bool(case.written))])
            ring.add(another(driver))
            ring.kick()

        queue.push = push_and_refill
        case.submit(driver)
        if number != case.queue:
            ring.add([(driver.end, 8, False)])
            ring.kick()
        with trio.fail_after(5):
            while served < 1000:
                await trio.lowlevel.checkpoint()
            await bench.device.quiesce()
            before = served
            await a_while()
            assert served == before
            await bench.device.resume()
            while served < before + 1000:
                await trio.lowlevel.checkpoint()
            await bench.write_and_wait(0x70, 0)
        assert bench.read(0x70) == 0


async def test_a_queue_that_cannot_be_stops_the_device(case: Case, bench: Bench) -> None:
    async with bench.running() as driver:
        await driver.start()
        await bench.write_and_wait(0x70, 0)
        for value in (1, 3):
            bench.write(0x70, value)
        bench.write(0x24, 1)
        bench.write(0x20, 1)
        bench.write(0x70, 11)
        bench.write(0x30, case.queue)
        bench.write(0x38, 8)
        bench.write(0x84, 0x7FFF)  # the descriptor table lies far beyond RAM
        bench.write(0x44, 1)
        bench.write(0x70, 15)
        await settle()
        assert driver.needs_reset


VALUES = st.one_of(st.integers(0, 20), st.integers(0, (1 << 32) - 1))
STEPS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(REGISTERS), st.sampled_from([4, 4, 1, 2]), VALUES),
    st.tuples(st.just("write"), st.integers(0, 0x1FC), st.just(4), VALUES),
    st.tuples(st.just("read"), st.integers(0, 0x1FC), st.sampled_from([1, 2, 4]), st.just(0)),
    st.tuples(st.just("start"), st.just(0), st.just(0), st.integers(0, 7)),
    st.tuples(st.just("ring"), st.integers(0, 0x600), st.binary(max_size=64), st.integers(0, 5)),
    st.tuples(
        st.just("chain"),
        st.one_of(st.integers(0, HALF), st.integers(HALF - 64, HALF + 64)),
        st.integers(0, 300),
        st.integers(0, 5),
    ),
    st.tuples(st.just("settle"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("pause"), st.just(0), st.just(0), st.just(0)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=30))
async def test_whatever_the_guest_does_stays_within_its_memory(case: Case, steps) -> None:
    memory = Island()
    bench = Bench(case.make(), memory)
    case.let_go(bench.model)
    async with bench.running() as driver:
        await driver.start()
        for what, where, size, value in steps:
            await step(driver, what, where, size, value)
        await a_while()
        await bench.device.quiesce()
        state = bench.device.save()
        bench.device.load(state)
        assert bench.device.save() == state
    assert memory.canaries_live()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.close()
