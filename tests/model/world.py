"""Several model vCPUs under production's loops, threads, bridges and coordinator, in lockstep.

Each vCPU has its real OS thread and its real bridge, but its thread goes on from one point of
the model to the next only when the schedule says so: at each point it stops at a `Gate`, and
nothing moves until `quiet` has seen that every thread stands at a gate or waits for its task,
and every task for something. So a schedule can have anything happen at any point, a pause
between the look at a flag and its clearing, say, and happens again the same way when it is
run again. No clock takes part: deadlines are those of trio's `MockClock`.

Only the border to the kernel is the model's: the vCPU and the lot in which it parks (`parking`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import trio
from support.threads import ours
from trio.testing import MockClock, wait_all_tasks_blocked

from avmm.errors import AvmmError, PauseTimeout
from avmm.kvm.bridge import Bridge
from avmm.kvm.claims import DeviceClaims
from model.devices import Board, Failed, Recorder, Wait, buses, calls, plug, recorders
from model.parking import ModelLot, ModelSpot
from model.production import Production
from model.properties import Believes, policy, same
from model.solo import Result, Solo, make_exits, oracle
from model.vcpu import Broken, Host, ModelVcpu, Op

WATCHDOG: Final = 20.0
"""Seconds after which a thread that does not come to a gate is a failure of the harness."""
LONGEST: Final = 1_000
"""Rounds in which every vCPU must have come to its end once nobody holds it any more."""


class Gate:
    """Where one vCPU's thread waits for its permission to go on."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._permits = 0
        self.at: str | None = None
        self.open = False
        self.unborn = True
        self.ended = False
        self.dying = False
        self.parked = False
        self.calls = self.answers = self.taken = 0

    # -- the vCPU's thread -----------------------------------------------------------------

    def reach(self, point: str) -> None:
        with self._condition:
            if self.open or self.dying:
                return
            self.at = point
            self._condition.notify_all()
            if not self._condition.wait_for(lambda: self._permits or self.open, WATCHDOG):
                raise RuntimeError(f"nobody let the vCPU go on from {point!r}")
            self._permits = 0
            self.at = None

    def called(self, ended: bool = False) -> None:
        with self._condition:
            self.calls += 1
            self.ended |= ended
            self._condition.notify_all()

    def stands(self, parked: bool) -> None:
        with self._condition:
            self.parked = parked
            self._condition.notify_all()

    def die(self) -> None:
        """The thread is about to end by an exception: nobody is to wait for its next gate."""
        with self._condition:
            self.dying = True
            self._condition.notify_all()

    # -- trio's thread ---------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Does the thread stand still, at a gate or for its task?"""
        still = self.at is not None and not self._permits
        waits = self.parked or self.calls > self.answers
        return still or waits or self.unborn or self.ended or self.open

    def settle(self, or_dying: bool = False) -> None:
        with self._condition:
            if not self._condition.wait_for(
                lambda: self.settled or (or_dying and self.dying), WATCHDOG
            ):
                raise RuntimeError("a vCPU's thread came neither to a gate nor to its task")

    def let_on(self) -> bool:
        """Let the thread go on to its next gate; False where it stands at none."""
        with self._condition:
            if self.at is None or self._permits:
                return False
            self._permits = 1
            self._condition.notify_all()
            return True

    def throw_open(self) -> None:
        with self._condition:
            self.open = True
            self._condition.notify_all()


CLAIMS: Final = DeviceClaims({})
"""The model's spots know by themselves what to hand over."""


class WatchedBridge(Bridge):
    """The real bridge; its gate knows who has the turn."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate
        self.closed = False

    def call(self, handed: bool = False) -> None:
        self._gate.called()
        super().call(handed)

    def leave(self) -> None:
        self._gate.called(ended=True)
        super().leave()

    def poll(self, may_spin: bool) -> bool:
        return self._took(super().poll(may_spin))

    def woken(self) -> bool:
        return self._took(super().woken())

    def _took(self, mine: bool) -> bool:
        if mine:
            self._gate.taken = self._gate.calls
        return mine

    def answer(self) -> None:
        self._gate.answers = self._gate.calls
        super().answer()

    def answer_and_poll(self, may_spin: bool) -> bool:
        self._gate.answers = self._gate.calls
        return self._took(super().answer_and_poll(may_spin))

    def close(self) -> None:
        self.closed = True
        super().close()


def watched(loop: Any, broken: Callable[[str], None], steps: set[tuple[str, str]]) -> type:
    """The `VcpuLoop` of this module, held against its own table: each step from a state to the
    next must be in it, and be made by the side that it names. `steps` gets those that were made.
    """

    class Watched(loop.VcpuLoop):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "_state" and name in vars(self):
                before, thread = vars(self)[name], threading.current_thread().name
                is_thread = thread == f"avmm vCPU {self.index}"
                side = loop.Writer.THREAD if is_thread else loop.Writer.TASK
                if loop.TRANSITIONS[before].get(value) is not side:
                    broken(f"vCPU {self.index}: {side.value} makes {value} of {before}")
                steps.add((before.name, value.name))
            super().__setattr__(name, value)

    return Watched


@dataclass
class Snapshot:
    """What was saved at a standstill."""

    label: str
    vcpus: list[Solo]


@dataclass
class Pauser:
    """Somebody who pauses the machine, stays a while and leaves."""

    scope: trio.CancelScope
    deadline: float | None
    leave: trio.Event
    began: float
    inside: bool = False
    done: bool = False
    outcome: str = ""
    cancelled: bool = False
    error: Exception | None = None


@dataclass
class Cpu:
    """One vCPU with all that is its."""

    model: ModelVcpu
    board: Board
    devices: list[Recorder]
    gate: Gate
    loop: Any
    bridge: Any
    expected: Result
    program: Sequence[Op]
    waiting: list[trio.Event] = field(default_factory=list)
    manner: list[str] = field(default_factory=list)
    """How the next accesses are answered: "now", "late", "fail"; then now."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    failed: BaseException | None = None
    ended: bool = False

    @property
    def may_have_ended(self) -> bool:
        """Has anybody asked it to?"""
        return self.loop._spot.stopping or self.scope.cancel_called


class World:
    """A machine of model vCPUs, and the schedule's verbs; `lived` makes one."""

    def __init__(
        self,
        code: Production,
        programs: Sequence[Sequence[Op]],
        host: Host,
        believes: Believes,
        clock: MockClock | None = None,
    ) -> None:
        self.code = code
        self.host = host
        self.clock = clock
        self.violations: list[Broken] = []
        self.snapshots: list[Snapshot] = []
        self.pausers: list[Pauser] = []
        self.nudges: list[int] = []
        """How far the vCPU's thread gets while it is being kicked: at each of the moments
        before `immediate_exit` is written and around the signal; then not at all."""
        self._thread = threading.get_ident()
        self.may_fail = False
        self.torn = False
        self.quiesce_gates: list[trio.Event] = []
        self.quiesce_manner: list[str] = []
        self.cpus: list[Cpu] = []
        self.state_steps: set[tuple[str, str]] = set()
        """What the vCPUs have gone from, and to (`VcpuState`)."""
        self._loop = watched(code.loop, self.broken, self.state_steps)
        self._onto = buses()
        decide = policy(code, believes)
        models = [ModelVcpu(index, program, host) for index, program in enumerate(programs)]
        self.lot = ModelLot(models)
        self.lot.on_kick = lambda spot: self._nudge(self.cpus[spot.model.index])
        for spot, program in zip(self.lot.spots, programs, strict=True):
            self.cpus.append(self._cpu(spot, program, decide))
        self.group = code.loop.VcpuGroup(self.lot, [cpu.loop for cpu in self.cpus])
        self.coordinator = code.migration.Coordinator(
            self.group,
            [device for cpu in self.cpus for device in cpu.devices[:1]],
            self._coalesced_come,
        )

    def _coalesced_come(self) -> None:
        """The guest's last writes to coalesced regions are looked for: none may come after."""
        if not all(cpu.loop.is_parked for cpu in self.cpus):
            raise Broken("coalesced writes are looked for while a vCPU may make more")

    def _cpu(self, spot: ModelSpot, program: Sequence[Op], decide: Any) -> Cpu:
        model = spot.model
        index = model.index
        board = Board(index)
        gate = Gate()
        spot.on_standing = lambda: gate.stands(spot.standing)
        made: list[WatchedBridge] = []

        def bridge() -> WatchedBridge:
            made.append(WatchedBridge(gate))
            return made[0]

        devices = recorders(board)
        for device in devices:
            plug(device, self._onto, threading.Lock())
        loop_module = self.code.loop
        later = self._later(index)
        exits = make_exits(self.code, model, self._onto, board, calls(board, later))
        real = loop_module.Bridge
        loop_module.Bridge = bridge
        try:
            loop = self._loop(model, exits, decide, spot, None, CLAIMS)
        finally:
            loop_module.Bridge = real
        cpu = Cpu(model, board, devices, gate, loop, made[0], oracle(program, index), program)
        for device in devices:
            device.later = later
            device.interrupt = model.interrupt
            device.on_quiesce = self._on_quiesce(device)
        model.gate = gate.reach
        model.on_request = lambda: self._nudge(cpu)
        model.on_broken = gate.die
        return cpu

    def _nudge(self, cpu: Cpu) -> None:
        """While it is being asked, the vCPU's thread gets a little further."""
        far = self.nudges.pop(0) if self.nudges and not self.may_fail else 0
        if not far or threading.get_ident() != self._thread:
            return
        for _ in range(far):
            cpu.gate.settle(or_dying=True)  # it may just have been let go
            if cpu.loop._spot.stopping or not cpu.gate.let_on():
                break
        cpu.gate.settle(or_dying=True)

    def _later(self, index: int) -> Callable[[], Wait]:
        def later() -> Wait:
            cpu = self.cpus[index]
            manner = cpu.manner.pop(0) if cpu.manner else "now"
            if manner == "now":
                return None
            if manner == "late":
                event = trio.Event()
                cpu.waiting.append(event)
                return event.wait
            if manner == "fail late":
                return _fail
            cpu.gate.die()
            raise Failed(f"a device of vCPU {index} fails")

        return later

    def _on_quiesce(self, device: Recorder) -> Callable[[], Awaitable[None]]:
        async def on_quiesce() -> None:
            for cpu in self.cpus:
                if not cpu.loop.is_parked or cpu.gate.at is not None:
                    self.broken(f"{device.name} is quiesced before vCPU {cpu.model.index} parked")
            manner = self.quiesce_manner.pop(0) if self.quiesce_manner else "now"
            if manner == "late":
                event = trio.Event()
                self.quiesce_gates.append(event)
                await event.wait()
            elif manner == "fail":
                raise Failed(f"{device.name} cannot be quiesced")

        return on_quiesce

    # -- life ------------------------------------------------------------------------------

    def broken(self, text: str) -> None:
        """Note that a property does not hold, where raising would reach nobody."""
        self.violations.append(Broken(text))

    async def _run(self, cpu: Cpu) -> None:
        cpu.gate.unborn = False
        try:
            with cpu.scope:
                await cpu.loop.run()
        except Exception as error:
            cpu.failed = error
        finally:
            cpu.ended = True

    def tear_down(self) -> None:
        """Whatever state it is in, every thread is to end."""
        self.torn = True
        for cpu in self.cpus:
            cpu.model.end()
            cpu.model.still = cpu.model.asked = False
            cpu.gate.throw_open()

    async def quiet(self) -> None:
        """Return when nothing moves any more, neither thread nor task."""
        end = time.monotonic() + WATCHDOG / 4
        while time.monotonic() < end:
            await wait_all_tasks_blocked()
            for cpu in self.cpus:
                cpu.gate.settle()
            if not self._tasks_wanted():
                self.look()
                return
        raise Broken("a vCPU has handed over an exit, and its task does not take it")

    def _tasks_wanted(self) -> bool:
        """Has a thread given trio something to do that it has not begun?"""
        return self.lot.sounding or any(
            cpu.gate.calls != cpu.gate.taken and not cpu.gate.unborn and not cpu.ended
            for cpu in self.cpus
        )

    def look(self) -> None:
        """Raise what is broken."""
        for cpu in self.cpus:
            if isinstance(cpu.failed, Broken):
                raise cpu.failed
            if isinstance(cpu.failed, AvmmError):
                raise Broken(f"vCPU {cpu.model.index} failed: {cpu.failed!r}") from cpu.failed
            if cpu.failed is not None and not (self.may_fail and isinstance(cpu.failed, Failed)):
                raise cpu.failed
        if self.violations:
            raise self.violations[0]

    # -- the schedule's verbs --------------------------------------------------------------

    async def step(self, number: int, steps: int = 1) -> None:
        """Let a vCPU go on by so many points."""
        cpu = self.cpus[number % len(self.cpus)]
        for _ in range(steps):
            if not cpu.gate.let_on():
                break
            cpu.gate.settle(or_dying=True)
            if self._tasks_wanted() or cpu.gate.dying or cpu.gate.ended:
                await self.quiet()
        await self.quiet()

    async def answer(self, number: int) -> None:
        """A handler that a vCPU waits for answers."""
        waiting = self.cpus[number % len(self.cpus)].waiting
        if waiting:
            waiting.pop(0).set()
        await self.quiet()

    async def manner(self, number: int, manners: Sequence[str]) -> None:
        """How the next accesses of a vCPU are answered."""
        self.may_fail |= any("fail" in manner for manner in manners)
        self.cpus[number % len(self.cpus)].manner.extend(manners)

    async def interrupt(self, number: int, vector: int) -> None:
        """A device does something of its own."""
        self.cpus[number % len(self.cpus)].devices[0].work(vector)

    async def advance(self, seconds: float) -> None:
        """Time passes."""
        assert self.clock is not None
        self.clock.jump(seconds)
        await self.quiet()

    async def pause(self, nursery: trio.Nursery, deadline: float | None = None) -> Pauser:
        """Somebody pauses the machine."""
        pauser = Pauser(trio.CancelScope(), deadline, trio.Event(), trio.current_time())
        self.pausers.append(pauser)
        nursery.start_soon(self.pauser, pauser)
        await self.quiet()
        return pauser

    async def leave(self, number: int) -> None:
        """One who paused leaves, now or as soon as it stands still."""
        if self.pausers:
            self.pausers[number % len(self.pausers)].leave.set()
            await self.quiet()

    async def cancel(self, number: int) -> None:
        """One who paused, or tries to, is cancelled."""
        if self.pausers:
            pauser = self.pausers[number % len(self.pausers)]
            pauser.cancelled = True
            pauser.scope.cancel()
            await self.quiet()

    async def halt(self) -> None:
        """The machine is stopped, whatever its vCPUs are at."""
        self.group.stop()
        await self.quiet()

    async def abandon(self, number: int) -> None:
        """The task of a vCPU is cancelled."""
        self.may_fail = True
        self.cpus[number % len(self.cpus)].scope.cancel()
        await self.quiet()

    async def quiesced(self, number: int) -> None:
        """A device has finished what was in flight."""
        if self.quiesce_gates:
            self.quiesce_gates.pop(number % len(self.quiesce_gates)).set()
            await self.quiet()

    async def pauser(self, pauser: Pauser) -> None:
        """The task of one who pauses."""
        with pauser.scope:
            try:
                async with self.coordinator.paused(pauser.deadline):
                    pauser.outcome = "paused"
                    pauser.inside = True
                    await self._stay(pauser)
            except PauseTimeout as error:
                pauser.outcome, pauser.error = "timeout", error
                if pauser.deadline is None:
                    self.broken(f"a pause without deadline was given up: {error}")
            except Failed as error:
                pauser.outcome, pauser.error = "failed", error
            except AvmmError as error:
                pauser.outcome, pauser.error = "refused", error
                if not self.may_fail:
                    self.broken(f"a pause was refused: {error}")
        pauser.done = True

    async def _stay(self, pauser: Pauser) -> None:
        before = self.save("inside a pause")
        for cpu in self.cpus:
            cpu.model.still = True
        try:
            await pauser.leave.wait()
        finally:
            if not self.torn:
                self._leaves(pauser, before)

    def _leaves(self, pauser: Pauser, before: Snapshot) -> None:
        after = self.save("at the end of a pause")
        if self.results(before) != self.results(after):
            self.broken("the state changed while the machine was paused")
        pauser.inside = False
        if not any(other.inside for other in self.pausers):
            for cpu in self.cpus:
                cpu.model.still = False

    def save(self, label: str) -> Snapshot:
        """What a user would save now; each is loaded and run to its end by `finish`."""
        vcpus = []
        for cpu in self.cpus:
            if cpu.gate.dying or (cpu.gate.ended and not cpu.may_have_ended):
                self.broken(f"{label}: vCPU {cpu.model.index} has ended in the midst of something")
            if cpu.gate.at is not None:
                self.broken(f"{label}: vCPU {cpu.model.index} is at {cpu.gate.at!r}")
            for device in cpu.devices[:1]:
                if not device.quiesced:
                    self.broken(f"{label}: {device.name} is not quiesced")
            vcpus.append(self._saved(cpu))
        snapshot = Snapshot(label, vcpus)
        self.snapshots.append(snapshot)
        return snapshot

    def _saved(self, cpu: Cpu) -> Solo:
        return Solo(self.code, cpu.program, self.host, cpu.model.state(), cpu.board.copy())

    @staticmethod
    def results(snapshot: Snapshot) -> list[Result]:
        return [solo.result() for solo in snapshot.vcpus]

    async def finish(self) -> None:
        """Nobody holds anything any more: everybody must come to the end, and be right."""
        for _ in range(LONGEST):
            await self.quiet()
            if await self.further():
                continue
            break
        else:
            raise Broken("a vCPU or a pause does not come to its end")
        for pauser in self.pausers:
            if not pauser.done:
                raise Broken("a pause is neither reached nor given up")
        if self.coordinator._holders or self.coordinator.is_paused:
            raise Broken(f"{self.coordinator._holders} hold a pause that everybody has left")
        for cpu in self.cpus:
            if any(device.quiesced for device in cpu.devices):
                raise Broken(f"a device of vCPU {cpu.model.index} was not resumed")
            if cpu.failed is None and not cpu.loop.failed:
                self._is_right(cpu)
        self.look()
        self.check_snapshots()

    def _is_right(self, cpu: Cpu) -> None:
        """It has come to its end, or to where it was stopped with nothing torn."""
        name = f"vCPU {cpu.model.index}"
        if cpu.may_have_ended:
            if not cpu.ended:
                raise Broken(f"{name} was stopped and has not ended")
            self.snapshots.append(Snapshot(f"{name}, stopped", [self._saved(cpu)]))
            return
        if not (cpu.model.finished and cpu.gate.at == "idle"):
            raise Broken(f"{name} stands still, at {cpu.gate.at!r}, though nobody holds a pause")
        state = cpu.model.state()
        run_on = Result(tuple(cpu.board.log), state.checksum, state.pc)
        same(run_on, cpu.expected, f"{name}, having run on")

    async def further(self, leaving: bool = True) -> bool:
        """Let everything go one step on, whoever pauses leave if `leaving`; False where nothing
        more is to be done."""
        moved = False
        for pauser in self.pausers:
            if leaving and not pauser.leave.is_set():
                pauser.leave.set()
                moved = True
        for event in self.quiesce_gates:
            event.set()
            moved = True
        self.quiesce_gates.clear()
        for cpu in self.cpus:
            while cpu.waiting:
                cpu.waiting.pop(0).set()
                moved = True
        if moved:
            await self.quiet()
        asked = any(not pauser.done for pauser in self.pausers)
        for number, cpu in enumerate(self.cpus):
            idle = cpu.gate.at == "idle"
            wanted = asked or cpu.may_have_ended
            if cpu.gate.at is None or (idle and not wanted and not cpu.model.state().interrupts):
                continue
            await self.step(number)
            moved = True
        return moved

    def check_snapshots(self) -> None:
        """Whatever was saved at a standstill comes to what the undisturbed run comes to."""
        for snapshot in self.snapshots:
            for solo in snapshot.vcpus:
                expected = self.cpus[solo.board.index].expected
                result = solo.again().to_end()
                same(Result(result.log, result.checksum, result.pc), expected, snapshot.label)

    async def stop(self) -> None:
        """Every vCPU is stopped, and ends without an error."""
        for cpu in self.cpus:
            cpu.gate.throw_open()
        for cpu in self.cpus:
            cpu.loop.stop()


async def _fail() -> None:
    await trio.lowlevel.checkpoint()
    raise Failed("a device fails late")


Script = Callable[[World, trio.Nursery], Awaitable[None]]


def lived(
    code: Production,
    programs: Sequence[Sequence[Op]],
    host: Host,
    believes: Believes,
    script: Script,
    instruments: Sequence[trio.abc.Instrument] = (),
    virtual_time: bool = False,
) -> World:
    """A world in which `script` has happened, from its first vCPU's start to the last's end.

    Raises `Broken` where a property does not hold. Whatever happens, no thread is left.
    """
    before = len(ours())
    clock = MockClock()
    made: list[World] = []

    async def main() -> None:
        world = World(code, programs, host, believes, clock)
        made.append(world)
        async with trio.open_nursery() as nursery:
            try:
                for cpu in world.cpus:
                    nursery.start_soon(world._run, cpu)
                await world.quiet()
                await script(world, nursery)
            finally:
                world.tear_down()
                nursery.cancel_scope.cancel()
        world.lot.close()
        world.look()
        for cpu in world.cpus:
            if not cpu.bridge.closed:
                raise Broken(f"the bell of vCPU {cpu.model.index} is left open")

    real_time = code.loop.time
    if virtual_time:
        code.loop.time = SimpleNamespace(
            monotonic=clock.current_time, perf_counter=time.perf_counter
        )
    try:
        trio.run(main, clock=clock, instruments=instruments)
    except BaseExceptionGroup as group:
        raise _first(group) from group
    finally:
        code.loop.time = real_time
    if len(ours()) != before:
        raise Broken("a thread is left behind")
    return made[0]


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
