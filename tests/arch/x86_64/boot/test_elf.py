"""Plain ELF: where segments go, where it starts, what it finds, and all that is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import guestview
from support.images import PT_INTERP, PT_NOTE, Elf, Segment, note

from avmm.arch.x86_64 import layout, tables
from avmm.arch.x86_64.boot.load import load
from avmm.arch.x86_64.layout import RAM
from avmm.boot import Mode
from avmm.errors import ImageError
from avmm.memory.ram import GuestMemory

pytestmark = pytest.mark.timeout(60)
Write = Callable[..., Path]


def failure(memory: GuestMemory, path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        load(memory, path)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_long_mode_entry(memory: GuestMemory, write: Write) -> None:
    code = bytes(range(1, 200))
    elf = Elf([Segment(code, memsz=0x3000), Segment(b"data", paddr=0x104000)], entry=0x100010)
    initrd = write(b"initrd" * 1000, "initrd")
    entry = load(memory, write(elf), cmdline="a b", initrd=initrd)
    assert (entry.mode, entry.ip) == (Mode.LONG, 0x100010)
    assert set(entry.registers) == {"rdi", "rsi", "rsp"}
    assert memory.read(0x100000, 0x3000) == code + bytes(0x3000 - len(code))
    assert memory.read(0x104000, 4) == b"data"
    assert memory.read(layout.GDT, tables.GDT_LIMIT + 1) == tables.gdt()
    size = layout.PAGE_TABLES_SIZE
    assert memory.read(layout.PML4, size) == tables.page_tables(layout.PML4)
    rsp = entry.registers["rsp"]
    assert rsp % 16 == 8, "as behind a call"
    assert layout.STACK <= rsp < rsp + 8 <= layout.STACK_TOP
    assert memory.read(rsp, 8) == bytes(8), "the return address"
    told = guestview.start_info(memory, entry.registers["rdi"])
    assert told.cmdline == b"a b"
    [(address, content, name)] = told.modules
    assert (address, content, name) == (0xFFE000, b"initrd" * 1000, bytes(initrd))
    assert told.memory_map[:2] == [(0, 0x90000, 1), (0x90000, 0x10000, 2)], "all in use"


def test_bss_is_claimed_but_not_touched(write: Write) -> None:
    memory = GuestMemory("64M", layout=RAM)
    try:
        load(memory, write(Elf([Segment(b"x", memsz=48 << 20)])))
        resident = memory_blocks(memory)
        assert resident < 1 << 20
    finally:
        memory.close()


def memory_blocks(memory: GuestMemory) -> int:
    """How many bytes of the memfd exist."""
    stat = Path(f"/proc/self/fd/{memory.fd}").stat()
    return stat.st_blocks * 512


def test_entry_is_translated_by_its_segment(memory: GuestMemory, write: Write) -> None:
    high = 0xFFFFFFFF_80000000
    elf = Elf(
        [
            Segment(b"percpu", paddr=0x300000, vaddr=0, memsz=0x1000, flags=6),
            Segment(b"code", paddr=0x200000, vaddr=high, memsz=0x1000),
        ],
        entry=high + 0x20,
    )
    assert load(memory, write(elf)).ip == 0x200020


def test_physical_entry_as_in_vmlinux(memory: GuestMemory, write: Write) -> None:
    high = 0xFFFFFFFF_80000000
    percpu = Segment(b"percpu", paddr=0x300000, vaddr=0, memsz=0x210000, flags=6)
    code = Segment(b"code", paddr=0x200000, vaddr=high, memsz=0x1000)
    elf = Elf([percpu, code], entry=0x200010)
    assert load(memory, write(elf)).ip == 0x200010, "not the non-executable one's 0x500010"


def test_an_entry_in_a_segment_that_is_not_executable(memory: GuestMemory, write: Write) -> None:
    """As in Linux from 6.18 on: one segment of text, and one of data with the physical entry."""
    high = 0xFFFFFFFF_81000000
    text = Segment(b"text", paddr=0x200000, vaddr=high, memsz=0x1000, flags=5)
    data = Segment(b"data", paddr=0x300000, vaddr=high + 0x100000, memsz=0x1000, flags=6)
    assert load(memory, write(Elf([text, data], entry=0x300123))).ip == 0x300123


def test_segments_without_execute_flag_count_where_none_has_it(
    memory: GuestMemory, write: Write
) -> None:
    elf = Elf([Segment(b"code", paddr=0x200000, vaddr=0, flags=6)], entry=2)
    assert load(memory, write(elf)).ip == 0x200002


@pytest.mark.parametrize("entry", [0, 0xFFFFF, 0x100010, 1 << 63])
def test_entry_outside(memory: GuestMemory, write: Write, entry: int) -> None:
    assert f"entry point at {entry:#x}, which is not in" in failure(
        memory, write(Elf(entry=entry))
    )


def test_entry_above_4_gib(write: Write) -> None:
    memory = GuestMemory("3100M", layout=RAM)
    try:
        text = failure(memory, write(Elf([Segment(b"x", paddr=4 << 30)], entry=4 << 30)))
        assert "entry point at 0x100000000; expected one below 4 GiB" in text
        two = [Segment(b"high", paddr=4 << 30), Segment(b"low")]
        assert load(memory, write(Elf(two))).ip == 0x100000
        assert memory.read(4 << 30, 4) == b"high"
    finally:
        memory.close()


HEADERS = {
    "class": (Elf(elf_class=3), "has ELF class 3; expected 1 (32-bit) or 2 (64-bit)"),
    "encoding": (Elf(encoding=3), "has ELF data encoding 3"),
    "big endian": (Elf(encoding=2), "64-bit big endian ELF for X86_64; expected a little"),
    "sparc": (Elf(encoding=2, machine=43), "64-bit big endian ELF for SPARCV9; expected"),
    "aarch64": (Elf(machine=183), "64-bit little endian ELF for AARCH64; expected"),
    "unknown": (Elf(machine=0xEEEE), "for machine 61166; expected"),
    "x32": (Elf(bits=32, machine=62), "is a 32-bit ELF for EM_X86_64; expected EM_386"),
    "32-bit": (Elf(bits=32), "32-bit ELF without a PVH note or a multiboot header"),
    "object": (Elf(kind=1), "an object file; expected a linked executable"),
    "library": (Elf(kind=3, entry=0), "is a shared library; expected a kernel, or a static PIE"),
    "core": (Elf(kind=4), "a core dump"),
    "type": (Elf(kind=77), "of type 77; expected ET_EXEC"),
    "none": (Elf([]), "has no program headers"),
    "too many": (Elf(phnum=129), "has 129 program headers; at most 128"),
    "most": (Elf(phnum=0xFFFF), "has 65535 program headers; at most 128"),
    "cut off table": (Elf(phnum=128), "the program header table should be the 7168 bytes at"),
    "table far away": (Elf(phoff=1 << 63), "the program header table should be"),
    "header size": (Elf(phentsize=32), "program headers of 32 bytes; expected 56"),
    "dynamic": (
        Elf([Segment(b"x"), Segment(b"ld.so", kind=PT_INTERP)]),
        "dynamically linked program",
    ),
    "nothing to load": (Elf([Segment(b"x", kind=PT_NOTE)]), "has no loadable segment"),
    "empty segment": (Elf([Segment(b"")]), "has no loadable segment"),
    "not in the file": (Elf([Segment(b"x", filesz=1000)]), "segment 0 should be the 1000 bytes"),
    "offset": (Elf([Segment(b"x", offset=1 << 62)]), "segment 0 should be the 1 bytes at offset"),
    "wrap": (
        Elf([Segment(b"x", offset=(1 << 64) - 1, filesz=2, memsz=2)]),
        "segment 0 should be the 2 bytes at offset 0xffffffffffffffff",
    ),
    "file above memory": (
        Elf([Segment(b"xyz", memsz=2)]),
        "segment 0 has 3 bytes in the file, more than its 2 in memory",
    ),
    "too big": (
        Elf([Segment(b"x", memsz=16 << 20)]),
        "FILE: segment 0 at 0x100000-0x1100000 lies outside guest RAM (0x0-0x1000000)",
    ),
    "absurd": (Elf([Segment(b"x", memsz=(1 << 64) - 1)]), "lies outside guest RAM"),
    "far": (Elf([Segment(b"x", paddr=1 << 63)], entry=1 << 63), "below 4 GiB"),
    "each other": (
        Elf([Segment(b"x" * 16), Segment(b"yy", paddr=0x10000F)]),
        "FILE: segment 1 at 0x10000f-0x100011 overlaps FILE: segment 0 at 0x100000-0x100010",
    ),
    "page tables": (
        Elf([Segment(b"x" * 16, paddr=0x98000)], entry=0x98000),
        "FILE: segment 0 at 0x98000-0x98010 overlaps avmm's page tables at 0x98000-0x9e000",
    ),
    "MP table": (
        Elf([Segment(b"x" * 16, paddr=0xF0000)], entry=0xF0000),
        "FILE: segment 0 at 0xf0000-0xf0010 overlaps avmm's MP table at 0xf0000-",
    ),
    "note": (
        Elf([Segment(b"x"), Segment(b"\xff" * 12, kind=PT_NOTE)]),
        "note segment 1 has a note at offset 0x0 that ends at",
    ),
    "note by a byte": (
        Elf([Segment(b"x"), Segment(note(b"Xen\0", 18, bytes(8))[:-1], kind=PT_NOTE)]),
        "has a note at offset 0x0 that ends at 0x18, past the segment's 0x17 bytes",
    ),
    "notes": (
        Elf([Segment(b"x"), Segment(bytes(0x10001), kind=PT_NOTE)]),
        "more than 65536 bytes of notes",
    ),
    "notes in sum": (
        Elf([Segment(b"x")] + [Segment(bytes(0x8000), kind=PT_NOTE)] * 3),
        "more than 65536 bytes of notes",
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_refused(memory: GuestMemory, write: Write, case: str) -> None:
    elf, expected = HEADERS[case]
    text = failure(memory, write(elf))
    assert expected in text


def test_cut_off_anywhere(memory: GuestMemory, write: Write) -> None:
    whole = bytes(Elf())
    for size in range(4, len(whole)):
        assert "but the file has" in failure(memory, write(whole[:size]))


def test_the_worst_notes_take_little_time(memory: GuestMemory, write: Write) -> None:
    elf = Elf([Segment(b"x"), Segment(note(b"", 1, b"") * 5461, kind=PT_NOTE)])
    start = time.process_time()
    load(memory, write(elf))
    assert time.process_time() - start < 3


def test_the_most_program_headers(memory: GuestMemory, write: Write) -> None:
    segments = [Segment(b"x", paddr=0x100000 + 16 * i) for i in range(128)]
    load(memory, write(Elf(segments)))
    assert memory.read(0x100000 + 16 * 127, 1) == b"x"


def test_too_little_ram_for_the_tables(write: Write) -> None:
    memory = GuestMemory("512K")
    try:
        elf = Elf([Segment(b"x", paddr=0x1000)], entry=0x1000)
        text = failure(memory, write(elf))
        assert "guest RAM ends at 0x80000, before avmm's" in text
        assert "expected at least 1 MiB" in text
    finally:
        memory.close()


def test_assembled_by_the_real_tools(
    memory: GuestMemory, compile_elf: Callable[..., Path]
) -> None:
    path = compile_elf(
        """
        .globl _start
        .text
        _start: mov $1, %eax
                hlt
        .data
        .quad 0x1122334455667788
        .bss
        .skip 0x5000
        .section .note.GNU-stack,"",@progbits
        """,
        "-Wl,-Ttext=0x200000",
    )
    entry = load(memory, path)
    assert (entry.mode, entry.ip) == (Mode.LONG, 0x200000)
    assert memory.read(0x200000, 6) == b"\xb8\1\0\0\0\xf4"
    assert b"\x88\x77\x66\x55\x44\x33\x22\x11" in memory.read(0x200000, 0x4000)
