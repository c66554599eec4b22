"""Level-triggered interrupts: while a device asserts its line, alone or with others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from support.guest import EXIT, machine

import avmm
from avmm.bus.interrupts import Interrupts, Pins
from avmm.devices.base import Device

pytestmark = [pytest.mark.lab, pytest.mark.timeout(60)]

GSI, VECTOR = 10, 0x41
COUNT, GO = 0x21_0000, 0x21_0008
GATES = 0x20_0000


class Needy(Device):
    """Asserts its line until it has been read so many times."""

    class State(avmm.DeviceState, version=1):
        left = avmm.plain.U32

    def __init__(self, left: int, *, at_once: bool = True) -> None:
        self.left = left
        self._at_once = at_once

    def attach(self, host: avmm.Host) -> None:
        super().attach(host)
        if self._at_once:
            self.ask()

    def ask(self) -> None:
        assert self.host.interrupt is not None
        self.host.interrupt.set(self.left > 0)

    def read(self, offset: int, size: int) -> int:
        self.left = max(0, self.left - 1)
        self.ask()
        return self.left

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(left=self.left)

    def load(self, state: Mapping[str, Any]) -> None:
        self.left = self.State.load(self.name, state).left


def guest(*, level: bool, ports: int = 1, most: int = 100) -> str:
    """Takes interrupts, reads all ports at each, and counts them in RAM. Ends when it has seen
    `most` of them. It unmasks the interrupt when `GO` is set, and then sets the next word."""
    entry = VECTOR | (1 << 15 if level else 0)
    reads = "; ".join(f"mov dx, {0x300 + port}; in al, dx" for port in range(ports))
    return f"""
        mov al, 0xff
        out 0x21, al
        out 0xa1, al
        lea rax, [rip + handler]
        mov rdi, {GATES + 16 * VECTOR}
        mov [rdi], ax
        mov bx, cs
        mov [rdi + 2], bx
        mov word ptr [rdi + 4], 0x8e00
        shr rax, 16
        mov [rdi + 6], rax
        lidt [rip + table]
        mov rax, 0xfee000f0
        mov dword ptr [rax], 0x1ff
        mov rbx, 0xfec00000
        mov dword ptr [rbx], {0x11 + 2 * GSI}
        mov dword ptr [rbx + 0x10], 0
        sti
        mov rdi, {GO}
    wait:
        cmp dword ptr [rdi], 0
        je wait
        mov dword ptr [rbx], {0x10 + 2 * GSI}
        mov dword ptr [rbx + 0x10], {entry}
        mov dword ptr [rdi + 4], 1
    1:  hlt
        jmp 1b
    handler:
        mov rdi, {COUNT}
        inc dword ptr [rdi]
        cmp dword ptr [rdi], {most}
        je over
        {reads}
        mov rax, 0xfee000b0
        mov dword ptr [rax], 0
        iretq
    over:
        {EXIT.format(9)}
    table:
        .word 0xfff
        .quad {GATES}
    """


def count(vm: avmm.Machine) -> int:
    return int.from_bytes(vm.memory.read(COUNT, 4), "little")


async def settled(vm: avmm.Machine) -> int:
    """How many interrupts there have been, when there are no more."""
    with trio.fail_after(30):
        while True:
            before = count(vm)
            await trio.sleep(0.2)
            if count(vm) == before:
                return before


def demand(found: int, expected: int) -> None:
    """There were so many interrupts, or one more: kvm_pvm's emulation may send one that it had
    begun to send when the line went low, as a PCI bus may."""
    assert expected <= found <= expected + 1


def go(vm: avmm.Machine) -> None:
    vm.memory.write(GO, b"\1")


@pytest.mark.usefixtures("kvm", "nothing_left")
@pytest.mark.parametrize(("level", "expected"), [(True, 5), (False, 1)], ids=["level", "edge"])
async def test_the_ioapic_in_both_modes(tmp_path: Path, level: bool, expected: int) -> None:
    """The line stays high for five reads: five interrupts, or one edge."""
    device = Needy(5, at_once=False)
    devices = [avmm.pio(device, 0x300, 1, irq=GSI, level=True)]
    async with machine(tmp_path, guest(level=level), devices=devices) as vm:
        go(vm)
        while not vm.memory.read(GO + 4, 1)[0]:
            await trio.lowlevel.checkpoint()
        device.ask()
        demand(await settled(vm), expected)
        assert device.left == 5 - expected


@pytest.mark.usefixtures("kvm", "nothing_left")
async def test_a_line_that_stays_high_interrupts_again_and_again(tmp_path: Path) -> None:
    devices = [avmm.pio(Needy(1 << 30), 0x300, 1, irq=GSI, level=True)]
    async with machine(tmp_path, guest(level=True), devices=devices) as vm:
        go(vm)
        assert (await vm.wait()).status == 9


@pytest.mark.usefixtures("kvm", "nothing_left")
async def test_two_devices_share_a_line(tmp_path: Path) -> None:
    """It is high until both have what they need, and again when one of them asks later."""
    one, two = Needy(2), Needy(4)
    devices = [
        avmm.pio(device, port, 1, irq=GSI, level=True)
        for port, device in ((0x300, one), (0x301, two))
    ]
    async with machine(tmp_path, guest(level=True, ports=2), devices=devices) as vm:
        go(vm)
        demand(before := await settled(vm), 4)
        one.left = 3
        one.ask()
        demand(await settled(vm) - before, 3)
        assert (one.left, two.left) == (0, 0)


@pytest.mark.usefixtures("kvm", "nothing_left")
@pytest.mark.parametrize("way", ["save", "snapshot", "clone", "migrate"])
async def test_a_line_that_is_high_goes_with_the_guest(tmp_path: Path, way: str) -> None:
    """Only the machine knows that it is: the devices say nothing when they are loaded."""
    source = guest(level=True, ports=2)

    def placed(*, at_once: bool) -> list[Any]:
        return [
            avmm.pio(Needy(left, at_once=at_once), port, 1, irq=GSI, level=True)
            for port, left in ((0x300, 0), (0x301, 3))
        ]

    async def runs_on(vm: avmm.Machine) -> None:
        go(vm)
        demand(await settled(vm), 3)

    async with machine(tmp_path, source, devices=placed(at_once=True)) as vm:
        if way == "clone":
            async with vm.clone(devices=placed(at_once=False)) as twin:
                await runs_on(twin)
        elif way == "snapshot":
            await vm.snapshot(tmp_path / "file")
            async with avmm.restore(tmp_path / "file", devices=placed(at_once=False)) as again:
                await runs_on(again)
        elif way == "save":
            async with vm.paused():
                state = vm.save()
            again = machine(tmp_path, source, devices=placed(at_once=False), state=state)
            async with again as loaded:
                await runs_on(loaded)
        else:
            here, there = trio.testing.memory_stream_pair()
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    async with avmm.receive(there, devices=placed(at_once=False)) as moved:
                        await runs_on(moved)

                nursery.start_soon(receive)
                await vm.migrate(here)


@pytest.mark.usefixtures("kvm", "nothing_left")
async def test_states_with_other_lines_are_refused(tmp_path: Path) -> None:
    def placed() -> list[Any]:
        return [avmm.pio(Needy(0), 0x300, 1, irq=GSI, level=True)]

    source = guest(level=True)
    async with machine(tmp_path, source, devices=placed()) as vm, vm.paused():
        state = vm.save()
        told = await trio.to_thread.run_sync(vm._inside.parts.describe)
    assert state["lines"] == [[GSI, 0]]
    assert told["levels"] == [GSI]
    for lines in ([], [[9, 0]], [[GSI, 2]], [[GSI, 0], [11, 0]]):
        wrong = {**copy.copy(state), "lines": lines}
        with pytest.raises(avmm.StateError, match="levels of other interrupts than this machine"):
            async with machine(tmp_path, source, devices=placed(), state=wrong):
                pass


@pytest.mark.usefixtures("kvm", "nothing_left")
async def test_a_guest_that_knows_an_edge_gets_no_level(tmp_path: Path) -> None:
    def placed(*, level: bool) -> list[Any]:
        return [avmm.pio(Needy(0), 0x300, 1, irq=GSI, level=level)]

    async with machine(tmp_path, guest(level=True), devices=placed(level=False)) as vm:
        await vm.snapshot(tmp_path / "file")
    with pytest.raises(avmm.StateError, match=r"level-triggered interrupts \[\], but .* has \[10"):
        async with avmm.restore(tmp_path / "file", devices=placed(level=True)):
            pass


# -- without KVM ---------------------------------------------------------------------------


class Chip:
    """KVM's side: what it was told last."""

    def __init__(self) -> None:
        self.told: list[tuple[int, bool]] = []
        self.before: Callable[[], None] = lambda: None
        """Called once, before the next level is told: what another thread does meanwhile."""

    def irq_line(self, gsi: int, level: bool) -> None:
        before, self.before = self.before, lambda: None
        before()
        self.told.append((gsi, level))


def test_who_may_share() -> None:
    interrupts = Interrupts(Pins(24))
    interrupts.line(5, "A", level=True)
    interrupts.line(5, "B", level=True)
    with pytest.raises(
        avmm.ConfigError, match=r"C: interrupt 5 is .* driven by A; expected level"
    ):
        interrupts.line(5, "C")
    interrupts.line(6, "D")
    with pytest.raises(
        avmm.ConfigError, match=r"E: interrupt 6 is .* driven by D; expected level"
    ):
        interrupts.line(6, "E", level=True)
    with pytest.raises(avmm.ConfigError, match=r"F: interrupt 6 is already driven by D$"):
        interrupts.line(6, "F")
    interrupts.close()


def test_a_line_drives_nothing_after_the_end() -> None:
    interrupts, chip = Interrupts(Pins(24)), Chip()
    line = interrupts.line(5, "A", level=True)
    line.set(True)
    interrupts.connect(chip)  # type: ignore[arg-type]
    assert chip.told == [(5, True)], "what was asserted before there was a VM"
    interrupts.close()
    line.set(False)
    line.pulse()
    assert chip.told == [(5, True)]


def test_any_truth_asserts_a_line() -> None:
    """A device may give a bit of its status."""
    interrupts = Interrupts(Pins(24))
    line = interrupts.line(5, "A", level=True)
    line.set(4)  # type: ignore[arg-type]
    assert interrupts.levels == [[5, 1]]
    interrupts.close()


@pytest.mark.parametrize("later", [False, True])
def test_one_line_overtakes_another(later: bool) -> None:
    """One thread has seen how the input is, and tells KVM after another has told the next."""
    interrupts, chip = Interrupts(Pins(24)), Chip()
    first, second = (interrupts.line(5, name, level=True) for name in "AB")
    first.set(True)
    second.set(not later)
    interrupts.connect(chip)  # type: ignore[arg-type]
    chip.before = lambda: second.set(later)
    first.set(False)
    assert (5, not later) in chip.told
    assert chip.told[-1] == (5, later)
    interrupts.close()


async def test_a_level_needs_an_interrupt() -> None:
    vm = avmm.Machine(memory="4M", devices=[avmm.pio(Needy(0), 0x300, 1, level=True)])
    with pytest.raises(avmm.ConfigError, match="level is for an interrupt; expected irq as well"):
        async with vm:
            pass
