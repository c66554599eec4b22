"""The GDT and the page tables with which a guest is entered in long mode.

Only a long mode entry gets them. The two 32-bit entries, PVH and multiboot, do not promise the
guest a GDT (multiboot 3.2: "GDTR may be invalid"), so they use no low memory for one.

Where Linux's boot protocol names selectors, these are the same (Documentation/arch/x86/boot.rst,
"64-bit boot protocol": `__BOOT_CS` 0x10 is 64-bit code, `__BOOT_DS` 0x18 is data), so that one GDT
serves all.
"""

from __future__ import annotations

import struct
from typing import Final

from avmm.arch.x86_64 import layout
from avmm.memory.ram import GuestMemory

CODE32: Final = 0x08
CODE64: Final = 0x10
DATA: Final = 0x18

# Intel SDM vol. 3, 3.4.5. Flat, present, ring 0, 4 GiB; "accessed" is set already, so that the
# processor never writes to the GDT.
_DESCRIPTORS: Final = {
    0x00: 0,
    CODE32: 0x00CF_9B00_0000_FFFF,
    CODE64: 0x00AF_9B00_0000_FFFF,
    DATA: 0x00CF_9300_0000_FFFF,
}
GDT_LIMIT: Final = 8 * len(_DESCRIPTORS) - 1
"""The limit for GDTR, which is the offset of the last byte."""

# Intel SDM vol. 3, 4.5. "Accessed" and "dirty" are set already, for the same reason.
_TABLE: Final = 1 << 0 | 1 << 1 | 1 << 5
"""Present, writable, accessed."""
_LARGE_PAGE: Final = _TABLE | 1 << 6 | 1 << 7
"""The same, dirty, and a 2 MiB page."""
_DIRECTORIES: Final = layout.IDENTITY_MAPPED_END >> 30


def gdt() -> bytes:
    """A GDT with a null descriptor, and with code and data segments at the selectors `CODE32`,
    `CODE64` and `DATA`.
    """
    return struct.pack(f"<{len(_DESCRIPTORS)}Q", *_DESCRIPTORS.values())


def page_tables(base: int) -> bytes:
    """Page tables for `base` that map the first 4 GiB one to one with 2 MiB pages: a PML4, a PDPT
    and a page directory for each GiB, of one page each, in this order.
    """
    pdpt, directories = base + 0x1000, base + 0x2000
    tops = [pdpt | _TABLE] + [0] * 511
    tops += [directories + 0x1000 * i | _TABLE for i in range(_DIRECTORIES)]
    tops += [0] * (512 - _DIRECTORIES)
    pages = [i << 21 | _LARGE_PAGE for i in range(512 * _DIRECTORIES)]
    return struct.pack(f"<{len(tops) + len(pages)}Q", *tops, *pages)


def write_long_mode_tables(memory: GuestMemory) -> None:
    """Write the GDT and the page tables to their places in `layout`. CR3 must be `layout.PML4`,
    and GDTR's base `layout.GDT`.
    """
    memory.write(layout.GDT, gdt())
    memory.write(layout.PAGE_TABLES, page_tables(layout.PAGE_TABLES))
