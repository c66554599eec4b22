"""virtio in a real guest: notifications with an exit and without, pauses, save and load."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import trio
from support.guest import machine

import avmm
from avmm.devices.virtio.mmio import QUEUE_NOTIFY, VirtioMmio
from avmm.devices.virtio.rng import Rng

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm", "nothing_left")]

BASE = 0xC000_0000
DESC, AVAIL, USED, BUFFER, COUNT = 0x20_0000, 0x20_1000, 0x20_2000, 0x20_3000, 0x20_4000

SET_UP = f"""
    mov rbx, {BASE}
    mov dword ptr [rbx + 0x70], 1
    mov dword ptr [rbx + 0x70], 3
    mov dword ptr [rbx + 0x24], 1
    mov dword ptr [rbx + 0x20], 1
    mov dword ptr [rbx + 0x70], 11
    mov dword ptr [rbx + 0x38], 4
    mov dword ptr [rbx + 0x80], {DESC}
    mov dword ptr [rbx + 0x90], {AVAIL}
    mov dword ptr [rbx + 0xa0], {USED}
    mov dword ptr [rbx + 0x44], 1
    mov dword ptr [rbx + 0x70], 15
    mov rdi, {DESC}
    mov dword ptr [rdi], {BUFFER}
    mov dword ptr [rdi + 8], 8
    mov word ptr [rdi + 12], 2
"""
"""A driver of the entropy device, with the version-1 feature alone and one descriptor."""
ASK_FOR_EVER = f"""
1:  mov rdi, {AVAIL}
    inc word ptr [rdi + 2]
    mov dword ptr [rbx + 0x50], 0
    mov rsi, {USED}
2:  mov ax, [rdi + 2]
    pause
    cmp ax, [rsi + 2]
    jne 2b
    mov eax, [rbx + 0x60]
    mov [rbx + 0x64], eax
    mov rdx, {COUNT}
    inc dword ptr [rdx]
    jmp 1b
"""


def counted(vm: avmm.Machine) -> int:
    value: int = struct.unpack("<I", vm.memory.read(COUNT, 4))[0]
    return value


async def until(vm: avmm.Machine, count: int) -> None:
    with trio.fail_after(30):
        while counted(vm) < count:  # noqa: ASYNC110 - a guest sets no event
            await trio.sleep(0.002)


class Watched(VirtioMmio):
    """Counts the notifications that come by an exit."""

    notified = 0

    def write(self, offset: int, size: int, value: int) -> Any:
        self.notified += offset == QUEUE_NOTIFY
        return super().write(offset, size, value)


@pytest.mark.parametrize("doorbells", [True, False], ids=["doorbell", "exit"])
async def test_notifications(tmp_path: Path, doorbells: bool) -> None:
    device = Watched(Rng(), doorbells=doorbells)
    place = avmm.mmio(device, BASE, 0x200, irq=5)
    async with machine(tmp_path, SET_UP + ASK_FOR_EVER, devices=[place]) as vm:
        await until(vm, 20)
        assert vm.memory.read(BUFFER, 8) != bytes(8)
    assert (device.notified == 0) is doorbells


async def test_pauses_in_the_midst_of_requests(tmp_path: Path) -> None:
    async with machine(tmp_path, SET_UP + ASK_FOR_EVER, devices=[avmm.virtio(Rng())]) as vm:
        for _ in range(30):
            before = counted(vm)
            async with vm.paused(deadline=10):
                frozen = vm.memory.read(0, vm.memory.size)
                await trio.sleep(0.003)
                assert vm.memory.read(0, vm.memory.size) == frozen
            await until(vm, before + 2)


async def test_saved_and_loaded_in_the_midst_of_requests(tmp_path: Path) -> None:
    """A source that never answers before the state is taken: the request goes along."""
    code = SET_UP + ASK_FOR_EVER
    state = None
    asked = trio.Event()

    async def stuck(count: int) -> bytes:
        asked.set()
        await trio.sleep_forever()
        raise AssertionError

    for _ in range(3):
        async with machine(tmp_path, code, devices=[avmm.virtio(Rng())], state=state) as vm:
            before = counted(vm)
            await until(vm, before + 5)
            async with vm.paused(deadline=10):
                state = vm.save()
        asked = trio.Event()
        async with machine(tmp_path, code, devices=[avmm.virtio(Rng(stuck))], state=state) as vm:
            before = counted(vm)
            with trio.fail_after(10):
                await asked.wait()
            assert counted(vm) <= before + 1
            async with vm.paused(deadline=10):
                state = vm.save()
        flying = dict(state["devices"])["virtio rng"]["queues"][0]["in_flight"]
        assert flying == [[0, 0]]


async def test_a_reset_that_waits_for_the_device(tmp_path: Path) -> None:
    asked, released = trio.Event(), trio.Event()

    async def source(count: int) -> bytes:
        asked.set()
        with trio.CancelScope(shield=True):
            await released.wait()
        return b"r" * count

    code = (
        SET_UP
        + f"""
        mov rdi, {AVAIL}
        inc word ptr [rdi + 2]
        mov dword ptr [rbx + 0x50], 0
        mov rdx, {COUNT}
    1:  pause
        cmp dword ptr [rdx + 4], 0
        je 1b
        inc dword ptr [rdx]
        mov dword ptr [rbx + 0x70], 0
        mov eax, [rbx + 0x70]
        or eax, 0x100
        mov [rdx], eax
    9:  pause
        jmp 9b
    """
    )
    async with machine(tmp_path, code, devices=[avmm.virtio(Rng(source))]) as vm:
        await asked.wait()
        vm.memory.write(COUNT + 4, b"\1")  # it may reset the device now
        await until(vm, 1)
        await trio.sleep(0.1)
        assert counted(vm) == 1  # the vCPU waits with its write
        released.set()
        await until(vm, 0x100)
        assert counted(vm) == 0x100
        used = vm.memory.read(USED, 4)
        await trio.sleep(0.05)
        assert vm.memory.read(USED, 4) == used


@pytest.mark.timeout(120)
async def test_the_bundled_shell_saved_and_loaded_in_the_midst_of_counting() -> None:
    """Each state is taken while output is in rings and buffers: each number comes once."""
    output, state = b"", None
    for turn in range(20):
        console = avmm.virtio(avmm.Console())
        async with avmm.Machine(devices=[console], cmdline="console=hvc0", state=state) as vm:
            port = vm.ports["hvc0"]
            if turn == 0:
                await port.send_all(b"count 10000\r")
            if turn < 19:
                end = len(output) + 1000 + 97 * turn
                while len(output) < end:
                    output += await port.receive_some(333)
                async with vm.paused(deadline=10):
                    state = vm.save()
                continue
            while b"\n10000\r\n" not in output:
                output += await port.receive_some()
            await port.send_all(b"echo all arrived\r")
            while b"\r\nall arrived\r\n" not in output:
                output += await port.receive_some()
    numbers = [int(line) for line in output.replace(b"\r", b"").split(b"\n") if line.isdigit()]
    assert numbers == list(range(1, 10001))


@pytest.mark.timeout(60)
async def test_the_bundled_shell_takes_more_than_its_queue_holds() -> None:
    console = avmm.virtio(avmm.Console())
    async with avmm.Machine(devices=[console], cmdline="console=hvc0") as vm:
        port = vm.ports["hvc0"]
        commands = b"".join(b"echo line %d\r" % number for number in range(500))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(port.send_all, commands + b"exit 3\r")
            output = b"".join([data async for data in port])
        assert (await vm.wait()).status == 3
    lines = output.replace(b"\r", b"").split(b"\n")
    assert [line for line in lines if line.startswith(b"line")] == [
        b"line %d" % number for number in range(500)
    ]
