"""What lies where in a PC guest's physical address space: the one owner of these numbers.

Low memory is laid out so that it is hard to trip over. A real PC keeps firmware data at the
*top* of base memory (the EBDA), so the guests that hard-code low addresses (boot sectors at
0x7c00, AP trampolines in page 0, at 0x7000 or 0x8000, test kernels linked to 0x8000) all stay
well below 0x90000. Everything that avmm hides from a guest therefore lies in
0x90000-0x9fc00, and only the parts that a boot format uses are claimed and told as reserved:

    0x00000-0x90000    free, for the image and the guest's own trampolines
    0x90000-0x95000    boot information: hvm_start_info or multiboot information
    0x95000-0x96000    Linux's zero page
    0x96000-0x97000    command line
    0x97000-0x98000    GDT                 (long mode entry only)
    0x98000-0x9e000    page tables         (long mode entry only)
    0x9e000-0x9fc00    first stack         (long mode entry only)
    0x9fc00-0xa0000    EBDA: reserved, left empty
    0xa0000-0xf0000    video memory and option ROMs on a PC: never told as RAM
    0xf0000-0x100000   BIOS area: reserved; the MP floating pointer and table, ACPI tables
    0x100000-          the image, as a rule; initrd and modules at the top
"""

from __future__ import annotations

from typing import Final

from avmm.memory.layout import RamLayout

HOLE_START: Final = 0xC000_0000
"""First GPA of the hole below 4 GiB in which RAM never lies: it belongs to the LAPICs, the IOAPIC,
firmware and MMIO."""
HOLE_END: Final = 0x1_0000_0000
"""First GPA after the hole: RAM that did not fit below goes on here."""
GPA_LIMIT: Final = 1 << 52
"""Above it no x86 processor has memory."""
RAM: Final = RamLayout(0, HOLE_START, HOLE_END, GPA_LIMIT)

BOOT_INFO: Final = 0x9_0000
"""`hvm_start_info` or the multiboot information, and all that they point to but the command
line."""
BOOT_INFO_SIZE: Final = 0x5000

ZERO_PAGE: Final = 0x9_5000
"""Linux's `struct boot_params`."""
ZERO_PAGE_SIZE: Final = 0x1000

CMDLINE: Final = 0x9_6000
CMDLINE_SIZE: Final = 0x1000
"""The command line's room, its NUL included."""
CMDLINE_MAX: Final = CMDLINE_SIZE - 1
"""The longest command line in bytes."""

GDT: Final = 0x9_7000
GDT_ROOM: Final = 0x1000
"""What is claimed for the GDT: a page. Its limit is in `tables`."""

PAGE_TABLES: Final = 0x9_8000
"""PML4, PDPT and four page directories, a page each, in this order."""
PAGE_TABLES_SIZE: Final = 6 * 0x1000
PML4: Final = PAGE_TABLES
"""CR3 for an entry in long mode."""

STACK: Final = 0x9_E000
"""The lowest address of the stack that a long mode entry starts with."""
STACK_TOP: Final = 0x9_FC00

BASE_MEMORY_END: Final = 0x9_FC00
"""Where conventional memory ends (639 KiB)."""
EBDA: Final = BASE_MEMORY_END
EBDA_END: Final = 0xA_0000
BIOS: Final = 0xF_0000
"""The BIOS ROM's area, in which guests look for tables."""
BIOS_END: Final = 0x10_0000
MP_FLOATING_POINTER: Final = BIOS
"""MP spec 1.4, section 4: guests search 0xf0000-0xfffff for it on 16-byte boundaries."""
MP_TABLE: Final = MP_FLOATING_POINTER + 16
ACPI: Final = 0xF_8000
"""The RSDP and all tables behind it; ACPI 6.5, 5.2.5.1: guests search the BIOS area."""
RESET_VECTOR: Final = 0xF_FFF0
"""Where a PC's firmware begins in real mode: the last way to reset that guests try."""
ACPI_SIZE: Final = RESET_VECTOR - ACPI

HIMEM: Final = 0x10_0000
"""Where extended memory begins."""
INITRD_LIMIT: Final = HOLE_START
"""Initrd and modules end at or below this: their addresses must fit in 32 bits."""

VIRTIO: Final = HOLE_START
"""Where virtio devices get their registers that have no place of their own."""
VIRTIO_STEP: Final = 0x1000
VIRTIO_END: Final = 0xD000_0000
MMIO: Final = 0xD000_0000
"""The window that is kept free for devices which are placed by hand."""
MMIO_END: Final = 0xE000_0000
POWER_PORT: Final = 0x600
"""Sleep control, sleep status and reset (`avmm.devices.pc.power`)."""
IOAPIC: Final = 0xFEC0_0000
LAPIC: Final = 0xFEE0_0000
KVM_IDENTITY_MAP: Final = 0xFFFB_C000
"""One page for KVM_SET_IDENTITY_MAP_ADDR (KVM's own default)."""
KVM_TSS: Final = 0xFFFB_D000
"""Three pages for KVM_SET_TSS_ADDR."""
KVM_PAGES_END: Final = 0xFFFC_0000

IDENTITY_MAPPED_END: Final = HOLE_END
"""The page tables map GPA 0 up to here one to one."""
