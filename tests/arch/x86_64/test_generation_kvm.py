"""The generation id of a guest: each copy gets another one and is told, a guest that moves is
not.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.guest import machine

import avmm
from avmm.arch.x86_64 import generation, layout

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("kvm", "nothing_left"),
]

SEEN, TURNS = 0x20_0000, 0x20_0004
VECTOR = 0x41
# The interrupt goes to a vector that the guest never takes: it looks whether it is requested.
WATCH = f"""
    mov rax, 0xfee000f0
    mov dword ptr [rax], 0x1ff
    mov rbx, 0xfec00000
    mov dword ptr [rbx], {0x11 + 2 * generation.GSI}
    mov dword ptr [rbx + 0x10], 0
    mov dword ptr [rbx], {0x10 + 2 * generation.GSI}
    mov dword ptr [rbx + 0x10], {VECTOR}
    mov rdx, {SEEN}
1:  mov rcx, {0xFEE0_0200 + 0x10 * (VECTOR // 32)}
    mov eax, [rcx]
    mov [rdx], eax
    inc dword ptr [rdx + {TURNS - SEEN}]
    jmp 1b
"""


def identity(vm: avmm.Machine) -> bytes:
    return vm.memory.read(layout.GENERATION + 16, 16)


async def told(vm: avmm.Machine) -> bool:
    """Does the guest see the interrupt, after it has looked again?"""

    def number(gpa: int) -> int:
        value: int = struct.unpack("<I", vm.memory.read(gpa, 4))[0]
        return value

    before = number(TURNS)
    with trio.fail_after(30):
        while number(TURNS) < before + 2:  # noqa: ASYNC110 - a guest sets no event
            await trio.sleep(0.001)
    return bool(number(SEEN) >> VECTOR % 32 & 1)


@asynccontextmanager
async def copied(vm: avmm.Machine, how: str, folder: Path) -> AsyncIterator[avmm.Machine]:
    """A copy of the guest, which runs."""
    if how == "clone":
        async with vm.clone() as twin:
            yield twin
    elif how == "restore":
        await vm.snapshot(folder / "snapshot")
        async with avmm.restore(folder / "snapshot") as twin:
            yield twin
    else:
        async with vm.paused():
            state: dict[str, Any] = vm.save()
        async with machine(folder, WATCH, state=state) as twin:
            yield twin


@pytest.mark.parametrize("how", ["clone", "restore", "state"])
async def test_each_copy_gets_another_id_and_is_told(tmp_path: Path, how: str) -> None:
    async with machine(tmp_path, WATCH) as vm:
        own = identity(vm)
        assert own != bytes(16)
        assert not await told(vm)
        ids = {own}
        for number in range(2):
            async with copied(vm, how, tmp_path) as twin:
                ids.add(identity(twin))
                assert len(ids) == number + 2
                assert await told(twin)
        assert identity(vm) == own
        assert not await told(vm)


async def test_two_boots_have_two_ids(tmp_path: Path) -> None:
    async with machine(tmp_path, WATCH) as vm, machine(tmp_path, WATCH) as other:
        assert identity(vm) != identity(other)


async def test_a_guest_that_moves_keeps_its_id_and_is_not_told(tmp_path: Path) -> None:
    here, there = trio.testing.memory_stream_pair()
    async with machine(tmp_path, WATCH) as vm, trio.open_nursery() as nursery:
        own = identity(vm)
        assert not await told(vm)

        async def receive() -> None:
            async with avmm.receive(there) as moved:
                assert identity(moved) == own
                assert not await told(moved)

        nursery.start_soon(receive)
        await vm.migrate(here)


async def test_a_guest_without_the_device_is_left_alone(tmp_path: Path) -> None:
    async with machine(tmp_path, WATCH, acpi=False) as vm:
        assert identity(vm) == bytes(16)
        async with vm.clone() as twin:
            assert identity(twin) == bytes(16)
            assert not await told(twin)


@pytest.mark.parametrize("how", ["clone", "restore", "state"])
async def test_a_guest_that_has_not_set_up_its_interrupts_is_left_alone(
    tmp_path: Path, how: str
) -> None:
    """The PICs are as at reset: unmasked, and their first vector is 0. It has no IDT, either."""
    count = f"sti; mov rdx, {SEEN}; 1: inc dword ptr [rdx + {TURNS - SEEN}]; jmp 1b"
    async with machine(tmp_path, count) as vm, copied(vm, how, tmp_path) as twin:
        assert identity(twin) != identity(vm)
        assert not await told(twin)
        assert twin.state is avmm.Runstate.RUNNING
