"""What a newcomer gets wrong is named, with what was expected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from support.guest import EXIT, machine

import avmm

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("kvm", "nothing_left")]
Work = Callable[[avmm.Machine], Awaitable[object]]


async def paused(vm: avmm.Machine) -> None:
    async with vm.paused():
        pass


async def cloned(vm: avmm.Machine) -> None:
    async with vm.clone():
        pass


async def snapshotted(vm: avmm.Machine) -> None:
    await vm.snapshot("/nowhere/snap")


async def migrated(vm: avmm.Machine) -> None:
    near, _ = trio.testing.memory_stream_pair()
    await vm.migrate(near)


class Handler(avmm.Device):
    vm: avmm.Machine

    def __init__(self, work: Work) -> None:
        self.work = work

    def write(self, offset: int, size: int, value: int) -> Any:
        return self.work(self.vm)


WRITE = f"mov dx, 0x300; out dx, al; {EXIT.format(3)}"


@pytest.mark.parametrize("work", [paused, cloned, snapshotted, migrated])
async def test_a_handler_that_would_wait_for_itself(tmp_path: Path, work: Work) -> None:
    handler = Handler(work)
    with pytest.raises(avmm.AvmmError, match="serves an exit of the machine's vCPU 0"):
        async with machine(tmp_path, WRITE, devices=[avmm.pio(handler, 0x300, 1)]) as vm:
            handler.vm = vm
            await vm.wait()


async def test_a_handler_may_have_another_task_pause_its_machine(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:

        async def soon(vm: avmm.Machine) -> None:
            nursery.start_soon(paused, vm)

        handler = Handler(soon)
        async with machine(tmp_path, WRITE, devices=[avmm.pio(handler, 0x300, 1)]) as vm:
            handler.vm = vm
            assert (await vm.wait()).status == 3


async def test_a_save_that_returns_nothing(tmp_path: Path) -> None:
    class Forgetful(avmm.Device):
        def save(self) -> Any:
            return None

    with pytest.raises(avmm.DeviceError, match=r"save\(\) returned None; expected a mapping"):
        async with machine(tmp_path, "1: jmp 1b", devices=[avmm.pio(Forgetful(), 0x300, 1)]) as vm:
            await vm.snapshot(tmp_path / "snap")


async def test_a_run_that_is_no_coroutine(tmp_path: Path) -> None:
    class Plain(avmm.Device):
        def run(self) -> Any:
            return 5

    with pytest.raises(avmm.DeviceError, match=r"run\(\) returned 5; expected a coroutine"):
        async with machine(tmp_path, "1: jmp 1b", devices=[avmm.pio(Plain(), 0x300, 1)]) as vm:
            await vm.wait()


async def test_memory_of_a_machine_that_was_left(tmp_path: Path) -> None:
    async with machine(tmp_path, "1: jmp 1b") as vm:
        memory = vm.memory
    with pytest.raises(avmm.GuestMemoryError, match="is closed, because its machine was left"):
        memory.read(0, 1)


def test_a_setting_of_the_command() -> None:
    with pytest.raises(avmm.ConfigError, match=r"console: .* expected none here: use vm.console"):
        avmm.Machine(console="pty")


@pytest.mark.parametrize("cpus", [255, 288, 1 << 20])
async def test_more_cpus_than_can_be(cpus: int) -> None:
    with pytest.raises(avmm.ConfigError, match=rf"cpus {cpus}: expected 1 to \d+"):
        async with avmm.Machine(cpus=cpus):
            pass
