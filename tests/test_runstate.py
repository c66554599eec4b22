"""What a machine is at, and what may be done then: one table, whatever is done in what order."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.guest import EXIT, machine

import avmm
from avmm import Cause, Runstate, RunstateError
from avmm.errors import MigrationError
from avmm.migration import STANDS, Stand
from avmm.runstate import AT_END, MEANWHILE, OPERATIONS, TRANSITIONS, Life
from avmm.transfer.protocol import Commit, Destination, Offer, State
from avmm.transfer.states import DestinationState

pytestmark = [pytest.mark.usefixtures("kvm", "nothing_left")]

WATCH = "1: cmp dword ptr [0x200000], 0; je 1b; " + EXIT.format(3)
"""Runs until the host writes there, then ends with 3."""
FLAG = 0x20_0000


# -- the tables ----------------------------------------------------------------------------


def test_the_tables_are_whole_and_lead_everywhere() -> None:
    assert set(TRANSITIONS) == set(Runstate) - {Runstate.ENDED}
    reached, new = set(), {Runstate.NEW}
    while new:
        reached |= new
        new = {after for one in new for after in TRANSITIONS.get(one, ())}
        new |= {AT_END[one] for one in reached if one in AT_END}
        new -= reached
    assert reached == set(Runstate)
    assert set(STANDS) == set(Stand)
    assert set(MEANWHILE) <= set(OPERATIONS)


def test_each_thing_that_a_machine_does_is_in_the_table() -> None:
    always = {"state", "is_paused", "is_unsettled"}
    public = {name for name in vars(avmm.Machine) if not name.startswith("_")}
    assert public - always == set(OPERATIONS) - {"enter"}


def test_a_step_that_is_not_in_the_table_is_none() -> None:
    life = Life()
    for to in set(Runstate) - TRANSITIONS[Runstate.NEW]:
        with pytest.raises(RuntimeError, match=f"has not been entered cannot become {to.name}"):
            life.move(to)
        assert life.state is Runstate.NEW


def test_an_end_that_comes_at_the_same_time_from_another_thread_is_not_lost() -> None:
    """Whichever of both looks last sees the other, so the vCPUs are told."""
    for _ in range(300):
        life, stops = Life(), []
        life.move(Runstate.STARTING)
        both = threading.Barrier(2)

        def end(life: Life = life, both: threading.Barrier = both) -> None:
            both.wait()
            life.end(avmm.Outcome(Cause.EXIT, 5))

        thread = threading.Thread(target=end)
        thread.start()
        both.wait()
        life.start(lambda stops=stops: stops.append(1))
        thread.join()
        assert life.state is Runstate.ENDED
        assert stops


# -- refused by what it is -----------------------------------------------------------------


USES: dict[str, Callable[[avmm.Machine], object]] = {
    "console": lambda vm: vm.console,
    "ports": lambda vm: vm.ports,
    "vsock": lambda vm: vm.vsock,
    "balloon": lambda vm: vm.balloon,
    "nets": lambda vm: vm.nets,
    "memory": lambda vm: vm.memory.read(0, 4),
    "tsc_khz": lambda vm: vm.tsc_khz,
    "message_interrupt": lambda vm: vm.message_interrupt(0xFEE0_0000, 0x40),
    "save": lambda vm: vm.save(),
}


async def paused(vm: avmm.Machine) -> None:
    async with vm.paused(deadline=10):
        pass


async def cloned(vm: avmm.Machine) -> None:
    async with vm.clone():
        pass


DOES: dict[str, Callable[[avmm.Machine], Awaitable[object]]] = {
    "paused": paused,
    "clone": cloned,
    "snapshot": lambda vm: vm.snapshot("/nowhere/snap"),
    "migrate": lambda vm: vm.migrate(trio.testing.memory_stream_pair()[0]),
    "settle": lambda vm: vm.settle(runs_here=False),
}


async def refuses(vm: avmm.Machine, operation: str) -> RunstateError:
    before = vm.state
    with pytest.raises(RunstateError) as caught:
        if operation in USES:
            USES[operation](vm)
        elif operation == "wait":
            await vm.wait()
        elif operation == "enter":
            await vm.__aenter__()
        else:
            await DOES[operation](vm)
    error = caught.value
    assert vm.state is before
    assert (error.operation, error.actual) == (operation, before)
    assert error.needed == OPERATIONS[operation][0]
    assert str(error) == (
        f"{operation}: this machine {before.value}; expected {OPERATIONS[operation][1]}"
    )
    assert isinstance(error, avmm.AvmmError)
    return error


async def test_before_it_is_entered_nothing_can_be_done_but_stop_it(tmp_path: Path) -> None:
    vm = machine(tmp_path, WATCH)
    assert vm.state is Runstate.NEW
    for operation in (*USES, *DOES, "wait"):
        await refuses(vm, operation)
    vm.stop(6)
    async with vm:
        assert (await vm.wait()).status == 6
    assert vm.state is Runstate.LEFT


async def test_after_its_block_only_its_outcome_is_left(tmp_path: Path) -> None:
    async with machine(tmp_path, WATCH) as vm:
        assert vm.state is Runstate.RUNNING
    for operation in (*USES, *DOES, "enter"):
        await refuses(vm, operation)
    assert str(await refuses(vm, "memory")) == (
        "memory: this machine was left; expected one inside its `async with`"
    )
    assert (await vm.wait()).cause is Cause.STOPPED
    assert vm.config.memory == 4 << 20


async def test_it_is_entered_once(tmp_path: Path) -> None:
    async with machine(tmp_path, WATCH) as vm:
        await refuses(vm, "enter")
        assert vm.memory.read(FLAG, 1) == b"\0"


async def test_one_that_could_not_be_entered_says_so(tmp_path: Path) -> None:
    vm = machine(tmp_path, WATCH, disks=[str(tmp_path / "missing")])
    with pytest.raises(avmm.ConfigError):
        async with vm:
            pytest.fail("its disk is missing")
    assert vm.state is Runstate.FAILED
    for operation in ("enter", "wait", "memory", "paused"):
        await refuses(vm, operation)
    vm.stop()


async def test_while_it_is_entered_it_is_of_no_use_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm = machine(tmp_path, WATCH)
    build_it, go_on = vm._build, trio.Event()

    async def slowly() -> Any:
        await go_on.wait()
        return await build_it()

    monkeypatch.setattr(vm, "_build", slowly)

    async def live() -> None:
        async with vm:
            assert (await vm.wait()).status == 8

    async with trio.open_nursery() as nursery:
        nursery.start_soon(live)
        await trio.testing.wait_all_tasks_blocked()
        assert vm.state is Runstate.STARTING
        for operation in (*USES, *DOES, "wait", "enter"):
            await refuses(vm, operation)
        vm.stop(8)
        go_on.set()


async def test_a_guest_that_has_ended_is_copied_nowhere(tmp_path: Path) -> None:
    snap = tmp_path / "snap"
    snap.write_bytes(b"the last good one")
    async with machine(tmp_path, EXIT.format(3)) as vm:
        await vm.wait()
        assert vm.state is Runstate.ENDED
        async with vm.paused(deadline=10):
            for operation in ("save", "clone", "snapshot", "migrate", "settle"):
                await refuses(vm, operation)
        error = await refuses(vm, "snapshot")
        assert str(error) == "snapshot: this machine has ended; expected one that runs"
        with pytest.raises(RunstateError):
            await vm.snapshot(snap)
        assert vm.memory.read(0x10_0000, 1)  # which can still be looked at
    assert snap.read_bytes() == b"the last good one"


async def test_a_machine_that_runs_is_not_saved_outside_of_a_pause(tmp_path: Path) -> None:
    async with machine(tmp_path, WATCH) as vm:
        with pytest.raises(RunstateError, match=r"save it inside `vm.paused\(\)`") as caught:
            vm.save()
        assert (caught.value.actual, caught.value.needed) == (Stand.RUNS, {Stand.STILL})


# -- a guest that ends meanwhile -----------------------------------------------------------


async def ended(vm: avmm.Machine) -> None:
    """By itself."""
    vm.memory.write(FLAG, b"\1")
    assert (await vm.wait()).status == 3


@pytest.mark.parametrize("how", ["exit", "stop"])
async def test_a_guest_that_ends_while_ram_is_copied_leaves_the_last_good_file(
    tmp_path: Path, how: str
) -> None:
    folder = tmp_path / "snaps"
    folder.mkdir()
    async with machine(tmp_path, WATCH) as vm:
        await vm.snapshot(folder / "snap")
        good = (folder / "snap").read_bytes()

        def end(progress: object) -> None:
            if how == "exit":
                vm.memory.write(FLAG, b"\1")
            else:
                vm.stop(3)
            while vm.state is not Runstate.ENDED:
                time.sleep(0.001)

        with pytest.raises(RunstateError, match=r"^snapshot: this machine has ended; "):
            await vm.snapshot(folder / "snap", on_progress=end)
        assert (await vm.wait()).status == 3
        assert vm.state is Runstate.ENDED
    assert [path.name for path in folder.iterdir()] == ["snap"]
    assert (folder / "snap").read_bytes() == good


class Standing(avmm.Device):
    """Is asked to quiesce, which takes until it may."""

    def __init__(self) -> None:
        self.asked, self.may = trio.Event(), trio.Event()

    async def run(self) -> None:
        await trio.sleep_forever()

    async def quiesce(self) -> None:
        self.asked.set()
        await self.may.wait()

    def save(self) -> dict[str, Any]:
        raise AssertionError("nothing is saved of a guest that has ended")


@pytest.mark.parametrize("operation", ["clone", "snapshot", "migrate"])
async def test_a_guest_that_ends_on_the_way_to_the_standstill_is_not_copied(
    tmp_path: Path, operation: str
) -> None:
    device = Standing()
    async with (
        machine(tmp_path, WATCH, devices=[avmm.pio(device, 0x300, 1)]) as vm,
        trio.open_nursery() as nursery,
    ):
        here, there = trio.testing.memory_stream_pair()
        peer = Peer(there)
        if operation == "migrate":
            nursery.start_soon(peer.run)
        done: dict[str, Callable[[], Awaitable[object]]] = {
            "clone": partial(cloned, vm),
            "snapshot": partial(vm.snapshot, tmp_path / "snap"),
            "migrate": partial(vm.migrate, here),
        }

        async def refused() -> None:
            with pytest.raises(RunstateError, match=f"^{operation}: this machine has ended; "):
                await done[operation]()
            await here.aclose()

        nursery.start_soon(refused)
        await device.asked.wait()
        vm.stop(4)
        device.may.set()
        assert (await vm.wait()).status == 4
    assert not (tmp_path / "snap").exists()


# -- a hand-over ---------------------------------------------------------------------------


class Peer:
    """A destination without a guest. Stands still at `stop_at`, "offer", "ready" or "commit",
    until it is told how it goes on: "answer", "abort" or "cut"."""

    def __init__(self, stream: trio.abc.Stream, stop_at: str = "") -> None:
        self._stream = stream
        self._side = Destination()
        self._stop_at = stop_at
        self.reached, self._told = trio.Event(), trio.Event()
        self._how = ""

    def go_on(self, how: str) -> None:
        self._how = how
        self._told.set()

    async def run(self) -> None:
        with suppress(MigrationError, trio.BrokenResourceError):
            await self._talk()
        await self._stream.aclose()
        self.reached.set()

    async def _talk(self) -> None:
        side = self._side
        while True:
            taken = side.next()
            if taken is None:
                data = await self._stream.receive_some()
                if side.state is DestinationState.READY and not await self._hold("commit"):
                    return
                if not data:
                    return
                side.feed(data)
                continue
            event, answer = taken
            if isinstance(event, Offer):
                if not await self._hold("offer"):
                    return
                answer = side.accept()
            elif isinstance(event, State):
                side.acquire()
                if not await self._hold("ready"):
                    return
                answer = side.ready()
            elif isinstance(event, Commit):
                answer = side.running()
            if answer:
                await self._say(answer)
            if isinstance(event, Commit):
                return

    async def _hold(self, stage: str) -> bool:
        """May it go on?"""
        if stage != self._stop_at:
            return True
        self.reached.set()
        await self._told.wait()
        if self._how == "abort":
            self._side.give_up()
            if self._side.state is DestinationState.LETTING_GO:
                self._side.let_go()
            await self._say(self._side.abort("no"))
        return self._how == "answer"

    async def _say(self, buffers: list[Any]) -> None:
        await self._stream.send_all(b"".join(buffers))


@pytest.mark.parametrize(
    ("how", "state", "cause"),
    [
        ("answer", Runstate.MOVED, Cause.MOVED),
        ("abort", Runstate.ENDED, Cause.STOPPED),
        ("cut", Runstate.ENDED, Cause.STOPPED),
    ],
)
async def test_a_stop_while_it_is_handed_over_is_kept_until_that_is_decided(
    tmp_path: Path, how: str, state: Runstate, cause: Cause
) -> None:
    here, there = trio.testing.memory_stream_pair()
    peer = Peer(there, "commit")
    async with machine(tmp_path, WATCH) as vm, trio.open_nursery() as nursery:

        async def migrate() -> None:
            with suppress(MigrationError):
                await vm.migrate(here)

        nursery.start_soon(peer.run)
        nursery.start_soon(migrate)
        await peer.reached.wait()
        assert vm.state is Runstate.HANDING_OVER
        vm.stop(9)
        await trio.testing.wait_all_tasks_blocked()
        assert vm.state is Runstate.HANDING_OVER
        for operation in ("save", "clone", "snapshot", "migrate", "settle"):
            await refuses(vm, operation)
        peer.go_on(how)
        outcome = await vm.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert (vm.state, outcome.cause) == (state, cause)


@pytest.mark.parametrize("stage", ["offer", "ready"])
async def test_a_migration_of_a_machine_that_is_left_is_given_up(
    tmp_path: Path, stage: str
) -> None:
    here, there = trio.testing.memory_stream_pair()
    peer = Peer(there, stage)
    async with trio.open_nursery() as nursery:
        async with machine(tmp_path, WATCH) as vm:

            async def migrate() -> None:
                with pytest.raises(RunstateError, match=r"^migrate: this machine was left; "):
                    await vm.migrate(here)

            nursery.start_soon(peer.run)
            nursery.start_soon(migrate)
            await peer.reached.wait()
        assert vm.state is Runstate.LEFT
        peer.go_on("cut")


async def test_leaving_a_machine_waits_for_its_hand_over(tmp_path: Path) -> None:
    """It is not there and here at the same time, nor nowhere: who is asked to run it answers."""
    here, there = trio.testing.memory_stream_pair()
    peer = Peer(there, "commit")
    reports = []
    async with trio.open_nursery() as nursery:
        async with machine(tmp_path, WATCH) as vm:

            async def migrate() -> None:
                reports.append(await vm.migrate(here))

            async def answer() -> None:
                await trio.testing.wait_all_tasks_blocked(0.1)
                assert vm.state is Runstate.HANDING_OVER
                peer.go_on("answer")

            nursery.start_soon(peer.run)
            nursery.start_soon(migrate)
            await peer.reached.wait()
            nursery.start_soon(answer)
        assert (await vm.wait()).cause is Cause.MOVED
    assert len(reports) == 1


async def test_a_snapshot_of_a_machine_that_is_left_is_given_up(tmp_path: Path) -> None:
    begun = trio.Event()
    async with trio.open_nursery() as nursery, machine(tmp_path, WATCH, memory="64M") as vm:

        async def snapshot() -> None:
            with pytest.raises(RunstateError, match=r"^snapshot: this machine was left; "):
                await vm.snapshot(tmp_path / "snap", on_progress=lambda progress: begun.set())

        nursery.start_soon(snapshot)
        await begun.wait()
    assert not (tmp_path / "snap").exists()


# -- a machine out of a file ---------------------------------------------------------------


async def test_a_restored_machine_opens_its_file_when_it_is_entered(tmp_path: Path) -> None:
    snap = tmp_path / "snap"
    vm = avmm.restore(snap)
    assert vm.state is Runstate.NEW
    with pytest.raises(RunstateError, match=r"^config: this machine has not been entered; "):
        _ = vm.config
    async with machine(tmp_path, WATCH) as origin:
        await origin.snapshot(snap)
    async with vm:
        assert vm.config.memory == 4 << 20
        await ended(vm)
    assert vm.config.memory == 4 << 20
    gone = avmm.restore(tmp_path / "nowhere", verify=True)
    with pytest.raises(avmm.SnapshotError, match="nowhere: No such file"):
        async with gone:
            pytest.fail("there is no such file")
    assert gone.state is Runstate.FAILED


async def test_reading_a_long_file_blocks_nobody_and_can_be_cancelled(tmp_path: Path) -> None:
    snap = tmp_path / "snap"
    async with machine(tmp_path, WATCH, memory="256M") as vm:
        vm.memory.write(0x100_0000, b"x" * (192 << 20))
        await vm.snapshot(snap)
    ticks = [0]

    async def tick() -> None:
        while True:
            ticks[0] += 1
            await trio.sleep(0.001)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tick)
        start = trio.current_time()
        async with avmm.restore(snap, verify=True) as vm:
            took = trio.current_time() - start
        assert ticks[0] > 5
        with trio.move_on_after(took / 10) as scope:
            start = trio.current_time()
            async with avmm.restore(snap, verify=True):
                pytest.fail("it was to be given up before that")
        assert scope.cancelled_caught
        nursery.cancel_scope.cancel()


# -- at random -----------------------------------------------------------------------------


class Lives(RuleBasedStateMachine):
    """One machine, and all that its user does to it, in any order.

    Its user's task runs in a loop of trio's in a thread of its own, for the rules are no
    coroutines; `do` has it run one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory()
        self.orders: trio.MemorySendChannel[Any]
        self.answers: queue.Queue[BaseException | None] = queue.Queue()
        ready = threading.Event()
        self.thread = threading.Thread(target=trio.run, args=(self._main, ready), daemon=True)
        self.thread.start()
        assert ready.wait(20)
        self.vm = machine(Path(self.folder.name), WATCH)
        self.base = Runstate.NEW
        self.has_outcome = False
        self.pauses: list[Any] = []
        self.migration: tuple[Peer, trio.Event] | None = None

    async def _main(self, ready: threading.Event) -> None:
        self.token = trio.lowlevel.current_trio_token()
        self.orders, orders = trio.open_memory_channel[Any](10)
        async with trio.open_nursery() as self.nursery, orders:
            ready.set()
            async for order in orders:
                try:
                    await order()
                except BaseException as error:
                    self.answers.put(error)
                else:
                    self.answers.put(None)

    def do(self, order: Callable[[], Awaitable[object]]) -> None:
        trio.from_thread.run_sync(self.orders.send_nowait, order, trio_token=self.token)
        error = self.answers.get(timeout=30)
        if error is not None:
            raise error

    @property
    def expected(self) -> Runstate:
        return AT_END.get(self.base, self.base) if self.has_outcome else self.base

    @invariant()
    def it_is_what_it_should_be(self) -> None:
        assert self.vm.state is self.expected
        assert self.vm.is_unsettled == (self.expected is Runstate.UNSETTLED)
        if self.expected is Runstate.RUNNING:
            assert self.vm.is_paused == bool(self.pauses)

    @contextmanager
    def allowed(self, operation: str) -> Iterator[None]:
        """Done, or refused: as the table says."""
        states, _ = OPERATIONS[operation]
        is_allowed, before = self.expected in states, self.expected
        try:
            yield
        except RunstateError as error:
            assert not is_allowed, f"{operation} was refused: {error}"
            assert (error.operation, error.actual) == (operation, before)
        else:
            assert is_allowed, f"{operation} was not refused, of one that {before.value}"

    # -- rules --

    @rule()
    def enter(self) -> None:
        with self.allowed("enter"):
            self.do(self.vm.__aenter__)
            self.base = Runstate.RUNNING

    @precondition(lambda self: self.vm.state in OPERATIONS["memory"][0])
    @rule()
    def leave(self) -> None:
        async def leave() -> None:
            if self.base is Runstate.HANDING_OVER and self.migration is not None:
                self.migration[0].go_on("cut")  # or it is waited for
            for pause in self.pauses:
                await pause.__aexit__(None, None, None)
            await self.vm.__aexit__(None, None, None)
            if self.migration is not None:
                self.migration[0].go_on("cut")
                await self.migration[1].wait()

        self.do(leave)
        self.pauses, self.migration, self.base, self.has_outcome = [], None, Runstate.LEFT, True

    @rule(operation=st.sampled_from([name for name in USES if name not in ("vsock", "balloon")]))
    def use(self, operation: str) -> None:
        async def use() -> None:
            USES[operation](self.vm)

        if operation == "save" and self.expected is Runstate.RUNNING and not self.pauses:
            with pytest.raises(RunstateError, match="expected one that stands still"):
                self.do(use)
            return
        with self.allowed(operation):
            self.do(use)

    @rule()
    def pause(self) -> None:
        with self.allowed("paused"):
            pause = self.vm.paused(deadline=10)
            self.do(pause.__aenter__)
            self.pauses.append(pause)

    @precondition(lambda self: self.pauses)
    @rule()
    def run_on(self) -> None:
        pause = self.pauses.pop()
        self.do(lambda: pause.__aexit__(None, None, None))

    @rule()
    def snapshot(self) -> None:
        path = Path(self.folder.name, "snap")
        path.unlink(missing_ok=True)
        try:
            with self.allowed("snapshot"):
                self.do(partial(self.vm.snapshot, path))
        finally:
            assert path.exists() == (self.expected is Runstate.RUNNING)

    @rule()
    def clone(self) -> None:
        async def clone() -> None:
            async with self.vm.clone() as twin:
                assert twin.state is Runstate.RUNNING
            assert twin.state is Runstate.LEFT

        with self.allowed("clone"):
            self.do(clone)

    @rule()
    def wait(self) -> None:
        async def wait() -> None:
            is_over = self.expected in (Runstate.ENDED, Runstate.MOVED, Runstate.LEFT)
            with trio.move_on_after(10 if is_over else 0) as scope:
                await self.vm.wait()
            if is_over:
                assert not scope.cancelled_caught
            else:
                assert scope.cancelled_caught

        with self.allowed("wait"):
            self.do(wait)

    @rule()
    def stop(self) -> None:
        self.vm.stop()
        self.has_outcome = True

    @precondition(lambda self: self.expected is Runstate.RUNNING and not self.pauses)
    @rule()
    def the_guest_ends(self) -> None:
        self.do(lambda: ended(self.vm))
        self.has_outcome = True

    @precondition(lambda self: self.migration is None)
    @rule(stage=st.sampled_from(["offer", "ready", "commit"]))
    def migrate(self, stage: str) -> None:
        here, there = trio.testing.memory_stream_pair()
        peer, over = Peer(there, stage), trio.Event()

        async def migrate() -> None:
            try:
                with suppress(MigrationError, RunstateError):
                    await self.vm.migrate(here)
            finally:
                over.set()

        async def begin() -> None:
            self.nursery.start_soon(peer.run)
            self.nursery.start_soon(migrate)
            await peer.reached.wait()

        if self.expected is not Runstate.RUNNING:
            with self.allowed("migrate"):
                self.do(lambda: self.vm.migrate(here))
            return
        self.do(begin)
        self.migration = (peer, over)
        self.base = Runstate.HANDING_OVER if stage == "commit" else Runstate.MIGRATING

    @precondition(lambda self: self.migration is not None)
    @rule(how=st.sampled_from(["answer", "abort", "cut"]))
    def decide(self, how: str) -> None:
        assert self.migration is not None
        (peer, over), self.migration = self.migration, None

        async def decide() -> None:
            peer.go_on(how)
            await over.wait()

        self.do(decide)
        is_late = self.base is Runstate.HANDING_OVER
        if how == "answer" and (is_late or not self.has_outcome):
            self.base, self.has_outcome = Runstate.MOVED, True
        elif how == "cut" and is_late:
            self.base = Runstate.UNSETTLED
        else:
            self.base = Runstate.RUNNING

    @rule(here=st.booleans())
    def settle(self, here: bool) -> None:
        with self.allowed("settle"):
            self.do(partial(self.vm.settle, runs_here=here))
            self.base = Runstate.RUNNING if here else Runstate.MOVED
            self.has_outcome |= not here

    def teardown(self) -> None:
        if self.vm.state in OPERATIONS["memory"][0]:
            self.leave()
        trio.from_thread.run_sync(self.orders.close, trio_token=self.token)
        self.thread.join(30)
        assert not self.thread.is_alive()
        self.folder.cleanup()


@pytest.mark.timeout(300)
def test_whatever_is_done_in_whatever_order_is_in_the_table() -> None:
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_is_done_many_times() -> None:
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=1500,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
