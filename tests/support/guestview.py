"""What a guest reads from its memory: parsers for the boot information, as guests have them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from avmm.memory.ram import GuestMemory

Map = list[tuple[int, int, int]]
"""Address, size, type."""


@dataclass
class Told:
    """The boot information, whatever its format."""

    cmdline: bytes
    modules: list[tuple[int, bytes, bytes]]
    """Address, content, string."""
    memory_map: Map
    mem: tuple[int, int] = (0, 0)
    """mem_lower and mem_upper (multiboot)."""
    loader: bytes = b""
    rsdp: int = 0
    """Where ACPI begins (PVH)."""


def string(memory: GuestMemory, gpa: int) -> bytes:
    data = memory.read(gpa, 4096 if gpa % 4096 == 0 else 4096 - gpa % 4096)
    assert b"\0" in data
    return data[: data.index(0)]


def start_info(memory: GuestMemory, gpa: int) -> Told:
    """hvm_start_info (xen/include/public/arch-x86/hvm/start_info.h)."""
    magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap, entries, zero = (
        struct.unpack("<IIIIQQQQII", memory.read(gpa, 56))
    )
    assert (magic, version, flags, zero) == (0x336EC578, 1, 0, 0)
    assert modlist % 8 == memmap % 8 == gpa % 8 == 0
    modules = []
    for index in range(nr_modules):
        address, size, text, rest = struct.unpack("<4Q", memory.read(modlist + 32 * index, 32))
        assert rest == 0
        modules.append((address, memory.read(address, size), string(memory, text)))
    assert modules or modlist == 0
    memory_map = []
    for index in range(entries):
        *entry, rest = struct.unpack("<QQII", memory.read(memmap + 24 * index, 24))
        assert rest == 0
        memory_map.append(tuple(entry))
    return Told(string(memory, cmdline), modules, memory_map, rsdp=rsdp)


def multiboot(memory: GuestMemory, gpa: int) -> Told:
    """The information structure of multiboot 0.6.96, 3.3."""
    info = memory.read(gpa, 116)
    flags, lower, upper, device, cmdline, count, mods = struct.unpack_from("<7I", info)
    length, address = struct.unpack_from("<II", info, 44)
    (loader,) = struct.unpack_from("<I", info, 64)
    assert flags == 0b10_0100_1101
    assert device == 0
    modules = []
    for index in range(count):
        start, end, text, rest = struct.unpack("<4I", memory.read(mods + 16 * index, 16))
        assert rest == 0
        assert start % 4096 == 0
        modules.append((start, memory.read(start, end - start), string(memory, text)))
    memory_map, at = [], address
    while at < address + length:  # `size` does not count itself
        size, base, span, kind = struct.unpack("<IQQI", memory.read(at, 24))
        memory_map.append((base, span, kind))
        at += size + 4
    return Told(
        string(memory, cmdline), modules, memory_map, (lower, upper), string(memory, loader)
    )
