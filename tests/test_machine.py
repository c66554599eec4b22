"""A Machine from its first instruction to its end, however it ends."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from support.guest import EXIT, machine

import avmm
from avmm import Cause, Device

pytestmark = [pytest.mark.lab(also="stock"), pytest.mark.usefixtures("kvm", "nothing_left")]

ADDRESS = 0xD000_0000
TOUCH = f"mov rbx, {ADDRESS}; mov eax, [rbx]; "
FOREVER = "1: pause; jmp 1b"


class Constant(Device):
    """Reads 7, at once."""

    def read(self, offset: int, size: int) -> int:
        return 7

    def write(self, offset: int, size: int, value: int) -> None:
        return None


class Waiting(Constant):
    """Reads 7, when it is let."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        self.answer = trio.Event()

    async def read(self, offset: int, size: int) -> int:
        self.asked.set()
        await self.answer.wait()
        return 7


async def test_a_guest_ends_with_the_status_it_writes(tmp_path: Path) -> None:
    async with machine(tmp_path, EXIT.format(3)) as vm:
        assert await vm.wait() == avmm.Outcome(Cause.EXIT, 3)


async def test_the_debug_exit_gives_the_status_that_qemu_gives(tmp_path: Path) -> None:
    async with machine(tmp_path, "mov al, 5; out 0xf4, al; hlt") as vm:
        assert (await vm.wait()).status == 5 << 1 | 1


async def test_the_debug_exit_may_be_elsewhere_or_nowhere(tmp_path: Path) -> None:
    code = "mov al, 5; out 0xf4, al; mov al, 1; out 0x55, al; hlt"
    async with machine(tmp_path, code, debug_exit=0x55) as vm:
        assert (await vm.wait()).status == 3
    async with machine(
        tmp_path, "mov al, 5; out 0xf4, al;" + EXIT.format(9), debug_exit=None
    ) as vm:
        assert (await vm.wait()).status == 9


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
async def test_flat_binaries_start_in_the_chosen_mode(tmp_path: Path, mode: str) -> None:
    async with machine(tmp_path, EXIT.format(11), mode=mode) as vm:
        assert (await vm.wait()).status == 11


async def test_a_handler_that_answers_is_served_in_the_vcpu_thread(tmp_path: Path) -> None:
    names = []

    class Named(Constant):
        def read(self, offset: int, size: int) -> int:
            names.append(threading.current_thread().name)
            return 7

    device = avmm.mmio(Named(), ADDRESS, 4)
    async with machine(tmp_path, TOUCH + EXIT.format("eax"), devices=[device]) as vm:
        assert (await vm.wait()).status == 7
    assert names == ["avmm vCPU 0"]


async def test_a_handler_may_await_and_only_its_vcpu_waits(tmp_path: Path) -> None:
    device = Waiting()
    place = avmm.mmio(device, ADDRESS, 4)
    async with machine(tmp_path, TOUCH + EXIT.format("eax"), devices=[place]) as vm:
        await device.asked.wait()
        device.answer.set()
        assert (await vm.wait()).status == 7


async def test_a_plain_handler_may_return_an_awaitable(tmp_path: Path) -> None:
    class Mixed(Constant):
        def read(self, offset: int, size: int) -> object:
            return self.later()

        async def later(self) -> int:
            await trio.lowlevel.checkpoint()
            return 12

    place = avmm.mmio(Mixed(), ADDRESS, 4)
    async with machine(tmp_path, TOUCH + EXIT.format("eax"), devices=[place]) as vm:
        assert (await vm.wait()).status == 12


class Boom(Exception):
    pass


class Failing(Constant):
    def read(self, offset: int, size: int) -> int:
        raise Boom("no")


class FailingLater(Constant):
    async def read(self, offset: int, size: int) -> int:
        await trio.lowlevel.checkpoint()
        raise Boom("no")


@pytest.mark.parametrize("device", [Failing, FailingLater])
async def test_a_handlers_exception_comes_out_of_the_block(
    tmp_path: Path, device: type[Device]
) -> None:
    place = avmm.mmio(device(), ADDRESS, 4)
    with pytest.raises(Boom) as caught:
        async with machine(tmp_path, TOUCH + FOREVER, devices=[place], cpus=2):
            await trio.sleep_forever()
    (note,) = caught.value.__notes__
    assert f"KVM_EXIT_MMIO: read of 4 bytes at {ADDRESS:#x}" in note
    assert f"rbx={ADDRESS:016x}" in note
    assert "code at rip: 8b 03" in note
    assert "instruction: mov eax, dword ptr [rbx]" in note


async def test_a_triple_fault_ends_the_run(tmp_path: Path) -> None:
    async with machine(tmp_path, "lidt [0f]; ud2; 0: .long 0, 0, 0", mode="protected") as vm:
        outcome = await vm.wait()
    assert (outcome.cause, outcome.status) == (Cause.TRIPLE_FAULT, 134)


async def test_the_keyboard_controller_resets(tmp_path: Path) -> None:
    async with machine(tmp_path, "mov al, 0xfe; out 0x64, al;" + FOREVER) as vm:
        assert (await vm.wait()).cause is Cause.RESET


async def test_what_kvm_cannot_run_is_told_with_registers_and_code(tmp_path: Path) -> None:
    # Jumping to where no memory is leaves KVM without an instruction to emulate.
    code = f"mov ebx, 0x1234; mov eax, {0xC800_0000}; jmp eax"
    with pytest.raises(avmm.VcpuError) as caught:
        async with machine(tmp_path, code, mode="protected"):
            await trio.sleep_forever()
    text = str(caught.value)
    assert "KVM_EXIT_INTERNAL_ERROR" in text
    assert "rbx=0000000000001234" in text
    assert "rip=00000000c8000000" in text
    assert "not mapped to guest memory" in text


async def test_leaving_the_block_ends_a_guest_that_would_run_for_ever(tmp_path: Path) -> None:
    async with machine(tmp_path, FOREVER, cpus=3):
        pass


async def test_the_blocks_own_exception_comes_out_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(Boom, match="mine"):
        async with machine(tmp_path, FOREVER):
            raise Boom("mine")


async def test_cancelling_ends_a_guest_and_a_waiting_handler(tmp_path: Path) -> None:
    device = Waiting()
    with trio.CancelScope() as scope:
        async with machine(tmp_path, TOUCH + FOREVER, devices=[avmm.mmio(device, ADDRESS, 4)]):
            await device.asked.wait()
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_stop_ends_a_guest_even_while_it_is_paused(tmp_path: Path) -> None:
    async with machine(tmp_path, FOREVER, cpus=2) as vm, vm.paused():
        vm.stop(status=4)
        assert await vm.wait() == avmm.Outcome(Cause.STOPPED, 4)


async def test_nothing_is_left_when_a_machine_cannot_be_made(tmp_path: Path) -> None:
    devices = [avmm.mmio(Constant(), ADDRESS, 4), avmm.mmio(Constant(), ADDRESS + 2, 4)]
    with pytest.raises(avmm.ConfigError, match="overlaps Constant"):
        async with machine(tmp_path, FOREVER, devices=devices):
            pass


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (avmm.pio(Constant(), 0x3F8, 1), "overlaps Serial"),
        (avmm.pio(Constant(), 0xFFFF, 2), "expected a range within 0-0xffff"),
        (avmm.mmio(Constant(), 0x1000, 4), "overlaps guest memory"),
        (avmm.mmio(Constant(), ADDRESS, 4, irq=4), "already driven by Serial"),
        (avmm.mmio(Constant(), ADDRESS, 4, irq=2), "belongs to the second PIC"),
        (avmm.mmio(Constant(), ADDRESS, 4, irq=24), "does not exist"),
    ],
)
async def test_devices_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, place: avmm.Placement, message: str
) -> None:
    with pytest.raises(avmm.ConfigError, match=message):
        async with machine(tmp_path, FOREVER, devices=[place]):
            pass


async def test_more_vcpus_than_kvm_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(avmm.ConfigError, match="cpus 5000: "):
        async with machine(tmp_path, FOREVER, cpus=5000):
            pass


async def test_a_machine_runs_once(tmp_path: Path) -> None:
    vm = machine(tmp_path, EXIT.format(0))
    async with vm:
        await vm.wait()
    with pytest.raises(avmm.AvmmError, match="runs once"):
        async with vm:
            pass


async def test_a_devices_task_runs_with_the_machine_and_may_interrupt_it(tmp_path: Path) -> None:
    """A device's own task raises an interrupt, which reaches the guest through PIC and IDT."""
    # Real mode: vector 0x20 + 5 of a PIC that is set up by hand, then hlt until it came.
    code = """
        cli
        xor ax, ax
        mov ds, ax
        mov word ptr [4 * 0x25], offset handler
        mov word ptr [4 * 0x25 + 2], 0
        mov al, 0x11; out 0x20, al
        mov al, 0x20; out 0x21, al
        mov al, 0x04; out 0x21, al
        mov al, 0x01; out 0x21, al
        mov al, 0xdf; out 0x21, al
        mov sp, 0x7000
        mov ss, ax
        sti
        mov dx, 0x300; out dx, al
    1:  hlt
        jmp 1b
    handler:
        mov dx, 0xf8; mov eax, 21; out dx, eax
        hlt
    """

    class Ticker(Constant):
        def attach(self, host: avmm.Host) -> None:
            super().attach(host)
            self.armed = host.wakeup()

        def write(self, offset: int, size: int, value: int) -> None:
            self.armed.set()

        async def run(self) -> None:
            await self.armed.wait()
            assert self.host.interrupt is not None
            self.host.interrupt.set(True)

    place = avmm.pio(Ticker(), 0x300, 1, irq=5)
    async with machine(tmp_path, code, mode="real", devices=[place]) as vm:
        assert (await vm.wait()).status == 21


async def test_paused_guests_stand_still_and_pauses_nest(tmp_path: Path) -> None:
    """The guest counts in memory; while it is paused the count does not move."""
    async with machine(tmp_path, "1: inc qword ptr [0x200000]; jmp 1b") as vm:
        view = vm.memory.view(0x200000, 8)

        async def moved(since: bytes) -> None:
            while bytes(view) == since:
                await trio.lowlevel.checkpoint()

        await moved(bytes(8))
        async with vm.paused():
            async with vm.paused():
                pass
            before = bytes(view)
            for _ in range(1000):
                await trio.lowlevel.checkpoint()
            assert bytes(view) == before
        await moved(before)
        view.release()


async def test_a_pause_waits_for_the_handler_and_finishes_its_exit(tmp_path: Path) -> None:
    device = Waiting()
    code = TOUCH + "mov [0x200000], eax; 1: pause; jmp 1b"
    async with machine(tmp_path, code, devices=[avmm.mmio(device, ADDRESS, 4)]) as vm:
        await device.asked.wait()
        paused = trio.Event()

        async def pause() -> None:
            async with vm.paused():
                paused.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pause)
            await trio.testing.wait_all_tasks_blocked()
            assert not paused.is_set()
            device.answer.set()
            await paused.wait()


async def test_two_hundred_pauses_lose_no_count_of_a_port(tmp_path: Path) -> None:
    """The guest writes 0, 1, 2, ... to a port; pauses at any moment lose and repeat none."""
    seen: list[int] = []

    class Recorder(Constant):
        def write(self, offset: int, size: int, value: int) -> None:
            seen.append(value)

    code = "xor eax, eax; mov dx, 0x300; 1: out dx, eax; inc eax; jmp 1b"
    async with machine(tmp_path, code, devices=[avmm.pio(Recorder(), 0x300, 4)]) as vm:
        for _ in range(200):
            async with vm.paused():
                count = len(seen)
            while len(seen) == count:
                await trio.lowlevel.checkpoint()
    assert seen == list(range(len(seen)))


async def test_unclaimed_ports_and_addresses_read_all_ones(tmp_path: Path) -> None:
    code = f"mov dx, 0x333; in eax, dx; mov rbx, {ADDRESS}; and eax, [rbx]; mov [rbx], eax; "
    async with machine(tmp_path, code + EXIT.format("eax")) as vm:
        assert (await vm.wait()).status == 0xFFFF_FFFF


async def test_many_machines_in_one_nursery(tmp_path: Path) -> None:
    statuses = []

    async def one(status: int) -> None:
        folder = tmp_path / str(status)
        folder.mkdir()
        async with machine(folder, EXIT.format(status)) as vm:
            statuses.append((await vm.wait()).status)

    async with trio.open_nursery() as nursery:
        for status in range(20):
            nursery.start_soon(one, status)
    assert sorted(statuses) == list(range(20))


async def test_three_vcpus_go_on_while_one_waits_in_a_handler(tmp_path: Path) -> None:
    """CPU 0 starts the others and then hangs in a handler; all the while they count."""
    device = Waiting()
    code = f"""
        mov ebx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff
        mov esi, offset ap
        mov edi, 0x8000
        mov ecx, offset ap_end - ap
        rep movsb
        mov dword ptr [rbx + 0x300], 0xc4500
        mov dword ptr [rbx + 0x300], 0xc4608
        mov rbx, {ADDRESS}
        mov eax, [rbx]
        {EXIT.format("eax")}
    .code16
    ap: mov ax, 0x700
        mov ds, ax
        mov ax, 1
        lock xadd word ptr ds:[0], ax
        shl ax, 2
        mov bx, ax
    1:  inc dword ptr ds:[bx + 16]
        jmp 1b
    ap_end:
    """
    place = avmm.mmio(device, ADDRESS, 4)
    async with machine(tmp_path, code, devices=[place], cpus=4) as vm:
        await device.asked.wait()

        def counters() -> list[int]:
            data = vm.memory.read(0x7010, 12)
            return [int.from_bytes(data[at : at + 4], "little") for at in (0, 4, 8)]

        before = [0, 0, 0]
        for _ in range(5):
            while any(now == then for now, then in zip(counters(), before, strict=True)):
                await trio.lowlevel.checkpoint()
            before = counters()
        device.answer.set()
        assert (await vm.wait()).status == 7


async def test_message_interrupts_reach_the_guest(tmp_path: Path) -> None:
    """An MSI for vector 0x40 of APIC 0 wakes a halted CPU in long mode."""
    code = """
        mov esp, 0x80000
        lea rax, handler[rip]
        mov edi, 0x70400
        mov word ptr [rdi], ax
        mov word ptr [rdi + 2], cs
        mov word ptr [rdi + 4], 0x8e00
        shr rax, 16
        mov word ptr [rdi + 6], ax
        shr rax, 16
        mov dword ptr [rdi + 8], eax
        mov dword ptr [rdi + 12], 0
        lidt [idt]
        mov ebx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff
        sti
        mov dx, 0x300; out dx, al
    1:  hlt
        jmp 1b
    handler:
        mov dx, 0xf8; mov eax, 33; out dx, eax
    idt: .word 0xfff
        .quad 0x70000
    """

    class Ready(Constant):
        def attach(self, host: avmm.Host) -> None:
            super().attach(host)
            self.ready = host.wakeup()

        def write(self, offset: int, size: int, value: int) -> None:
            self.ready.set()

    device = Ready()
    async with machine(tmp_path, code, devices=[avmm.pio(device, 0x300, 1)]) as vm:
        message = vm.message_interrupt(0xFEE0_0000, 0x40)
        await device.ready.wait()
        message.pulse()
        assert (await vm.wait()).status == 33


async def test_plain_handlers_of_one_device_never_overlap(tmp_path: Path) -> None:
    inside = itertools.count()
    worst = []

    class Exclusive(Constant):
        def __init__(self) -> None:
            self.users = 0
            self.calls = 0

        def write(self, offset: int, size: int, value: int) -> None:
            self.users += 1
            worst.append(self.users)
            next(inside)
            self.users -= 1

    device = Exclusive()
    code = """
        mov ebx, 0xfee00000
        mov dword ptr [rbx + 0xf0], 0x1ff
        mov esi, offset ap
        mov edi, 0x8000
        mov ecx, offset ap_end - ap
        rep movsb
        mov dword ptr [rbx + 0x300], 0xc4500
        mov dword ptr [rbx + 0x300], 0xc4608
        mov dx, 0x300
        1: out dx, al
        jmp 1b
    .code16
    ap: mov dx, 0x300
    1:  out dx, al
        jmp 1b
    ap_end:
    """
    async with machine(tmp_path, code, devices=[avmm.pio(device, 0x300, 1)], cpus=2):
        while len(worst) < 4000:
            await trio.lowlevel.checkpoint()
    assert max(worst) == 1


async def test_an_awaitable_that_is_never_begun_is_cancelled_not_forgotten(tmp_path: Path) -> None:
    """The block is left after a handler returned its coroutine, before trio could run it."""
    may_return, returned = threading.Event(), threading.Event()
    begun = []

    class Late(Constant):
        def read(self, offset: int, size: int) -> object:
            assert may_return.wait(20)
            returned.set()
            return self.later()

        async def later(self) -> int:
            begun.append(True)
            await trio.lowlevel.checkpoint()
            raise AssertionError("it is cancelled at its first checkpoint")

    place = avmm.mmio(Late(), ADDRESS, 4)
    async with machine(tmp_path, TOUCH + FOREVER, devices=[place]):
        while not any(one.name == "avmm vCPU 0" for one in threading.enumerate()):
            await trio.lowlevel.checkpoint()
        may_return.set()
        assert returned.wait(20)  # trio stands still meanwhile
    assert begun == [True]


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({}, "the documented list"),
        ({"completion": "list"}, "the documented list"),
        ({"completion": "always"}, "every exit"),
        ({"completion_capability": 16}, "the kernel's flag (capability 16)"),
        ({"completion_capability": 0x7FFFFFFF}, "the documented list"),
    ],
)
async def test_the_completion_policy_is_the_configured_one(
    tmp_path: Path,
    settings: dict[str, Any],
    policy: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with machine(tmp_path, "1: pause; jmp 1b", **settings) as vm:
        assert vm._inside.parts.policy.describe() == policy
        async with vm.paused():
            pass
    warned = "does not announce capability 2147483647" in caplog.text
    assert warned == (settings.get("completion_capability") == 0x7FFFFFFF)


async def test_a_jump_to_the_firmware_resets(tmp_path: Path) -> None:
    code = "mov ax, 0xf000; push ax; mov ax, 0xfff0; push ax; retf"
    async with machine(tmp_path, code, mode="real") as vm:
        assert (await vm.wait()).cause is Cause.RESET
