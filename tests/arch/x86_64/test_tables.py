"""The layout has no overlaps; the GDT and the page tables mean what a processor reads."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.arch.x86_64 import layout, tables
from avmm.arch.x86_64.layout import HOLE_START
from avmm.memory.ram import GuestMemory

pytestmark = pytest.mark.timeout(60)


def test_layout_ranges_follow_each_other() -> None:
    ranges = [
        (layout.BOOT_INFO, layout.BOOT_INFO_SIZE),
        (layout.ZERO_PAGE, layout.ZERO_PAGE_SIZE),
        (layout.CMDLINE, layout.CMDLINE_SIZE),
        (layout.GDT, layout.GDT_ROOM),
        (layout.PAGE_TABLES, layout.PAGE_TABLES_SIZE),
        (layout.STACK, layout.STACK_TOP - layout.STACK),
        (layout.EBDA, layout.EBDA_END - layout.EBDA),
        (layout.BIOS, layout.BIOS_END - layout.BIOS),
        (layout.MMIO, layout.MMIO_END - layout.MMIO),
        (layout.IOAPIC, 0x1000),
        (layout.LAPIC, 0x1000),
        (layout.KVM_IDENTITY_MAP, 0x1000),
        (layout.KVM_TSS, 0x3000),
    ]
    for (gpa, size), (following, _) in itertools.pairwise(ranges):
        assert gpa + size <= following
    assert layout.BOOT_INFO >= 0x9_0000, "what guests hard-code lies below"
    assert layout.STACK_TOP <= layout.BASE_MEMORY_END == 0x9_FC00
    assert layout.HIMEM == layout.BIOS_END == 0x10_0000
    assert HOLE_START <= layout.MMIO
    assert layout.KVM_TSS + 0x3000 == layout.KVM_PAGES_END
    assert layout.MP_FLOATING_POINTER % 16 == 0


def test_gdt() -> None:
    data = tables.gdt()
    assert len(data) == tables.GDT_LIMIT + 1 <= layout.GDT_ROOM
    assert data[:8] == bytes(8)
    seen = {}
    for selector in (tables.CODE32, tables.CODE64, tables.DATA):
        low, mid, access, high, top = struct.unpack_from("<HHxBBB", data, selector)
        base = mid | data[selector + 4] << 16 | top << 24
        limit = (low | (high & 0xF) << 16) << 12 | 0xFFF
        assert (base, limit) == (0, 0xFFFF_FFFF)
        assert access & 0x90 == 0x90, "present, and not a system segment"
        assert access & 0x60 == 0, "ring 0"
        seen[selector] = (bool(access & 8), bool(high & 0x20), bool(high & 0x40))
    assert seen == {  # executable, long, 32-bit
        tables.CODE32: (True, False, True),
        tables.CODE64: (True, True, False),
        tables.DATA: (False, False, True),
    }
    assert (tables.CODE64, tables.DATA) == (0x10, 0x18), "Linux's boot protocol"


BASE = 0x7_0000
TABLES = tables.page_tables(BASE)


def translate(address: int) -> int | None:
    """As a processor does it: 4 levels, 2 MiB pages in the third."""
    table = BASE
    for shift in (39, 30, 21):
        offset = table - BASE + (address >> shift & 511) * 8
        entry: int = struct.unpack_from("<Q", TABLES, offset)[0]
        if not entry & 1:
            return None
        assert entry & 2, "writable"
        table = entry & 0x000F_FFFF_FFFF_F000
        if shift == 21:
            assert entry & 0x80, "a large page"
            assert table % (2 << 20) == 0
            return table + address % (2 << 20)
        assert not entry & 0x80
    raise AssertionError


@given(st.integers(0, (4 << 30) - 1))
def test_first_4_gib_are_mapped_one_to_one(address: int) -> None:
    assert translate(address) == address


@given(st.integers(4 << 30, (1 << 47) - 1))
def test_nothing_else_is_mapped(address: int) -> None:
    assert translate(address) is None


def test_written_where_layout_says(memory: GuestMemory) -> None:
    tables.write_long_mode_tables(memory)
    size = layout.PAGE_TABLES_SIZE
    assert memory.read(layout.PML4, size) == tables.page_tables(layout.PAGE_TABLES)
    assert memory.read(layout.GDT, tables.GDT_LIMIT + 1) == tables.gdt()
