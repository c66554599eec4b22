"""A guest that has halted for good: it is noticed, and nothing else is taken for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.guest import EXIT, machine

import avmm
from avmm import halts
from avmm.devices.base import Device

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("kvm", "nothing_left")]

STEP = 0.01


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halts, "_LOOK_SECONDS", STEP)
    monkeypatch.setattr(halts, "_SETTLE_SECONDS", STEP)


class Looks:
    """Counts how often the states of a machine's vCPUs are read."""

    def __init__(self, vm: avmm.Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[bool] = []
        self._more = trio.Event()
        look = vm._inside.parts.are_halted

        def noted() -> bool:
            self.answers.append(look())
            self._more.set()
            return self.answers[-1]

        monkeypatch.setattr(vm._inside.parts, "are_halted", noted)

    async def one(self) -> None:
        with trio.fail_after(30):
            await self._more.wait()
        self._more = trio.Event()


@asynccontextmanager
async def watched(vm: avmm.Machine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Looks]:
    """Somebody waits inside the block until the guest has halted for good."""
    looks = Looks(vm, monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.halted)
        yield looks
        nursery.cancel_scope.cancel()


class Patient(Device):
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.asked, self.go_on = trio.Event(), trio.Event()

    async def read(self, offset: int, size: int) -> int:
        self.asked.set()
        await self.go_on.wait()
        return 0


@pytest.mark.lab
@pytest.mark.parametrize("cpus", [1, 3])
@pytest.mark.parametrize("mode", ["long", "real"])
async def test_all_cpus_are_halted(tmp_path: Path, cpus: int, mode: str) -> None:
    """The others have never been started."""
    async with machine(tmp_path, "cli; hlt", mode=mode, cpus=cpus) as vm:
        with trio.fail_after(30):
            await vm.halted()
        assert vm.state is avmm.Runstate.RUNNING
        vm.stop(7)
        assert (await vm.wait()).status == 7


@pytest.mark.lab
async def test_with_interrupts_on_it_only_sleeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at once, and not again before it has run."""
    async with machine(tmp_path, "sti; 1: hlt; jmp 1b") as vm, watched(vm, monkeypatch) as looks:
        await looks.one()
        await trio.sleep(20 * STEP)
        assert set(looks.answers) == {False}
        # A look may itself be noticed as activity, if its threads are slow to settle.
        assert len(looks.answers) <= 3


async def test_one_that_runs_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine(tmp_path, "cli; 1: jmp 1b") as vm, watched(vm, monkeypatch) as looks:
        await trio.sleep(20 * STEP)
        # On a busy host its thread may once get no time for as long as a step.
        assert len(looks.answers) <= 4
        assert True not in looks.answers


async def test_one_that_waits_for_a_device_is_not_halted(tmp_path: Path) -> None:
    device = Patient()
    source = f"cli; mov dx, 0x300; in al, dx; {EXIT.format(3)}"
    async with (
        machine(tmp_path, source, devices=[avmm.pio(device, 0x300, 1)]) as vm,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(vm.halted)
        await device.asked.wait()
        await trio.sleep(20 * STEP)
        device.go_on.set()
        assert (await vm.wait()).status == 3
        nursery.cancel_scope.cancel()


async def test_a_paused_one_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine(tmp_path, "cli; hlt") as vm, trio.open_nursery() as nursery:
        looks = Looks(vm, monkeypatch)
        async with vm.paused():
            nursery.start_soon(vm.halted)
            await trio.sleep(20 * STEP)
            assert not looks.answers
        await looks.one()
        assert looks.answers == [True]


async def test_a_message_could_wake_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with machine(tmp_path, "cli; hlt") as vm:
        vm.message_interrupt(0xFEE0_0000, 0x400)
        async with watched(vm, monkeypatch) as looks:
            await looks.one()
            assert looks.answers == [False]


async def test_an_nmi_from_the_ioapic_could_wake_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
        cli; mov edi, 0xfec00000
        mov dword ptr [rdi], 0x10 + 2 * 9
        mov dword ptr [rdi + 0x10], 0x400
        hlt
    """
    async with machine(tmp_path, source) as vm, watched(vm, monkeypatch) as looks:
        await looks.one()
        assert looks.answers == [False]


def test_the_command_ends_and_says_so(tmp_path: Path) -> None:
    image = tmp_path / "guest"
    image.write_bytes(b"\xfa\xf4")  # cli; hlt
    command = [sys.executable, "-m", "avmm", "run", str(image), "--flat", "real@0x8000"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 133
    assert done.stderr == (
        "avmm: the guest has halted all of its CPUs, with interrupts off: nothing can wake it\n"
    )
