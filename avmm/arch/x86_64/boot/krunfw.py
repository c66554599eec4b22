"""libkrunfw: a shared object that carries a Linux kernel as data, as libkrun's users ship it.

The symbol KERNEL_BUNDLE is the kernel, laid out as it is to lie in memory.
`krunfw_get_kernel(size_t *load, size_t *entry, size_t *size)` returns where it is loaded and where
it is entered. The code of that function contains the three numbers as constants. Nothing in the
object is executed: its symbols are read, and the constants are taken from the instructions that
store them (`mov qword ptr [reg], imm32`, 48 c7 /0). The entry is that of Linux's 64-bit boot
protocol.

Source: libkrunfw's bin2cbundle.py, which writes both.
"""

from __future__ import annotations

import logging
import re
import struct
from dataclasses import dataclass
from typing import Final

from avmm.arch.x86_64.boot import longmode, zeropage
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.boot.cmdline import has
from avmm.boot.elf_headers import MAX_PROGRAM_HEADERS, Structs
from avmm.boot.entry import Entry, Protocol
from avmm.boot.image import Image

logger = logging.getLogger(__name__)

_TYPE_AT: Final = 16
_ET_DYN: Final = b"\x03\x00"
_MACHINE: Final = b"\x3e\x00"
_MOST_SECTIONS: Final = 4 * MAX_PROGRAM_HEADERS
_MOST_SYMBOLS: Final = 1 << 16
_LONGEST_NAME: Final = 256
"""Longer names are not looked for. The limit also bounds the time for a table of names that have
no end.
"""
_MOST_CODE: Final = 1 << 12
_KERNEL: Final = "KERNEL_BUNDLE"
_GETTER: Final = "krunfw_get_kernel"
# REX.W C7 /0 without a displacement, through rax, rdx, rsi or rdi. The last three are the
# arguments themselves, through which optimised code stores. Unoptimised code loads each argument
# into rax first.
_STORE: Final = re.compile(rb"\x48\xc7([\x00\x02\x06\x07])(.{4})", re.DOTALL)
_ARGUMENTS: Final = {0x07: 0, 0x06: 1, 0x02: 2}
_ROOM_BEHIND: Final = 16 << 20
"""The bundle contains only what the file has. Behind it, the kernel needs this room for its .bss
and its first page tables.
"""


@dataclass(frozen=True, slots=True)
class Bundle:
    """The kernel in the file, and where it belongs in memory."""

    offset: int
    size: int
    address: int
    entry: int


def find(image: Image) -> Bundle | None:
    """The kernel that a shared object carries. None if the object is not a libkrunfw.

    Raises `ImageError` if it is a libkrunfw that avmm does not understand.
    """
    head = image.head(64)
    if (
        len(head) < 64
        or head[4:6] != b"\x02\x01"
        or head[_TYPE_AT : _TYPE_AT + 4] != (_ET_DYN + _MACHINE)
    ):
        return None
    symbols = _symbols(image)
    if _KERNEL not in symbols:
        return None
    if _GETTER not in symbols:
        raise image.error(f"has {_KERNEL}, but not {_GETTER}, which says where the kernel belongs")
    offset, size = symbols[_KERNEL]
    at, length = symbols[_GETTER]
    code = image.read(at, min(length, _MOST_CODE), _GETTER)
    values = _constants(code)
    if values is None:
        raise image.error(
            f"{_GETTER} does not store three constants: avmm does not know this kind of libkrunfw"
        )
    address, entry, told = values
    if not (0 < told <= size and address <= entry < address + told):
        raise image.error(
            f"describes a kernel of {told} bytes at {address:#x} that is entered at "
            f"{entry:#x}, in {size} bytes of data: expected the entry to lie in the kernel, "
            "and the kernel in the data"
        )
    image.check(offset, told, _KERNEL)
    return Bundle(offset, told, address, entry)


def load(assembly: Assembly, image: Image, bundle: Bundle, protocol: Protocol) -> Entry:
    """Copy the kernel to its place. It is entered as `longmode` says.

    libkrun's kernels are built without ACPI and without a serial port: devices are named on the
    command line, and a console must be a virtio one. Raises `ImageError` if the protocol is PVH.
    """
    if protocol is Protocol.PVH:
        raise image.error(
            f"is a libkrunfw, which is entered by Linux's 64-bit boot protocol; expected the "
            f"protocol {Protocol.LINUX64.value!r}, or none"
        )
    assembly.name_devices()
    assembly.longest_cmdline = zeropage.LINUX_CMDLINE_MAX
    if not has(assembly.cmdline, "console"):
        logger.warning(
            "%s: this kernel has no serial console: it prints nothing without a virtio console "
            "and console=hvc0, which --console virtio gives it",
            image.name,
        )
    longmode.claim(assembly)
    assembly.claims.claim(bundle.address, bundle.size, f"{image.name}: the kernel")
    behind = bundle.address + bundle.size
    room = min(_ROOM_BEHIND, max(assembly.memory.ram[0].end - behind, 0))
    assembly.claims.claim(behind, room, f"{image.name}: the kernel's room for its own data")
    assembly.load(image, bundle.offset, bundle.size, bundle.address)
    return longmode.enter(assembly, bundle.entry)


def _constants(code: bytes) -> tuple[int, int, int] | None:
    found: dict[int, int] = {}
    for number, match in enumerate(_STORE.finditer(code)):
        register = match[1][0]
        found[_ARGUMENTS.get(register, number)] = struct.unpack("<i", match[2])[0]
    return (found[0], found[1], found[2]) if sorted(found) == [0, 1, 2] else None


def _symbols(image: Image) -> dict[str, tuple[int, int]]:
    """The dynamic symbols that have data in the file: (offset, size) by name."""
    structs = Structs(image, 64, little_endian=True)
    header = structs.header(image.read(0, 64, "the ELF header"))
    count, size = header["e_shnum"], header["e_shentsize"]
    if not 0 < count <= _MOST_SECTIONS or size != structs.section_size:
        return {}
    table = image.read(header["e_shoff"], count * size, "the section header table")
    sections = [structs.section(table[at * size :][:size]) for at in range(count)]
    dynamic = next((s for s in sections if s["sh_type"] == "SHT_DYNSYM"), None)
    if dynamic is None or dynamic["sh_link"] >= count:
        return {}
    names = sections[dynamic["sh_link"]]
    entry = structs.symbol_size
    if dynamic["sh_size"] > entry * _MOST_SYMBOLS or names["sh_size"] > entry * _MOST_SYMBOLS:
        raise image.error(f"has more than {_MOST_SYMBOLS} dynamic symbols")
    data = image.read(dynamic["sh_offset"], dynamic["sh_size"], "the dynamic symbols")
    text = image.read(names["sh_offset"], names["sh_size"], "the symbols' names")
    symbols = {}
    for at in range(0, len(data) - entry + 1, entry):
        symbol = structs.symbol(data[at : at + entry])
        index = symbol["st_shndx"]
        if not isinstance(index, int) or not 0 < index < count:
            continue
        start = symbol["st_name"]
        end = text.find(b"\0", start, start + _LONGEST_NAME)
        if end < 0:
            continue
        name = text[start:end].decode("ascii", "replace")
        section = sections[index]
        offset = section["sh_offset"] + symbol["st_value"] - section["sh_addr"]
        symbols[name] = (offset, symbol["st_size"])
    return symbols
