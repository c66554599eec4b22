"""Where everything lies in a PC guest's physical address space. No other file has these numbers.

Low memory is laid out so that few guests collide with avmm's own data. A real PC keeps firmware
data at the *top* of base memory (the EBDA), so the guests that hard-code low addresses (boot
sectors at 0x7c00, AP trampolines in page 0, at 0x7000 or 0x8000, test kernels linked to 0x8000)
all stay well below 0x90000. So everything that avmm keeps from a guest lies in 0x90000-0x9fc00.
Only the parts that a boot format uses are claimed, and the guest is told that these are reserved:

    0x00000-0x00500    interrupt vectors and BIOS data area, unless the image lies there
    0x00500-0x90000    free, for the image and the guest's own trampolines
    0x90000-0x95000    boot information: hvm_start_info or multiboot information
    0x95000-0x96000    Linux's zero page
    0x96000-0x97000    command line
    0x97000-0x98000    GDT                 (long mode entry only)
    0x98000-0x9e000    page tables         (long mode entry only)
    0x9e000-0x9fc00    first stack         (long mode entry only)
    0x9fc00-0xa0000    EBDA: reserved, with only its size
    0xa0000-0xf0000    video memory and option ROMs on a PC: never reported as RAM
    0xf0000-0x100000   BIOS area: reserved; the MP floating pointer and table, ACPI tables
    0x100000-          the image, as a rule; initrd and modules at the top
"""

from __future__ import annotations

from typing import Final

from avmm.memory.layout import RamLayout

HOLE_START: Final = 0xC000_0000
"""The first GPA of the hole below 4 GiB, in which RAM never lies. The hole belongs to the LAPICs,
the IOAPIC, firmware and MMIO.
"""
HOLE_END: Final = 0x1_0000_0000
"""The first GPA after the hole. RAM that does not fit below the hole continues here."""
GPA_LIMIT: Final = 1 << 52
"""No x86 processor has memory above it."""
RAM: Final = RamLayout(0, HOLE_START, HOLE_END, GPA_LIMIT)

VECTORS: Final = 0
"""Real mode's interrupt vectors."""
BIOS_DATA: Final = 0x400
"""The BIOS data area."""
BIOS_DATA_END: Final = 0x500

BOOT_INFO: Final = 0x9_0000
"""`hvm_start_info` or the multiboot information, and everything that these point to except the
command line.
"""
BOOT_INFO_SIZE: Final = 0x5000

ZERO_PAGE: Final = 0x9_5000
"""Linux's `struct boot_params`."""
ZERO_PAGE_SIZE: Final = 0x1000

CMDLINE: Final = 0x9_6000
CMDLINE_SIZE: Final = 0x1000
"""Bytes for the command line, including its NUL."""
CMDLINE_MAX: Final = CMDLINE_SIZE - 1
"""The longest command line in bytes."""

GDT: Final = 0x9_7000
GDT_ROOM: Final = 0x1000
"""One page is claimed for the GDT. `tables` has the GDT's limit."""

PAGE_TABLES: Final = 0x9_8000
"""A PML4, a PDPT and four page directories of one page each, in this order."""
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
"""MP specification 1.4, section 4: guests search 0xf0000-0xfffff for it on 16-byte boundaries."""
MP_TABLE: Final = MP_FLOATING_POINTER + 16
ACPI: Final = 0xF_8000
"""The RSDP and all tables behind it. ACPI 6.5, 5.2.5.1: guests search the BIOS area for it."""
RESET_VECTOR: Final = 0xF_FFF0
"""Where a PC's firmware starts in real mode. Jumping there is the last way of resetting that
guests try.
"""
GENERATION: Final = 0xF_FF80
"""The generation id (`generation`)."""
BIOS_CALL: Final = 0xF_FF70
"""Where all of real mode's interrupt vectors lead (`lowmem`)."""
ACPI_SIZE: Final = BIOS_CALL - ACPI

HIMEM: Final = 0x10_0000
"""Where extended memory begins."""
INITRD_LIMIT: Final = HOLE_START
"""Initrd and modules end at or below this: their addresses must fit in 32 bits."""

VIRTIO: Final = HOLE_START
"""Where virtio devices get their registers if they have no place of their own."""
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
"""The page tables map guest-physical memory from 0 up to here one to one."""
