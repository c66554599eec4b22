"""A Machine used at odd moments and in odd ways: before, after, half made, out of order."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
import trio.testing
from support.guest import EXIT, machine

import avmm
from avmm import Cause, Device
from avmm.loop import VcpuState

pytestmark = [pytest.mark.lab(also="stock"), pytest.mark.usefixtures("kvm", "nothing_left")]

FOREVER = "1: pause; jmp 1b"
ADDRESS = 0xD000_0000


class Null(Device):
    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        return None


async def test_a_machine_that_has_ended_can_be_paused_but_not_saved(tmp_path: Path) -> None:
    async with machine(tmp_path, EXIT.format(1), cpus=2) as vm:
        await vm.wait()
        async with vm.paused(deadline=10):
            with pytest.raises(avmm.RunstateError, match=r"^save: this machine has ended; "):
                vm.save()


async def test_waiting_ends_when_the_block_is_left_by_whoever(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        outcomes = []
        async with machine(tmp_path, FOREVER) as vm:

            async def wait() -> None:
                outcomes.append(await vm.wait())

            nursery.start_soon(wait)
    assert outcomes[0].cause is Cause.STOPPED
    assert (await vm.wait()).cause is Cause.STOPPED


async def test_stopping_and_pausing_after_the_end_do_no_harm(tmp_path: Path) -> None:
    async with machine(tmp_path, FOREVER) as vm:
        vm.stop()
        await vm.wait()
        vm.stop()
        async with vm.paused(deadline=10):
            pass
    vm.stop(5)
    with pytest.raises(avmm.RunstateError, match=r"^paused: this machine was left; "):
        async with vm.paused(deadline=10):
            pass
    assert (await vm.wait()).status == 0


COUNT_INPUTS = "mov rbx, 0; mov dx, 0x300; 1: in eax, dx; add rbx, rax; add rbx, 1000; jmp 1b"


class Slow(avmm.Device):
    """Answers a read with 7 when it is let go."""

    def __init__(self) -> None:
        self.asked, self.go_on = trio.Event(), trio.Event()

    async def read(self, offset: int, size: int) -> int:
        self.asked.set()
        await self.go_on.wait()
        return 7


async def test_what_is_saved_after_a_stop_is_not_torn(tmp_path: Path) -> None:
    device = Slow()
    async with machine(tmp_path, COUNT_INPUTS, devices=[avmm.pio(device, 0x300, 4)]) as vm:
        await device.asked.wait()
        vm.stop()
        device.go_on.set()
        await vm.wait()
        async with vm.paused(deadline=10):
            # The read that it was stopped in has reached its register.
            assert vm._inside.parts.vcpus[0].regs().rax == 7


async def test_a_vcpu_whose_exit_was_given_up_cannot_be_paused(tmp_path: Path) -> None:
    class Failing(Slow):
        async def read(self, offset: int, size: int) -> int:
            await super().read(offset, size)
            raise ValueError("no answer")

    device = Failing()
    refused = []
    with pytest.raises(ValueError, match="no answer"):
        async with machine(tmp_path, COUNT_INPUTS, devices=[avmm.pio(device, 0x300, 4)]) as vm:
            await device.asked.wait()
            device.go_on.set()
            try:
                await vm.wait()
            finally:
                with trio.CancelScope(shield=True):
                    try:
                        async with vm.paused(deadline=10):
                            pass
                    except avmm.AvmmError as error:
                        refused.append(str(error))
    assert refused == ["vCPU 0 has failed in the middle of an exit"]


class Late(Null):
    """A plain handler that returns an awaitable when trio is too late to begin it."""

    def __init__(self, later: Callable[[], Awaitable[int]]) -> None:
        self.may_return, self.returned = threading.Event(), threading.Event()
        self._later = later

    def read(self, offset: int, size: int) -> Awaitable[int]:  # type: ignore[override]
        assert self.may_return.wait(20)
        self.returned.set()
        return self._later()

    async def let(self) -> None:
        """Let it return, while trio stands still."""
        while not any(one.name == "avmm vCPU 0" for one in threading.enumerate()):
            await trio.lowlevel.checkpoint()
        self.may_return.set()
        assert self.returned.wait(20)


async def test_an_awaitable_that_never_waits_is_an_answer_even_of_a_machine_that_is_left(
    tmp_path: Path,
) -> None:
    async def later() -> int:
        return 7

    device = Late(later)
    async with machine(tmp_path, COUNT_INPUTS, devices=[avmm.pio(device, 0x300, 4)]) as vm:
        (loop,) = vm._inside.parts.group.loops
        await device.let()
    assert loop.state is VcpuState.ENDED


class Odd(BaseException):
    """What nobody expects of an awaitable."""


async def test_whatever_an_awaitable_raises_when_a_machine_is_left_its_vcpu_ends(
    tmp_path: Path,
) -> None:
    """Its thread waits for an answer and would wait for ever, and the loop for the thread."""

    async def later() -> int:
        try:
            await trio.sleep_forever()
        finally:
            raise Odd

    device = Late(later)
    with pytest.raises(Odd):
        async with machine(tmp_path, COUNT_INPUTS, devices=[avmm.pio(device, 0x300, 4)]) as vm:
            (loop,) = vm._inside.parts.group.loops
            await device.let()
    assert loop.state is VcpuState.FAILED


@pytest.mark.parametrize("which", [0, 1])
async def test_a_vcpu_that_gets_no_thread_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == f"avmm vCPU {which}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(
        avmm.VcpuError, match=f"^vCPU {which} could not get a thread: can't start new"
    ):
        async with machine(tmp_path, FOREVER, cpus=2) as vm:
            loops = vm._inside.parts.group.loops
            await trio.sleep_forever()
    assert [loop.state for loop in loops] == [VcpuState.ENDED] * 2


async def test_a_vcpu_that_is_stopped_where_it_stands_parked_ends(tmp_path: Path) -> None:
    """In C, mostly; for its thread it was running."""
    async with machine(tmp_path, FOREVER) as vm:
        (loop,) = vm._inside.parts.group.loops
        async with vm.paused():
            assert (loop.state, loop.is_parked) == (VcpuState.RUNNING, True)
            vm.stop()
            await vm.wait()
    assert loop.state is VcpuState.ENDED


async def test_a_stop_before_the_start_is_not_forgotten(tmp_path: Path) -> None:
    vm = machine(tmp_path, FOREVER)
    vm.stop(status=7)
    async with vm:
        assert (await vm.wait()).status == 7


async def test_an_interrupt_line_outlives_its_machine_harmlessly(tmp_path: Path) -> None:
    async with machine(tmp_path, FOREVER) as vm:
        line = vm.message_interrupt(0xFEE0_0000, 0x40)
    strangers = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(40)]
    line.pulse()
    for fd in strangers:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
        os.close(fd)


async def test_the_blocks_own_group_of_exceptions_stays_one(tmp_path: Path) -> None:
    with pytest.raises(ExceptionGroup, match="mine") as caught:
        async with machine(tmp_path, FOREVER):
            raise ExceptionGroup("mine", [ValueError("one")])
    assert [type(error) for error in caught.value.exceptions] == [ValueError]


class Bad(Null):
    """Raises at the guest's end: at a coalesced write that only then reaches it, or when told."""

    def __init__(self, *, at_write: bool = False, at_finish: bool = False) -> None:
        self.at_write, self.at_finish = at_write, at_finish
        self.finished = False

    def write(self, offset: int, size: int, value: int) -> None:
        if self.at_write:
            raise KeyError("a write")

    def finish(self) -> None:
        self.finished = True
        if self.at_finish:
            raise ValueError("the end")


def leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for part in error.exceptions for leaf in leaves(part)]


@pytest.mark.parametrize(
    ("fails_at", "expected"),
    [
        ("w", ["KeyError('a write')"]),
        ("f", ["ValueError('the end')"]),
        ("wff", ["KeyError('a write')", *["ValueError('the end')"] * 2]),
    ],
    ids=["a write", "the end", "several"],
)
@pytest.mark.parametrize("way", ["stopped", "left"])
async def test_a_device_that_raises_at_the_end_leaves_nobody_waiting(
    tmp_path: Path, fails_at: str, expected: list[str], way: str
) -> None:
    bads = [Bad(at_write=at == "w", at_finish=at == "f") for at in f"{fails_at}-"]
    places = [avmm.pio(bad, 0x300 + at, 1, coalesced=True) for at, bad in enumerate(bads)]
    code = "mov dx, 0x300; mov al, 1; out dx, al; mov dword ptr [0x200000], 1;" + FOREVER
    ends: list[object] = []

    async def live(vm: avmm.Machine) -> None:
        async with vm:
            while vm.memory.read(0x200000, 1) == b"\0":
                await trio.lowlevel.checkpoint()
            nursery.start_soon(wait, vm)
            nursery.start_soon(read, vm)
            await trio.testing.wait_all_tasks_blocked()
            if way == "stopped":
                vm.stop(3)
                await trio.sleep_forever()

    async def wait(vm: avmm.Machine) -> None:
        ends.append((await vm.wait()).cause)

    async def read(vm: avmm.Machine) -> None:
        ends.append([data async for data in vm.console])

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            with pytest.raises(Exception, match=r".") as caught:
                await live(machine(tmp_path, code, devices=places))
    assert [repr(error) for error in leaves(caught.value)] == expected
    assert sorted(ends, key=str) == [Cause.STOPPED, []]
    assert all(bad.finished for bad in bads)


async def test_what_ended_the_guest_is_not_hidden_by_what_a_device_raises_then(
    tmp_path: Path,
) -> None:
    code = "mov dx, 0x300; out dx, al;" + FOREVER
    devices = [
        avmm.pio(Bad(at_write=True), 0x300, 1),
        avmm.pio(Bad(at_finish=True), 0x301, 1),
    ]
    with trio.fail_after(20), pytest.raises(KeyError, match="a write") as caught:
        async with machine(tmp_path, code, devices=devices):
            await trio.sleep_forever()
    assert "and at the guest's end: ValueError('the end')" in caught.value.__notes__


@dataclass
class Plain(Device):
    value: int = 5

    def read(self, offset: int, size: int) -> int:
        return self.value


async def test_devices_may_compare_equal_and_have_no_hash(tmp_path: Path) -> None:
    places = [avmm.mmio(Plain(), ADDRESS, 4), avmm.mmio(Plain(6), ADDRESS + 4, 4)]
    code = f"mov rbx, {ADDRESS}; mov eax, [rbx]; add eax, [rbx + 4]; " + EXIT.format("eax")
    async with machine(tmp_path, code, devices=places) as vm:
        assert (await vm.wait()).status == 11


class TooWide(Null):
    max_width = 3


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Null(), "is not placed"),
        (avmm.pio(Null(), 0x20, 2), "overlaps the PIC at 0x20-0x21, where the kernel answers"),
        (avmm.pio(Null(), 0x42, 1), "overlaps the PIT"),
        (avmm.mmio(Null(), 0xFEE0_0000, 4096), "overlaps the LAPIC"),
        (avmm.mmio(TooWide(), ADDRESS, 4), "max_width 3, expected 1, 2, 4 or 8"),
    ],
)
async def test_what_is_no_placement_is_refused(
    tmp_path: Path, place: avmm.Placement, message: str
) -> None:
    with pytest.raises(avmm.ConfigError, match=message):
        async with machine(tmp_path, FOREVER, devices=[place]):
            pytest.fail("it was made")


async def test_nothing_is_left_where_descriptors_run_out(tmp_path: Path) -> None:
    machine(tmp_path, FOREVER)  # assembles, which needs descriptors of its own
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    fillers = [os.open(os.devnull, os.O_RDONLY)]
    while fillers[-1] < used:  # below the limit, no number is free
        fillers.append(os.open(os.devnull, os.O_RDONLY))
    used = fillers[-1]
    failures = 0
    for spare in range(1, 30):
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
        try:
            async with machine(tmp_path, FOREVER, cpus=4):
                break
        except (OSError, avmm.AvmmError) as error:
            assert "too many open files" in str(error).lower()
            failures += 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for fd in fillers:
        os.close(fd)
    assert failures > 4


async def test_a_rom_is_read_and_not_written(tmp_path: Path) -> None:
    rom = tmp_path / "rom"
    rom.write_bytes((0x1234).to_bytes(4, "little"))
    code = f"mov rbx, {0xFFF0_0000}; mov dword ptr [rbx], 1; mov eax, [rbx]; " + EXIT.format("eax")
    async with machine(tmp_path, code, roms=[(0xFFF0_0000, rom)]) as vm:
        assert (await vm.wait()).status == 0x1234
    with pytest.raises(avmm.ImageError, match="missing: cannot be read"):
        async with machine(tmp_path, code, roms=[f"0xfff00000={tmp_path}/missing"]):
            pass
    with pytest.raises(avmm.ConfigError, match="expected ADDRESS=PATH"):
        machine(tmp_path, code, roms=["nowhere"])


PROGRAM = """
import avmm

class Counter(avmm.Device):
    async def read(self, offset: int, size: int) -> int:
        return offset

async def run() -> int:
    async with avmm.Machine(cpus=2, devices=[avmm.mmio(Counter(), 0xD0000000, 8)]) as vm:
        return (await vm.wait()).status
"""


def test_a_users_program_is_type_checked_against_the_installed_package(tmp_path: Path) -> None:
    pytest.importorskip("mypy")  # which the lab's Python lacks
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
