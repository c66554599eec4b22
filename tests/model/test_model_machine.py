"""A state machine: hypothesis picks each next move by what the world looks like just then."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import trio
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from model.mutants import BUGS
from model.production import REAL, Production
from model.programs import hosts, programs
from model.properties import Believes, beliefs, can_tell
from model.schedules import Action, failing, play
from model.vcpu import Broken, Host, Op
from model.world import WATCHDOG, World, lived

pytestmark = pytest.mark.timeout(300)  # a busy machine takes its time
cpus = st.integers(0, 3)
EXAMPLES = 300


class Machine(RuleBasedStateMachine):
    """The world lives in a thread of its own, and does there what the rules say."""

    code: Production = REAL
    found: ClassVar[list[BaseException]] = []

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self.orders: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None

    @initialize(
        several=st.lists(programs(4), min_size=1, max_size=3), host=hosts(), believes=beliefs()
    )
    def create(self, several: list[tuple[Op, ...]], host: Host, believes: Believes) -> None:
        assume(all(can_tell(host, believes, program) for program in several))

        def life() -> None:
            try:
                lived(self.code, several, host, believes, self._script)
            except BaseException as error:
                self.answers.put(error)
            else:
                self.answers.put(None)

        self.thread = threading.Thread(target=life)
        self.thread.start()
        self._answer()

    async def _script(self, world: World, nursery: trio.Nursery) -> None:
        self.world = world
        self.answers.put(None)
        # The rules' thread waits whenever this one runs, and the other way round.
        while (order := self.orders.get(timeout=WATCHDOG)) is not None:
            await play(world, nursery, order)
            self.answers.put(None)
        world.nudges.clear()
        await world.finish()
        await world.stop()

    def _answer(self) -> None:
        error = self.answers.get(timeout=2 * WATCHDOG)
        if error is not None:
            self.found.append(error)
            self._join()
            raise error

    def _join(self) -> None:
        thread, self.thread = self.thread, None
        if thread is not None:
            thread.join(WATCHDOG)
            assert not thread.is_alive()

    def _do(self, *order: Any) -> None:
        if self.thread is not None:
            self.orders.put(order)
            self._answer()

    def _now(self, holds: Callable[[World], bool]) -> bool:
        return self.world is not None and self.thread is not None and holds(self.world)

    @rule(cpu=cpus, steps=st.integers(1, 12))
    def step(self, cpu: int, steps: int) -> None:
        self._do("step", cpu, steps)

    @rule(cpu=cpus, manners=st.lists(st.sampled_from(["now", "late"]), min_size=1, max_size=3))
    def later(self, cpu: int, manners: list[str]) -> None:
        self._do("manner", cpu, manners)

    @rule(manners=st.lists(st.sampled_from(["now", "late"]), min_size=1, max_size=2))
    def slowly(self, manners: list[str]) -> None:
        self._do("slow", manners)

    @rule(cpu=cpus, vector=st.integers(32, 255))
    def interrupt(self, cpu: int, vector: int) -> None:
        self._do("interrupt", cpu, vector)

    @rule(
        deadline=st.none() | st.sampled_from([0.5, 2.0]),
        nudges=st.lists(st.integers(0, 6), max_size=6),
    )
    def pause(self, deadline: float | None, nudges: list[int]) -> None:
        self._do("nudge", nudges)
        self._do("pause", deadline)

    @precondition(lambda self: self._now(lambda world: any(c.waiting for c in world.cpus)))
    @rule(cpu=cpus)
    def answer(self, cpu: int) -> None:
        self._do("answer", cpu)

    @precondition(lambda self: self._now(lambda world: bool(world.quiesce_gates)))
    @rule(device=cpus)
    def quiesced(self, device: int) -> None:
        self._do("quiesced", device)

    @precondition(lambda self: self._now(lambda world: not all(p.done for p in world.pausers)))
    @rule(who=cpus)
    def leave(self, who: int) -> None:
        self._do("leave", who)

    @precondition(lambda self: self._now(lambda world: not all(p.done for p in world.pausers)))
    @rule(who=cpus)
    def cancel(self, who: int) -> None:
        self._do("cancel", who)

    @precondition(lambda self: self._now(lambda world: not all(p.done for p in world.pausers)))
    @rule(seconds=st.sampled_from([0.25, 1.0]))
    def advance(self, seconds: float) -> None:
        self._do("advance", seconds)

    @precondition(lambda self: self._now(lambda world: any(c.waiting for c in world.cpus)))
    @rule()
    def halt(self) -> None:
        self._do("halt")

    def teardown(self) -> None:
        if self.thread is not None:
            self.orders.put(None)
            self._answer()
            self._join()


class FailingMachine(Machine):
    """Devices fail as well, at once or later, at an access or when they are quiesced."""

    @rule(failure=failing)
    def fail(self, failure: Action) -> None:
        self._do(*failure)


def examined(
    code: Production,
    examples: int = EXAMPLES,
    kind: type[Machine] = Machine,
    **more: Any,
) -> list[BaseException]:
    """Run the machine on this code; gives what it found, raises what hypothesis makes of it."""
    machine = type("Machine", (kind,), {"code": code, "found": []})
    logging.disable(logging.WARNING)  # lying kernels are named in the log, by the hundred
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                **more,
            ),
        )
    except BaseException:
        if not machine.found or not more:
            raise
    finally:
        logging.disable(logging.NOTSET)
    return machine.found


def test_the_state_machine_finds_nothing() -> None:
    assert not examined(REAL)


def test_nor_where_devices_fail() -> None:
    assert not examined(REAL, kind=FailingMachine)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "examples"),
    [
        (Machine, 1_000),
        (FailingMachine, 500),
        pytest.param(Machine, 5_000, marks=pytest.mark.exhaustive),
        pytest.param(FailingMachine, 2_000, marks=pytest.mark.exhaustive),
    ],
)
def test_the_state_machine_finds_nothing_in_many_examples(
    kind: type[Machine], examples: int
) -> None:
    assert not examined(REAL, examples, kind)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Machine, "no re-entry in the loop"),
        (Machine, "lost kick: immediate_exit cleared after the look at the requests"),
        (Machine, "the first of several pauses to be left resumes"),
        pytest.param(
            Machine, "a stopped vCPU ends in the midst of its exit", marks=pytest.mark.slow
        ),
        pytest.param(Machine, "a single re-entry", marks=pytest.mark.slow),
        (Machine, "completion on another thread"),
        (Machine, "state is read before vCPUs are parked"),
        (Machine, "devices are quiesced before vCPUs are parked"),
        (Machine, "coalesced writes are looked for before vCPUs are parked"),
        (Machine, "state is read before devices are quiesced"),
        pytest.param(
            FailingMachine, "an abandoned exit counts as finished", marks=pytest.mark.slow
        ),
        (FailingMachine, "resume forgotten after a pause that failed"),
    ],
)
def test_the_state_machine_finds_planted_bugs(kind: type[Machine], name: str) -> None:
    bug = next(bug for bug in BUGS if bug.name == name)
    quick = {"derandomize": True, "database": None, "report_multiple_bugs": False}
    found = examined(bug.planted(), 2 * EXAMPLES, kind, phases=[Phase.generate], **quick)
    assert found
    assert isinstance(found[0], Broken)
