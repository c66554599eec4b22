"""Low memory as a PC's firmware leaves it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support.guest import EXIT, machine
from support.images import multiboot_elf, multiboot_header

from avmm.arch.x86_64.boot.load import load
from avmm.boot import FlatOptions, Mode
from avmm.memory.ram import GuestMemory

pytestmark = pytest.mark.timeout(60)
Write = Callable[..., Path]

EBDA, BASE_MEMORY, COM1 = 0x40E, 0x413, 0x400


def word(memory: GuestMemory, at: int) -> int:
    return int.from_bytes(memory.read(at, 2), "little")


def test_the_bios_data_area_says_where_base_memory_ends(memory: GuestMemory, write: Write) -> None:
    """Xen 4.17 copies its trampoline below the lower one of these two."""
    load(memory, write(multiboot_elf()))
    assert word(memory, BASE_MEMORY) << 10 == 0x9FC00
    assert word(memory, EBDA) << 4 == 0x9FC00
    assert word(memory, COM1) == 0x3F8
    assert memory.read(0x9FC00, 1) == b"\1", "the EBDA's size in KiB"


def test_all_vectors_lead_to_a_call_that_fails(memory: GuestMemory, write: Write) -> None:
    load(memory, write(multiboot_elf()))
    vectors = set(struct.iter_unpack("<HH", memory.read(0, 0x400)))
    assert len(vectors) == 1
    offset, segment = vectors.pop()
    assert memory.read((segment << 4) + offset, 4) == bytes.fromhex("f9 ca 02 00")


@pytest.mark.parametrize("start", [0, 0x100, 0x4F0])
def test_an_image_that_lies_there_is_not_touched(
    memory: GuestMemory, write: Write, start: int
) -> None:
    code = bytes(range(1, 256)) * 5
    load(memory, write(code), flat=FlatOptions(Mode.REAL, start))
    assert memory.read(start, len(code)) == code


def test_a_multiboot_image_with_addresses_at_0_is_not_touched(
    memory: GuestMemory, write: Write
) -> None:
    image = multiboot_header(1 << 16, 0, 0, 0, 0, 0).ljust(0x600, b"\xcc")
    load(memory, write(image))
    assert memory.read(0, 0x600) == image


def test_little_ram_has_none_of_it(write: Write) -> None:
    memory = GuestMemory("64K")
    try:
        load(memory, write(b"\xf4"), flat=FlatOptions(Mode.REAL, 0x7C00))
        assert memory.read(0, 0x500) == bytes(0x500)
    finally:
        memory.close()


@pytest.mark.usefixtures("kvm", "nothing_left")
@pytest.mark.parametrize("vector", [0x10, 0x13, 0x15, 0x16])
async def test_a_guest_calls_the_bios(tmp_path: Path, vector: int) -> None:
    """The call comes back with carry set, the other flags, the registers and the stack kept."""
    source = f"""
        xor ax, ax; mov ss, ax; mov sp, 0x7c00; mov bx, 0x1234
        clc; std; int {vector:#x}
        mov cx, 1; jnc done
        mov cx, 2; cmp sp, 0x7c00; jne done
        mov cx, 3; cmp bx, 0x1234; jne done
        mov cx, 42
        done: movzx ecx, cx; {EXIT.format("ecx")}
    """
    async with machine(tmp_path, source, mode="real") as vm:
        assert (await vm.wait()).status == 42
