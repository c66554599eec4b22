"""Multiboot 1, version 0.6.96: https://www.gnu.org/software/grub/manual/multiboot/

The header is searched for in the first 8192 bytes (3.1). Its flags 0-15 may demand things of the
loader. Page-aligned modules (bit 0) and memory information (bit 1) are always given. Everything
else cannot be given and is refused, as 3.1.2 demands. That includes a video mode (bit 2): there is
no display. (QEMU only warns, but a guest that draws into nothing is harder to debug.)

With bit 16 the header itself gives the load addresses, whatever the format of the file. 64-bit
kernels use multiboot this way. Without it the file must be a 32-bit ELF, as GRUB and QEMU demand.
That is why kvm-unit-tests, for example, convert their 64-bit programs (`objcopy -O elf32-i386`).

As GRUB and QEMU do, the command line is the image's path, a space and the arguments, and a
module's string is its path: guests drop the first word.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.boot import elf, pie
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.arch.x86_64.boot.infoblock import InfoBlock
from avmm.boot.claims import MapEntry, MapKind
from avmm.boot.elf_headers import parse
from avmm.boot.entry import Entry, Mode
from avmm.boot.image import Image

SEARCH: Final = 8192
HEADER_MAGIC: Final = 0x1BAD_B002
LOADER_MAGIC: Final = 0x2BAD_B002
"""The value of EAX at the entry (3.2)."""

_PAGE_ALIGN, _MEMORY_INFO, _VIDEO = 1 << 0, 1 << 1, 1 << 2
_REQUIREMENTS: Final = 0xFFFF
_ADDRESSES: Final = 1 << 16

_INFO_FLAGS: Final = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
"""Fields that are valid (3.3): memory, command line, modules, memory map, loader's name."""
_INFO: Final = struct.Struct("<IIIIIII16xII12xI24x")
"""flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, (symbols),
mmap_length, mmap_addr, (drives, config table), boot_loader_name, (APM, VBE)"""
_MODULE: Final = struct.Struct("<IIII")
"""mod_start, mod_end, string, 0"""
_MMAP: Final = struct.Struct("<IQQI")
"""size of what follows, base_addr, length, type"""


@dataclass(frozen=True, slots=True)
class Addresses:
    """The address fields of the header (3.1.3). They replace the headers of an executable."""

    header: int
    load: int
    load_end: int
    bss_end: int
    entry: int


@dataclass(frozen=True, slots=True)
class MultibootHeader:
    """A multiboot header: its offset in the file, and what it says."""

    offset: int
    flags: int
    addresses: Addresses | None


def find(image: Image) -> MultibootHeader | None:
    """The file's multiboot header; None if there is none. Raises `ImageError` if the header is cut
    off.
    """
    head = image.head(SEARCH)
    for offset in range(0, len(head) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", head, offset)
        if magic != HEADER_MAGIC or (magic + flags + checksum) & 0xFFFF_FFFF:
            continue
        if not flags & _ADDRESSES:
            return MultibootHeader(offset, flags, None)
        if len(head) < offset + 32:
            raise image.error(
                f"has a multiboot header at {offset:#x} that does not end within its first "
                f"{len(head)} bytes"
            )
        addresses = Addresses(*struct.unpack_from("<5I", head, offset + 12))
        return MultibootHeader(offset, flags, addresses)
    return None


def load(assembly: Assembly, image: Image, header: MultibootHeader) -> Entry:
    """Load the image as its header says, and the modules, and write the boot information."""
    refused = header.flags & _REQUIREMENTS & ~(_PAGE_ALIGN | _MEMORY_INFO)
    if refused:
        why = (
            "a video mode, but there is no display"
            if refused & _VIDEO
            else "something that avmm does not know"
        )
        raise image.error(
            f"demands {why}, in its multiboot header: of the flags {header.flags:#x}, "
            f"{refused:#x} cannot be fulfilled"
        )
    assembly.claim_boot_info()
    if header.addresses is not None:
        ip = _load_by_addresses(assembly, image, header.offset, header.addresses)
    else:
        ip = _load_elf(assembly, image)
    info = _write_info(assembly)
    return Entry(Mode.PROTECTED, ip, {"rax": LOADER_MAGIC, "rbx": info})


def _load_elf(assembly: Assembly, image: Image) -> int:
    executable = pie.placed(parse(image), assembly.memory)
    if executable.bits != 32:
        raise image.error(
            "is a 64-bit ELF with a multiboot header that has no load addresses; expected a "
            "32-bit ELF (objcopy -O elf32-i386), or flag 16 with the address fields"
        )
    ip = elf.physical_entry(executable)
    elf.load_segments(assembly, executable)
    return ip


def _load_by_addresses(assembly: Assembly, image: Image, offset: int, at: Addresses) -> int:
    """Load what the address fields describe (3.1.3). Returns the entry point."""
    start = offset - (at.header - at.load)
    if at.load > at.header or start < 0:
        raise image.error(
            f"has a multiboot header at offset {offset:#x} for address {at.header:#x}, but "
            f"its load_addr {at.load:#x} would lie before the file's first byte or behind the "
            "header"
        )
    size = at.load_end - at.load if at.load_end else image.size - start
    if size < 0:
        raise image.error(
            f"has load_end_addr {at.load_end:#x} below load_addr {at.load:#x} in its "
            f"multiboot header"
        )
    image.check(start, size, "what its multiboot header says to load")
    end = max(at.bss_end, at.load + size)
    if at.bss_end and at.bss_end < at.load + size:
        raise image.error(
            f"has bss_end_addr {at.bss_end:#x} below the end of what is loaded, "
            f"{at.load + size:#x}, in its multiboot header"
        )
    if not at.load <= at.entry < end:
        raise image.error(
            f"has the entry point {at.entry:#x} in its multiboot header, outside the image at "
            f"{at.load:#x}-{end:#x}"
        )
    assembly.claims.claim(at.load, end - at.load, image.name)
    assembly.load(image, start, size, at.load)
    return at.entry


def _write_info(assembly: Assembly) -> int:
    """Load the modules and write the multiboot information (3.3). Returns its address."""
    modules = assembly.load_modules()
    name, arguments = assembly.name, assembly.cmdline
    assembly.write_cmdline(f"{name} {arguments}" if arguments else name)
    block = InfoBlock(_INFO.size)
    listed = [_MODULE.pack(m.gpa, m.end, block.add_string(m.name), 0) for m in modules]
    memory_map = assembly.claims.memory_map()
    mmap = b"".join(_MMAP.pack(_MMAP.size - 4, e.gpa, e.size, e.kind) for e in memory_map)
    return block.write(
        assembly.memory,
        _INFO.pack(
            _INFO_FLAGS,
            _ram_from(memory_map, 0) >> 10,
            _ram_from(memory_map, layout.HIMEM) >> 10,
            0,
            layout.CMDLINE,
            len(modules),
            block.add(b"".join(listed)),
            len(mmap),
            block.add(mmap),
            block.add_string("avmm"),
        ),
    )


def _ram_from(memory_map: Iterable[MapEntry], gpa: int) -> int:
    """The number of bytes of RAM from `gpa` on, without a gap (mem_lower, mem_upper)."""
    for entry in memory_map:
        if entry.kind is MapKind.RAM and entry.gpa <= gpa < entry.end:
            return entry.end - gpa
    return 0
