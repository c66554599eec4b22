"""ELF executables: loads segments to their physical addresses, and finds where to start.

`longmode` says what a plain 64-bit ELF finds when it is entered. `pvh` and `multiboot` also load
their ELFs with these functions.
"""

from __future__ import annotations

from avmm.arch.x86_64.boot import longmode, pie
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.arch.x86_64.layout import HOLE_END
from avmm.boot.elf_headers import PF_X, Elf
from avmm.boot.entry import Entry


def load_segments(assembly: Assembly, elf: Elf) -> None:
    """Claim every loadable segment at its physical address, then copy what the file holds.

    All segments are claimed before the first byte is copied. The part of a segment that is only in
    memory (.bss) is claimed but not written, because fresh RAM is zero and costs nothing until it
    is used. A static PIE is relocated.
    """
    for s in elf.loadable:
        assembly.claims.claim(s.paddr, s.memsz, f"{elf.image.name}: segment {s.index}")
    for s in elf.loadable:
        assembly.load(elf.image, s.offset, s.filesz, s.paddr)
    pie.relocate(elf, assembly.memory)


def physical_entry(elf: Elf) -> int:
    """The physical address of the entry point (`e_entry`). Raises `ImageError` if it lies in no
    segment.

    By the ABI it is a virtual address, so it is translated by the segment that contains it.
    Linux's vmlinux has a physical one (`phys_startup_64`). So an address that lies in no segment's
    virtual range is used as it is, if it lies in a segment's physical range.

    Executable segments come first. Linux has its entry in one that is not executable since 6.18,
    where the text and the data are one segment each. But the per-CPU segment of an older Linux
    kernel, which lies at virtual address 0, never holds the entry.
    """
    loadable = elf.loadable
    executable = [s for s in loadable if s.flags & PF_X]
    others = [s for s in loadable if not s.flags & PF_X and (s.vaddr or not executable)]
    for segments in (executable, others):
        for s in segments:
            if s.vaddr <= elf.entry < s.vaddr + s.memsz:
                return elf.entry - s.vaddr + s.paddr
        for s in segments:
            if s.paddr <= elf.entry < s.paddr + s.memsz:
                return elf.entry
    raise elf.image.error(
        f"has its entry point at {elf.entry:#x}, which is not in any segment that could hold it"
    )


def holds(elf: Elf, gpa: int) -> bool:
    """Does a loadable segment cover this physical address?"""
    return any(s.paddr <= gpa < s.paddr + s.memsz for s in elf.loadable)


def load(assembly: Assembly, elf: Elf, header: bytes | None = None) -> Entry:
    """Load a plain ELF, which is entered in long mode as `longmode` says. `header` is the setup
    header of the bzImage that it came from, if any.
    """
    if elf.bits != 64:
        raise elf.image.error(
            "is a 32-bit ELF without a PVH note or a multiboot header; expected one of these, "
            "or a 64-bit ELF"
        )
    ip = physical_entry(elf)
    if ip >= HOLE_END:
        raise elf.image.error(f"has its entry point at {ip:#x}; expected one below 4 GiB")
    longmode.claim(assembly)
    load_segments(assembly, elf)
    return longmode.enter(assembly, ip, header)
