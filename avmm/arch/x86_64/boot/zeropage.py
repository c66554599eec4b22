"""Linux's zero page (`struct boot_params`): the boot information of its 64-bit boot protocol.

Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and zero-page.rst: it has the setup
header, the memory map, and the addresses of the initrd, the command line and ACPI's tables. Linux
takes a single initrd, which is the first module.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.boot.assembly import Assembly, Module

HEADER: Final = 0x1F1
"""Where the setup header begins, both in a bzImage and in the zero page."""

# Offsets in struct boot_params (arch/x86/include/uapi/asm/bootparam.h).
_ACPI_RSDP: Final = 0x70
_E820_ENTRIES: Final = 0x1E8
_BOOT_FLAG: Final = 0x1FE
_MAGIC: Final = 0x202
_VERSION: Final = 0x206
_TYPE_OF_LOADER: Final = 0x210
_LOADFLAGS: Final = 0x211
_RAMDISK: Final = 0x218
_CMDLINE: Final = 0x228
_INITRD_ADDR_MAX: Final = 0x22C
_CMDLINE_SIZE: Final = 0x238
_HEADER_END: Final = 0x290
_E820_TABLE: Final = 0x2D0
_E820_MOST: Final = 128
_E820_ENTRY: Final = struct.Struct("<QQI")

LINUX_CMDLINE_MAX: Final = 2047
"""The longest command line that Linux takes on x86 (COMMAND_LINE_SIZE in asm/setup.h, with its
NUL). A bzImage's header says so itself."""
_UNDEFINED_LOADER: Final = 0xFF
_LOADED_HIGH: Final = 1 << 0
_NEWEST_KNOWN: Final = 0x20F


def own_header(longest_cmdline: int) -> bytes:
    """A setup header for an image that comes without one."""
    page = bytearray(_CMDLINE_SIZE + 4)
    struct.pack_into("<H", page, _BOOT_FLAG, 0xAA55)
    struct.pack_into("<4sH", page, _MAGIC, b"HdrS", _NEWEST_KNOWN)
    struct.pack_into("<B", page, _LOADFLAGS, _LOADED_HIGH)
    struct.pack_into("<I", page, _INITRD_ADDR_MAX, layout.INITRD_LIMIT - 1)
    struct.pack_into("<I", page, _CMDLINE_SIZE, longest_cmdline)
    return bytes(page[HEADER:])


def initrd_limit(header: bytes) -> int:
    """The address below which a kernel with this header accepts its initrd."""
    (highest,) = struct.unpack_from("<I", header, _INITRD_ADDR_MAX - HEADER)
    return min(int(highest) + 1, layout.INITRD_LIMIT)


def longest_cmdline(header: bytes) -> int:
    """How many bytes of command line a kernel with this header takes."""
    (longest,) = struct.unpack_from("<I", header.ljust(_HEADER_END), _CMDLINE_SIZE - HEADER)
    return min(int(longest), layout.CMDLINE_MAX)


def write(assembly: Assembly, modules: Sequence[Module], header: bytes) -> None:
    """Write the zero page to `layout.ZERO_PAGE`. All claims must have been made before."""
    page = bytearray(layout.ZERO_PAGE_SIZE)
    header = header[: _HEADER_END - HEADER]
    page[HEADER : HEADER + len(header)] = header
    page[_TYPE_OF_LOADER] = _UNDEFINED_LOADER
    struct.pack_into("<I", page, _CMDLINE, layout.CMDLINE)
    struct.pack_into("<II", page, _RAMDISK, 0, 0)
    for module in modules[:1]:
        struct.pack_into("<II", page, _RAMDISK, module.gpa, module.size)
    struct.pack_into("<Q", page, _ACPI_RSDP, assembly.rsdp)
    entries = assembly.claims.memory_map()[:_E820_MOST]
    page[_E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        at = _E820_TABLE + index * _E820_ENTRY.size
        _E820_ENTRY.pack_into(page, at, entry.gpa, entry.size, entry.kind)
    assembly.memory.write(layout.ZERO_PAGE, bytes(page))
