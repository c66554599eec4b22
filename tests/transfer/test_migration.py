"""Migration within one process: who runs, when it is cancelled, and what is told."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.guest import EXIT, machine

import avmm
from avmm.disks import RawDisk
from avmm.errors import (
    AvmmError,
    ConfigError,
    HandOverUnknownError,
    MigrationError,
    PauseTimeout,
    RunstateError,
)
from avmm.migration import Coordinator

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kvm", "nothing_left"),
]


async def answers(vm: avmm.Machine) -> None:
    """It runs: it says what it is asked for."""
    await vm.console.send_all(b"echo it is $\r")
    said = b""
    with trio.fail_after(10):
        while not said.endswith(b"\r\nit is $\r\navmm> "):
            said += await vm.console.receive_some()


async def stands_still(vm: avmm.Machine) -> None:
    """It does not: nothing is even taken by its console."""
    with trio.move_on_after(0.05):
        await vm.console.send_all(b"echo\r")
        pytest.fail("the console has taken something")


class Destination:
    """The other side, in a task; `vm` once the guest is there."""

    def __init__(self, nursery: trio.Nursery, stream: trio.abc.Stream, **settings: Any) -> None:
        self._stream = stream
        self._settings = settings
        self.vm: avmm.Machine | None = None
        self.error: Exception | None = None
        self.arrived, self.ended, self._go_on = trio.Event(), trio.Event(), trio.Event()
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            async with avmm.receive(self._stream, **self._settings) as self.vm:
                self.arrived.set()
                await self._go_on.wait()
        except AvmmError as error:
            self.error = error
        finally:
            self.arrived.set()
            self.ended.set()

    async def leave(self) -> None:
        self._go_on.set()
        await self.ended.wait()


Pair = tuple[trio.abc.Stream, trio.abc.Stream]


@pytest.fixture
def pair() -> Pair:
    return trio.testing.memory_stream_pair()


async def test_the_guest_goes_on_at_the_other_side(pair: Pair) -> None:
    async with avmm.Machine(memory="16M") as vm, trio.open_nursery() as nursery:
        await answers(vm)
        there = Destination(nursery, pair[1])
        report = await vm.migrate(pair[0])
        assert 0 < report.downtime < report.total
        assert (await vm.wait()).cause is avmm.Cause.MOVED
        assert await vm.console.receive_some() == b""
        await there.arrived.wait()
        assert there.vm is not None
        await answers(there.vm)
        with pytest.raises(trio.BrokenResourceError):
            await vm.console.send_all(b"x")
        with pytest.raises(AvmmError, match="handed over"):
            async with vm.clone():
                pytest.fail("a second one of a guest that is not here")
        await there.leave()


async def test_output_that_nobody_has_received_is_received_there_only(pair: Pair) -> None:
    """And what is typed meanwhile reaches the guest as far as it was accepted, and no further."""
    async with (
        avmm.Machine(memory="16M", devices=[avmm.virtio(avmm.Console())]) as vm,
        trio.open_nursery() as nursery,
    ):
        await vm.console.send_all(b"echo one\r")
        said = b""
        while b"one\r\none\r\n" not in said:
            said += await vm.console.receive_some()
        await vm.console.send_all(b"echo two\rexit 0")
        there = Destination(nursery, pair[1], devices=[avmm.virtio(avmm.Console())])
        typed = vm.ports["hvc0"]
        late: list[bytes] = []

        async def type_on() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await typed.send_all(b"x" * 100_000)

        async def read() -> None:
            late.extend([bytes(data) async for data in vm.console])

        async with trio.open_nursery() as users:
            users.start_soon(type_on)

            def at_commit(did: str, data: bytes) -> bool:
                if did == "sent" and data[:1] == bytes([COMMIT]):
                    users.start_soon(read)
                return False

            await vm.migrate(Strange(pair[0], at_commit, None))
        await there.arrived.wait()
        assert there.vm is not None
        assert len(there.vm.ports["hvc0"].input) == typed.accepted
        await there.vm.console.send_all(b"\r")
        await there.vm.wait()
        assert late == []
        said += b"".join([bytes(data) async for data in there.vm.console])
        assert said.count(b"two\r\ntwo\r\n") == 1
        assert said.endswith(b"avmm> echo two\r\ntwo\r\navmm> exit 0\r\n")
        await there.leave()


PAGES = 2048
DIRTYING = f"""
    1: inc rax; mov rbx, rax; and rbx, {PAGES - 1}; shl rbx, 12
    mov [rbx + 0x200000], rax
    mov ecx, {{}}; 2: dec ecx; jnz 2b; jmp 1b
"""
"""Page after page gets the next number; so slowly that not all of them have a new one soon."""


@pytest.fixture
def busy_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes its time before a pause and after it, in which a guest that runs writes."""
    paused, release = Coordinator.paused, Coordinator._release

    def late_paused(self: Coordinator, deadline: float | None = None) -> Any:
        time.sleep(0.01)
        return paused(self, deadline)

    async def late_release(self: Coordinator) -> None:
        await release(self)
        time.sleep(0.01)  # noqa: ASYNC251 - other tasks of the program do not help

    monkeypatch.setattr(Coordinator, "paused", late_paused)
    monkeypatch.setattr(Coordinator, "_release", late_release)


def numbers(vm: avmm.Machine) -> list[int]:
    return [
        int.from_bytes(vm.memory.read(0x20_0000 + 4096 * page, 8), "little")
        for page in range(PAGES)
    ]


@pytest.mark.usefixtures("busy_host")
async def test_no_page_is_missed_and_the_source_writes_none_after_commit(
    pair: Pair, tmp_path: Path
) -> None:
    async with (
        machine(tmp_path, DIRTYING.format(60), memory="16M") as vm,
        trio.open_nursery() as nursery,
    ):
        at_commit: list[list[int]] = []

        def note(did: str, data: bytes) -> bool:
            if did == "sent" and data[:1] == bytes([COMMIT]):
                at_commit.append(numbers(vm))
            return False

        while min(numbers(vm)) == 0:
            await trio.lowlevel.checkpoint()
        there = Destination(nursery, pair[1])
        await vm.migrate(Strange(pair[0], note, None))
        await vm.wait()
        assert [numbers(vm)] == at_commit
        await there.arrived.wait()
        assert there.vm is not None
        while min(numbers(there.vm)) <= min(at_commit[0]):
            await trio.lowlevel.checkpoint()
        async with there.vm.paused(deadline=10):
            found = sorted(numbers(there.vm))
        assert found == list(range(found[-1] - PAGES + 1, found[-1] + 1))
        await there.leave()


@pytest.mark.usefixtures("busy_host")
async def test_a_snapshot_misses_no_page(tmp_path: Path) -> None:
    async with machine(tmp_path, DIRTYING.format(400), memory="16M") as vm:
        while min(numbers(vm)) == 0:
            await trio.lowlevel.checkpoint()
        await vm.snapshot(tmp_path / "snap")
    async with avmm.restore(tmp_path / "snap", verify=True) as twin:
        before = max(numbers(twin))
        while max(numbers(twin)) <= before + 3:
            await trio.lowlevel.checkpoint()
        async with twin.paused(deadline=10):
            found = sorted(numbers(twin))
    assert found == list(range(found[-1] - PAGES + 1, found[-1] + 1))


# -- cancelling ----------------------------------------------------------------------------


class Countdown(trio.abc.Instrument):
    """Cancels a scope at the n-th time that its task is scheduled."""

    def __init__(self, scope: trio.CancelScope, task: trio.lowlevel.Task, number: int) -> None:
        self._scope, self._task, self._left = scope, task, number
        self.is_over = False

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self.is_over = True
                self._scope.cancel()


@contextlib.asynccontextmanager
async def cancelled_at(number: int) -> AsyncIterator[Countdown]:
    """The block is cancelled at its n-th checkpoint, if there are as many."""
    with trio.CancelScope() as scope:
        countdown = Countdown(scope, trio.lowlevel.current_task(), number)
        trio.lowlevel.add_instrument(countdown)
        try:
            yield countdown
        finally:
            trio.lowlevel.remove_instrument(countdown)


async def test_cancelling_the_source_at_each_checkpoint(tmp_path: Path) -> None:
    """Until COMMIT it runs on, with its disk; from then on it has gone."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    settings: dict[str, Any] = {"memory": "8M", "disks": [str(disk)]}
    number, cancelled = 0, 0
    vm = avmm.Machine(**settings)
    has_moved = False
    async with vm:
        await answers(vm)
        while not has_moved:
            number += 1
            near, far = trio.testing.memory_stream_pair()
            async with trio.open_nursery() as nursery:
                there = Destination(nursery, far, disks=[str(disk)])
                async with cancelled_at(number) as countdown:
                    with contextlib.suppress(HandOverUnknownError):
                        await vm.migrate(near, answer_seconds=5)
                        has_moved = True
                await trio.aclose_forcefully(near)
                await there.arrived.wait()
                if has_moved:
                    assert (await vm.wait()).cause is avmm.Cause.MOVED
                    assert there.vm is not None
                    await answers(there.vm)
                else:
                    assert countdown.is_over
                    cancelled += 1
                    assert there.vm is None, "it runs on both sides"
                    assert isinstance(there.error, MigrationError)
                    await answers(vm)
                with pytest.raises(ConfigError, match="in use"):
                    RawDisk(disk)
                await there.leave()
    assert cancelled > 20


class Slow(avmm.Device):
    """Quiesces and resumes in several steps."""

    async def run(self) -> None:
        await trio.sleep_forever()

    async def quiesce(self) -> None:
        for _ in range(3):
            await trio.lowlevel.checkpoint()

    resume = quiesce

    def save(self) -> dict[str, Any]:
        return {}

    def load(self, state: Any) -> None:
        assert state == {}


async def test_cancelling_a_clone_at_each_checkpoint() -> None:
    """The machine runs on, and can be cloned as before; of the twin nothing is left."""
    outcomes = []
    async with avmm.Machine(memory="8M", devices=[avmm.pio(Slow(), 0x5000, 1)]) as vm:
        await answers(vm)
        while "there" not in outcomes:
            is_there = False
            number = len(outcomes) + 1
            async with cancelled_at(number), vm.clone(devices=[avmm.pio(Slow(), 0x5000, 1)]):
                is_there = True  # cancelled from here on it ends, as any machine
            outcomes.append("there" if is_there else "not there")
            await answers(vm)
    assert outcomes.count("not there") >= 3


async def test_cancelling_the_destination_at_each_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    number = 0
    async with avmm.Machine(memory="8M", disks=[str(disk)]) as vm:
        await answers(vm)
        outcomes = []
        while "moved" not in outcomes:
            number += 1
            near, far = trio.testing.memory_stream_pair()
            arrived = False
            async with trio.open_nursery() as nursery:

                async def source(stream: trio.abc.Stream = near) -> None:
                    try:
                        await vm.migrate(stream, stall_seconds=5, answer_seconds=5)
                        outcomes.append("moved")
                    except HandOverUnknownError:
                        outcomes.append("unknown")
                    except MigrationError:
                        outcomes.append("failed")

                nursery.start_soon(source)
                async with cancelled_at(number), avmm.receive(far, disks=[str(disk)]):
                    arrived = True  # cancelled from here on it ends there, as any machine
                await trio.aclose_forcefully(far)
            assert arrived == (outcomes[-1] == "moved"), outcomes
            if not arrived:
                if outcomes[-1] == "unknown":
                    await vm.settle(runs_here=True)
                await answers(vm)
        assert outcomes.count("failed") > 10


# -- a slow line ---------------------------------------------------------------------------


class Thin(trio.abc.SendStream):
    """Takes 256 KiB in so many seconds, without a sign of it before all has gone."""

    def __init__(self, stream: trio.abc.SendStream, seconds: float) -> None:
        self._stream, self._seconds = stream, seconds

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep(len(data) / (256 << 10) * self._seconds)
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


@pytest.mark.parametrize(("seconds", "is_dead"), [(0.5, False), (4, True)])
async def test_a_slow_line_is_no_dead_one(pair: Pair, seconds: float, is_dead: bool) -> None:
    here = trio.StapledStream(Thin(pair[0].send_stream, seconds), pair[0].receive_stream)
    async with avmm.Machine(memory="16M") as vm, trio.open_nursery() as nursery:
        await answers(vm)
        vm.memory.write(12 << 20, os.urandom(1 << 20))  # one frame of it
        there = Destination(nursery, pair[1])
        if is_dead:
            with pytest.raises(MigrationError, match=r"the line took less than 256 KiB in 1\.5 s"):
                await vm.migrate(here, stall_seconds=1.5)
            await answers(vm)
        else:
            await vm.migrate(here, stall_seconds=1.5)
        await trio.aclose_forcefully(here)
        await there.arrived.wait()
        assert (there.vm is None) == is_dead
        await there.leave()


async def test_a_narrow_line_is_no_dead_one(pair: Pair) -> None:
    """A frame of 256 pages would take five seconds, in which nothing comes."""
    async with avmm.Machine(memory="16M") as vm, trio.open_nursery() as nursery:
        await answers(vm)
        vm.memory.write(12 << 20, os.urandom(1 << 20))
        there = Destination(nursery, pair[1], stall_seconds=2.5)
        await vm.migrate(pair[0], bandwidth=200_000, target_downtime=10)
        await there.arrived.wait()
        assert there.vm is not None
        await answers(there.vm)
        await there.leave()


class Late(avmm.Device):
    """Takes its time at the standstill: `quiesce` or `release` or a `save` in a thread."""

    def __init__(self, what: str) -> None:
        self._what = what

    async def _take(self, what: str) -> None:
        if what == self._what:
            await trio.sleep(2.5)

    async def quiesce(self) -> None:
        await self._take("quiesce")

    async def release(self) -> None:
        await self._take("release")

    @property
    def saves_in_thread(self) -> bool:
        return self._what == "save"

    def save(self) -> dict[str, object]:
        if self._what == "save":
            time.sleep(2.5)
        return {"version": 1}

    def load(self, state: Mapping[str, object]) -> None:
        pass


@pytest.mark.parametrize("what", ["quiesce", "release", "save"])
async def test_a_device_that_takes_longer_than_the_receiver_waits(
    pair: Pair, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avmm.transfer.source._LIFE_SECONDS", 0.2)
    devices = [avmm.pio(Late(what), 0x300, 1)]
    async with (
        avmm.Machine(memory="16M", devices=devices) as vm,
        trio.open_nursery() as nursery,
    ):
        await answers(vm)
        here = [avmm.pio(Late(""), 0x300, 1)]
        there = Destination(nursery, pair[1], devices=here, stall_seconds=1.2)
        await vm.migrate(pair[0])
        await there.arrived.wait()
        assert there.vm is not None
        await answers(there.vm)
        await there.leave()


@pytest.mark.parametrize("error", [trio.BrokenResourceError("cut"), OSError(5, "mine")], ids=repr)
async def test_a_line_that_fails_while_a_device_takes_its_time(
    pair: Pair, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the stream raises, the guest runs on here."""
    monkeypatch.setattr("avmm.transfer.source._LIFE_SECONDS", 0.1)
    devices = [avmm.pio(Late("quiesce"), 0x300, 1)]

    def sign_of_life(did: str, data: bytes) -> bool:
        return did == "sent" and data[:1] == bytes([PAGES]) and len(data) == 28

    async with (
        avmm.Machine(memory="16M", devices=devices) as vm,
        trio.open_nursery() as nursery,
    ):
        await answers(vm)
        there = Destination(nursery, pair[1], devices=[avmm.pio(Late(""), 0x300, 1)])
        with pytest.raises((MigrationError, OSError), match=r"cut|mine"):
            await vm.migrate(Strange(pair[0], sign_of_life, error))
        await answers(vm)
        await trio.aclose_forcefully(pair[0])
        await there.ended.wait()


async def test_a_device_that_cannot_be_taken_back_for_a_reason_of_its_own(pair: Pair) -> None:
    """The guest stays stopped, and its user is told so, whatever was raised."""

    class Broken(Late):
        async def acquire(self) -> None:
            if self._what == "acquire":
                raise LookupError("my index is gone")

    def cut(did: str, data: bytes) -> bool:
        return did == "sent" and data[:1] == bytes([STATE_END])

    devices = [avmm.pio(Broken("acquire"), 0x300, 1)]
    async with (
        avmm.Machine(memory="16M", devices=devices) as vm,
        trio.open_nursery() as nursery,
    ):
        await answers(vm)
        there = Destination(nursery, pair[1], devices=[avmm.pio(Broken(""), 0x300, 1)])
        with pytest.raises(avmm.HandOverUnknownError, match="my index is gone") as caught:
            await vm.migrate(Strange(pair[0], cut, trio.BrokenResourceError("cut")))
        assert isinstance(caught.value.__cause__, LookupError)
        assert vm.is_unsettled
        await vm.settle(runs_here=False)
        await trio.aclose_forcefully(pair[0])
        await there.ended.wait()


# -- streams that keep no contract ---------------------------------------------------------


class Strange(trio.abc.Stream):
    """One whose n-th call of a kind raises what no stream should raise."""

    def __init__(
        self, stream: trio.abc.Stream, at: Callable[[str, bytes], bool], error: Any
    ) -> None:
        self._stream, self._at, self._error = stream, at, error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)
        if self._at("sent", bytes(data)):
            raise self._error

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        if self._at("received", bytes(data)):
            raise self._error
        return data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await self._stream.aclose()


COMMIT, RUNNING = 10, 11
PAGES, STATE_END = 5, 8


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "gone"), RuntimeError("odd"), KeyboardInterrupt()]
)
@pytest.mark.parametrize(("what", "kind"), [("sent", COMMIT), ("received", RUNNING)])
async def test_whatever_comes_after_commit_the_source_does_not_run(
    pair: Pair, what: str, kind: int, error: BaseException
) -> None:
    stream = Strange(pair[0], lambda did, data: did == what and data[:1] == bytes([kind]), error)
    async with avmm.Machine(memory="8M") as vm, trio.open_nursery() as nursery:
        await answers(vm)
        there = Destination(nursery, pair[1])
        with pytest.raises(BaseException) as caught:
            await vm.migrate(stream, answer_seconds=2)
        wanted = HandOverUnknownError if isinstance(error, Exception) else KeyboardInterrupt
        assert caught.type is wanted
        await there.arrived.wait()
        assert there.vm is not None
        await answers(there.vm)
        await stands_still(vm)
        with pytest.raises(AvmmError, match="handed over"):
            async with vm.clone():
                pytest.fail("a second one of a guest that may run elsewhere")
        await vm.settle(runs_here=False)
        assert (await vm.wait()).cause is avmm.Cause.MOVED
        await there.leave()


class Deaf(trio.abc.SendStream):
    """Fails at COMMIT, of which nothing leaves."""

    def __init__(self, stream: trio.abc.SendStream) -> None:
        self._stream = stream

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if bytes(data[:1]) == bytes([COMMIT]):
            raise OSError(errno.EIO, "gone")
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


class Slowly(Slow):
    """Takes hold only when it may."""

    def __init__(self) -> None:
        self.may = trio.Event()
        self.holds = 0

    async def acquire(self) -> None:
        await self.may.wait()
        self.holds += 1

    async def release(self) -> None:
        self.holds = 0


async def test_settled_once(pair: Pair, tmp_path: Path) -> None:
    """Who decides at the same time is told; a cancelled decision is none."""
    device, there = Slowly(), Slowly()
    there.may.set()
    line = trio.StapledStream(Deaf(pair[0].send_stream), pair[0].receive_stream)
    async with (
        avmm.Machine(memory="8M", devices=[avmm.pio(device, 0x5000, 1)]) as vm,
        trio.open_nursery() as nursery,
    ):
        await answers(vm)
        destination = Destination(nursery, pair[1], devices=[avmm.pio(there, 0x5000, 1)])
        with pytest.raises(HandOverUnknownError):
            await vm.migrate(line, answer_seconds=1)
        with pytest.raises(AvmmError, match="settle"):
            await vm.snapshot(tmp_path / "snap")
        await trio.aclose_forcefully(line)
        await destination.ended.wait()
        assert there.holds == 0, "it was released before the source was told"
        with trio.move_on_after(0) as scope:
            await vm.settle(runs_here=True)
        assert scope.cancelled_caught
        async with trio.open_nursery() as deciders:
            deciders.start_soon(partial(vm.settle, runs_here=True))
            await trio.testing.wait_all_tasks_blocked()
            for runs_here in (True, False):
                with pytest.raises(RunstateError, match=r"^settle: .* is being settled; "):
                    await vm.settle(runs_here=runs_here)
            device.may.set()
        assert device.holds == 1
        await answers(vm)
        async with vm.paused():
            pass
        await answers(vm)


async def test_a_clone_has_addresses_of_its_own(tmp_path: Path) -> None:
    net, cid = f"listen={tmp_path / 'net'}", f"cid=7,unix={tmp_path / 'vsock'}"
    theirs, there = f"listen={tmp_path / 'net2'}", f"unix={tmp_path / 'vsock2'}"
    async with avmm.Machine(memory="8M", net=[net], vsock=cid) as vm:
        await answers(vm)
        mac = "02:00:00:00:00:07"
        for links, why in (
            ({}, "expected `net` to say"),
            ({"net": [theirs], "vsock": f"cid=8,{there}"}, "expected its mac=ADDRESS"),
            ({"net": [f"{theirs},mac={mac}"]}, "expected vsock to say its CID"),
            ({"net": [f"{theirs},mac={mac}"], "vsock": there}, "expected cid=NUMBER"),
        ):
            with pytest.raises(ConfigError, match=why):
                async with vm.clone(**links):
                    pytest.fail("it lacks an address")
        async with vm.clone(net=[f"{theirs},mac={mac}"], vsock=f"cid=8,{there}") as twin:
            await answers(twin)
            described = twin._inside.parts.describe()
            assert ([net["mac"] for net in described["nets"]], described["vsock"]) == ([mac], 8)
        await answers(vm)


async def test_that_running_cannot_be_told_is_no_end_of_the_guest(pair: Pair) -> None:
    def at(did: str, data: bytes) -> bool:
        return did == "sent" and data[:1] == bytes([RUNNING])

    stream = Strange(pair[1], at, RuntimeError("odd"))
    async with avmm.Machine(memory="8M") as vm, trio.open_nursery() as nursery:
        await answers(vm)
        there = Destination(nursery, stream)
        await vm.migrate(pair[0])
        await there.arrived.wait()
        assert there.vm is not None
        await answers(there.vm)
        await there.leave()


# -- a guest that ends ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "end"),
    [
        (b"exit 7", (avmm.Cause.EXIT, 7)),
        (b"reboot", (avmm.Cause.RESET, 0)),
        (b"crash", (avmm.Cause.TRIPLE_FAULT, 134)),
    ],
)
@pytest.mark.parametrize("microseconds", [0, 3000, 10_000, 20_000, 40_000])
async def test_a_guest_that_ends_meanwhile_ends_on_one_side(
    pair: Pair, microseconds: int, command: bytes, end: tuple[avmm.Cause, int]
) -> None:
    async with avmm.Machine(memory="64M") as vm, trio.open_nursery() as nursery:
        await answers(vm)
        there = Destination(nursery, pair[1])
        moved = False

        async def migrate() -> None:
            nonlocal moved
            with contextlib.suppress(MigrationError, RunstateError):
                await vm.migrate(pair[0])
                moved = True
            await trio.aclose_forcefully(pair[0])

        async with trio.open_nursery() as both:
            both.start_soon(migrate)
            await trio.sleep(microseconds / 1e6)
            with contextlib.suppress(trio.BrokenResourceError):
                await vm.console.send_all(command + b"\r")
        await there.arrived.wait()
        outcome = await vm.wait()
        assert moved == (there.vm is not None) == (outcome.cause is avmm.Cause.MOVED)
        if there.vm is None:
            assert (outcome.cause, outcome.status) == end
        else:  # the command may have come too late, and then nobody has it
            with contextlib.suppress(trio.BrokenResourceError):
                await there.vm.console.send_all(b"\r" + command + b"\r")
            outcome = await there.vm.wait()
            assert (outcome.cause, outcome.status) == end
        await there.leave()


async def test_a_guest_that_has_ended_is_not_migrated(pair: Pair, tmp_path: Path) -> None:
    async with machine(tmp_path, EXIT.format(3)) as vm, trio.open_nursery() as nursery:
        await vm.wait()
        there = Destination(nursery, pair[1])
        with pytest.raises(RunstateError, match=r"^migrate: this machine has ended; expected one"):
            await vm.migrate(pair[0])
        await pair[0].aclose()  # on which nothing was said
        await there.ended.wait()
        assert isinstance(there.error, MigrationError)
        assert (await vm.wait()).status == 3


# -- one at a time -------------------------------------------------------------------------


async def test_no_snapshot_takes_a_migrations_pages(pair: Pair, tmp_path: Path) -> None:
    """Two logs of the same pages: each would miss what the other has taken."""
    async with avmm.Machine(memory="16M") as vm, trio.open_nursery() as nursery:
        await answers(vm)
        with trio.CancelScope() as migration:
            there = Destination(nursery, pair[1])

            async def copy(progress: object) -> None:
                for refused in (
                    vm.snapshot(tmp_path / "snap"),
                    vm.migrate(pair[0]),
                    vm.clone().__aenter__(),
                ):
                    with pytest.raises(RunstateError, match="this machine is being migrated; "):
                        await refused
                migration.cancel()

            await vm.migrate(
                pair[0],
                bandwidth=200_000,
                on_progress=lambda progress: (
                    nursery.start_soon(copy, progress) if progress.pages_sent == 0 else None
                ),
            )
        await trio.aclose_forcefully(pair[0])
        await there.ended.wait()
        assert list(tmp_path.iterdir()) == []
        await vm.snapshot(tmp_path / "snap")
        await answers(vm)


async def test_a_pause_that_takes_too_long_is_told_as_that(pair: Pair, tmp_path: Path) -> None:
    class Slow(avmm.Device):
        async def run(self) -> None:
            await trio.sleep_forever()

        async def quiesce(self) -> None:
            await trio.sleep_forever()

    async with (
        avmm.Machine(memory="16M", devices=[avmm.pio(Slow(), 0x300, 1)]) as vm,
        trio.open_nursery() as nursery,
    ):
        with pytest.raises(PauseTimeout, match="Slow has not finished"):
            await vm.snapshot(tmp_path / "snap", deadline=1)
        assert list(tmp_path.iterdir()) == []
        there = Destination(nursery, pair[1], devices=[avmm.pio(Slow(), 0x300, 1)])
        with pytest.raises(PauseTimeout, match="Slow has not finished"):
            await vm.migrate(pair[0], deadline=1)
        await there.ended.wait()
        assert "Slow has not finished" in str(there.error)
        await answers(vm)


# -- a guest that writes as fast as the line carries ---------------------------------------


async def burning(vm: avmm.Machine, mebibytes: int) -> None:
    await vm.console.send_all(b"burn %d\r" % mebibytes)
    said = b""
    while b"any key" not in said:
        said += await vm.console.receive_some()


async def test_a_guest_that_writes_faster_than_the_line_carries_is_throttled(pair: Pair) -> None:
    async with avmm.Machine(memory="64M") as vm, trio.open_nursery() as nursery:
        await burning(vm, 200)
        there = Destination(nursery, pair[1])
        throttles: list[float] = []
        await vm.migrate(
            pair[0],
            # A host's guest may write 1.2 GB/s while it runs, and it always keeps a twentieth.
            bandwidth=120e6,
            target_downtime=0.014,
            on_progress=lambda progress: throttles.append(progress.throttle),
        )
        assert throttles == sorted(throttles)
        assert 0 < throttles[-1] <= 0.95
        await there.arrived.wait()
        assert there.vm is not None
        await there.vm.console.send_all(b"q")
        await answers(there.vm)
        await there.leave()


@pytest.mark.slow
@pytest.mark.timeout(200)
async def test_without_hope_it_says_so_and_the_guest_runs_on_unthrottled(pair: Pair) -> None:
    async with avmm.Machine(memory="32M") as vm, trio.open_nursery() as nursery:
        await burning(vm, 200)
        there = Destination(nursery, pair[1])
        with pytest.raises(MigrationError, match="throttled as much as possible"):
            await vm.migrate(pair[0], bandwidth=8e6, target_downtime=1e-3)
        await there.ended.wait()
        assert "throttled as much as possible" in str(there.error)
        await vm.console.send_all(b"q")
        await answers(vm)
