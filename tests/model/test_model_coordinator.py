"""The coordinator on model vCPUs: cancelled at every checkpoint, late, with slow handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from avmm.errors import DeviceError
from avmm.migration import RESUME_SECONDS
from model.devices import Failed
from model.mutants import BUGS
from model.production import REAL
from model.properties import Believes
from model.vcpu import Broken, Host, Op
from model.world import Pauser, World, lived

PROGRAM = (
    Op("in", 1, 1),
    Op("load", 8, 0xFFD, parts=(3, 5)),
    Op("rmw", 2, 0x40),
    Op("out", 2, 2),
    Op("compute", count=3),
    Op("in", 4, 4),
)
TWO = (PROGRAM, PROGRAM[::-1])
LATE = ["now", "late", "late"]


class CancelAt(trio.abc.Instrument):
    """Cancels `scope` once the task inside it has come to its `number`-th checkpoint."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.seen = 0
        self.task: trio.lowlevel.Task | None = None
        self.scope: trio.CancelScope | None = None

    def watch(self, scope: trio.CancelScope) -> None:
        self.task, self.scope = trio.lowlevel.current_task(), scope

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task and self.scope is not None:
            self.seen += 1
            if self.seen == self.number:
                self.scope.cancel()


Prepare = Callable[[World], Awaitable[None]]


async def at_the_start(world: World) -> None:
    """Both vCPUs stand before their first instruction."""


async def in_handlers(world: World) -> None:
    """Both vCPUs wait for handlers in the midst of something."""
    for number in range(2):
        await world.manner(number, LATE)
        await world.step(number, 40)


async def with_slow_devices(world: World) -> None:
    """Devices take their time to be quiesced."""
    await world.step(0, 7)
    world.quiesce_manner.extend(["late", "late"])


def cancelled_at(number: int, prepare: Prepare, nested: bool, code: Any = REAL) -> bool:
    """Cancel a pause at its `number`-th checkpoint: true where it had that many.

    Whatever it was at, the guest must run on, and another pause must work.
    """
    instrument = CancelAt(number)

    async def script(world: World, nursery: trio.Nursery) -> None:
        await prepare(world)
        if nested:
            await world.pause(nursery)
            while not world.pausers[0].inside:
                if not await world.further(leaving=False):
                    raise Broken("the first pause is not reached")
        done = trio.Event()

        async def cancelled() -> None:
            with trio.CancelScope() as scope:
                instrument.watch(scope)
                async with world.coordinator.paused():
                    world.save("in a pause that is going to be cancelled")
                    await trio.lowlevel.checkpoint()
                    await trio.lowlevel.checkpoint()
            instrument.task = None
            done.set()

        nursery.start_soon(cancelled)
        await world.quiet()
        while not done.is_set():
            if not await world.further(leaving=False):
                raise Broken("a cancelled pause does not end")
        await world.quiet()
        holders = world.coordinator._holders
        if holders != nested:
            raise Broken(f"{holders} hold the machine, not {int(nested)}")
        if not nested:
            for cpu in world.cpus:
                if cpu.model.asked:
                    raise Broken(f"vCPU {cpu.model.index} was not resumed")
                if any(device.quiesced for device in cpu.devices):
                    raise Broken(f"the devices of vCPU {cpu.model.index} were not resumed")
        await world.leave(0)
        again = await world.pause(nursery)
        await world.finish()
        if again.outcome != "paused":
            raise Broken(f"a later pause is {again.outcome or 'not reached'}")
        await world.stop()

    lived(code, TWO, Host(), Believes(), script, [instrument])
    return instrument.seen >= number


PREPARED = pytest.mark.parametrize("prepare", [at_the_start, in_handlers, with_slow_devices])


@PREPARED
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_cancelled_at_every_checkpoint(prepare: Prepare, nested: bool) -> None:
    number = 1
    while cancelled_at(number, prepare, nested):
        number += 1
    assert number > (2 if nested else 5), "there are not so few checkpoints"


@pytest.mark.parametrize(
    "name",
    [
        "resume forgotten after a cancellation",
        "devices' resume is cut short by a cancellation",
        "leaving is cut short by a cancellation",
    ],
)
def test_cancelling_at_every_checkpoint_finds_planted_bugs(name: str) -> None:
    code = next(bug for bug in BUGS if bug.name == name).planted()
    with pytest.raises(Broken):
        number = 1
        while cancelled_at(number, with_slow_devices, False, code):
            number += 1


# -- handlers that take 3 s, without waiting for them ---------------------------------------


def slow(script: Callable[[World, trio.Nursery], Awaitable[None]], code: Any = REAL) -> World:
    """A world in which vCPU 0 waits for its device, since just now; vCPU 1 is idle."""

    async def whole(world: World, nursery: trio.Nursery) -> None:
        await world.manner(0, ["late"])
        await world.step(0, 40)
        await world.step(1, 400)
        await script(world, nursery)
        await world.finish()
        await world.stop()

    load = Op("load", 4, 0x10, parts=(4,))
    return lived(code, ((load, *PROGRAM), PROGRAM), Host(), Believes(), whole, virtual_time=True)


def test_a_pause_without_deadline_waits_for_a_slow_handler() -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        pauser = await world.pause(nursery)
        await world.step(1, 40)
        await world.advance(3)
        assert not pauser.done and not pauser.inside
        await world.answer(0)
        await world.step(0, 40)
        await world.step(1, 40)
        assert pauser.inside
        assert trio.current_time() - pauser.began == pytest.approx(3)

    world = slow(script)
    assert len(world.snapshots) == 2


def test_a_deadline_names_the_device_the_address_and_the_time() -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        await world.advance(0.5)
        pauser = await world.pause(nursery, 1.0)
        await world.advance(0.5)
        assert not pauser.done
        await world.advance(0.5)
        assert pauser.outcome == "timeout"
        text = str(pauser.error)
        assert "given up after 1.0 s" in text
        assert "vCPU 0 waits for mmio of vCPU 0" in text
        assert "KVM_EXIT_MMIO: read of 4 bytes at 0xd0000010, for 1.5 s so far" in text
        await world.advance(1.5)
        await world.answer(0)

    slow(script)


def test_a_deadline_names_the_device_that_does_not_finish() -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        await world.answer(0)
        await world.step(0, 400)
        world.quiesce_manner.extend(["now", "late"])
        pauser = await world.pause(nursery, 1.0)
        for number in range(2):
            await world.step(number, 40)
        await world.advance(1.0)
        assert pauser.outcome == "timeout"
        expected = "pio of vCPU 1 has not finished what it has in flight, for 1.0 s so far"
        assert expected in str(pauser.error)

    slow(script)


def test_who_asks_meanwhile_does_not_change_what_a_deadline_names() -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        await world.answer(0)
        await world.step(0, 400)
        world.quiesce_manner.append("late")
        first = await world.pause(nursery, 1.0)
        for number in range(2):
            await world.step(number, 40)
        second = await world.pause(nursery)
        await world.advance(1.0)
        assert first.outcome == "timeout"
        assert "pio of vCPU 0 has not finished" in str(first.error)
        for number in range(2):
            await world.step(number, 40)
        assert second.inside

    slow(script)


def test_two_deadlines_at_the_same_time_name_what_each_has_waited_for() -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        await world.answer(0)
        await world.step(0, 400)
        world.quiesce_manner.append("late")
        first = await world.pause(nursery, 1.0)
        second = await world.pause(nursery, 1.0)
        for number in range(2):
            await world.step(number, 40)
        await world.advance(1.0)
        assert (first.outcome, second.outcome) == ("timeout", "timeout")
        assert "pio of vCPU 0 has not finished" in str(first.error)
        assert "another pause is under way" not in str(first.error)
        assert "another pause is under way" in str(second.error)

    slow(script)


def test_a_deadline_while_another_pause_is_under_way() -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        first = await world.pause(nursery)
        second = await world.pause(nursery, 1.0)
        await world.advance(1.0)
        assert second.outcome == "timeout"
        assert not first.done
        await world.answer(0)
        for number in (0, 1):
            await world.step(number, 40)
        assert first.inside

    slow(script)


# -- devices that cannot go on --------------------------------------------------------------


async def raises() -> None:
    raise Failed("what a device raises")


async def nothing() -> None:
    pass


async def left(world: World, nursery: trio.Nursery) -> Pauser:
    """A pause that has been reached and then left."""
    await world.answer(0)
    pauser = await world.pause(nursery)
    for number in range(2):
        await world.step(number, 40)
    assert pauser.inside
    await world.leave(0)
    return pauser


def resumed(world: World) -> list[bool]:
    """Of the two devices that are asked."""
    return [not cpu.devices[0].quiesced for cpu in world.cpus]


@pytest.mark.parametrize("heeds_cancellation", [True, False])
@pytest.mark.parametrize("number", [0, 1])
def test_a_device_that_does_not_resume_keeps_neither_the_guest_nor_other_devices(
    number: int, heeds_cancellation: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        world.may_fail = True
        device = world.cpus[number].devices[0]
        gate = trio.Event()

        async def hang() -> None:
            with trio.CancelScope(shield=not heeds_cancellation):
                await gate.wait()

        device.on_resume = hang
        try:
            pauser = await left(world, nursery)
            assert resumed(world) == [number != 0, number != 1]
            await world.advance(RESUME_SECONDS - 0.5)
            assert world.lot.asked
            assert not caplog.text
            await world.advance(0.5)
            assert not world.lot.asked, "the guest is kept paused"
            late = f"not resumed within 10 s after a pause: pio of vCPU {number}"
            assert f"{late}; the guest runs on" in caplog.text
            assert pauser.done == heeds_cancellation
            if not heeds_cancellation:
                second = await world.pause(nursery, 1.0)
                await world.advance(1.0)
                assert f"under way: not resumed yet: {device.name}" in str(second.error)
        finally:
            gate.set()
        await world.quiet()
        assert pauser.done
        assert isinstance(pauser.error, DeviceError)
        assert str(pauser.error) == late
        device.on_resume = nothing  # the next pause gives it another chance
        again = await world.pause(nursery)
        await world.finish()
        assert again.outcome == "paused"
        assert resumed(world) == [True, True]

    slow(script)


def test_what_several_devices_raise_at_their_resume_is_told_when_the_guest_runs() -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        world.may_fail = True
        hanging, failing = (cpu.devices[0] for cpu in world.cpus)
        hanging.on_resume, failing.on_resume = trio.sleep_forever, raises
        caught: list[ExceptionGroup[Exception]] = []

        async def pauses() -> None:
            try:
                async with world.coordinator.paused():
                    pass
            except ExceptionGroup as group:
                caught.append(group)

        await world.answer(0)
        nursery.start_soon(pauses)
        await world.quiet()
        for number in range(2):
            await world.step(number, 40)
        await world.advance(RESUME_SECONDS)
        assert not world.lot.asked
        assert [type(error) for error in caught[0].exceptions] == [Failed, DeviceError]
        assert str(caught[0].exceptions[1]).endswith(f": {hanging.name}")
        hanging.on_resume = failing.on_resume = nothing
        await world.pause(nursery)

    slow(script)


def test_a_device_that_does_not_resume_is_a_note_where_the_pause_had_failed() -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        world.may_fail = True
        device = world.cpus[0].devices[0]
        device.on_resume = trio.sleep_forever
        world.quiesce_manner.extend(["now", "fail"])
        await world.answer(0)
        pauser = await world.pause(nursery)
        for number in range(2):
            await world.step(number, 40)
        assert resumed(world) == [False, True]
        await world.advance(RESUME_SECONDS)
        assert not world.lot.asked
        assert pauser.outcome == "failed"
        assert isinstance(pauser.error, Failed)
        assert any(device.name in note for note in pauser.error.__notes__)
        device.on_resume = nothing
        await world.pause(nursery)

    slow(script)


# -- vCPUs that have ended -----------------------------------------------------------------


@pytest.mark.parametrize("deadline", [None, 1.0])
def test_a_pause_of_a_vcpu_that_has_ended_comes_to_an_end(deadline: float | None) -> None:
    async def script(world: World, nursery: trio.Nursery) -> None:
        world.may_fail = True
        await world.manner(0, ["fail"])
        await world.step(0, 400)
        assert world.cpus[0].ended
        pauser = await world.pause(nursery, deadline)
        await world.step(1, 40)
        await world.quiet()
        assert pauser.done or pauser.inside, "nobody will ever park that vCPU"
        await world.finish()

    lived(REAL, TWO, Host(), Believes(), script)


@pytest.mark.parametrize("late", ["fail", "fail late"])
def test_no_state_is_offered_of_a_vcpu_that_fails_while_it_drains(late: str) -> None:
    """Its exit is not finished: what could be saved is wrong, and nobody has been told yet."""

    program = (Op("compute", count=60), Op("rmw", 2), Op("in", 1))

    async def script(world: World, nursery: trio.Nursery) -> None:
        await world.manner(0, ["late", late])
        await world.step(0, 400)
        pauser = await world.pause(nursery)
        await world.answer(0)
        await world.finish()
        assert pauser.outcome == "refused"
        assert world.cpus[0].failed is not None

    lived(REAL, (program,), Host(), Believes(), script)
