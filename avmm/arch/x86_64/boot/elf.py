"""ELF executables: segments to their physical addresses, and where to start.

What a plain 64-bit ELF finds when it is entered is in `longmode`; `pvh` and `multiboot` load
their ELFs with what is here too.
"""

from __future__ import annotations

from avmm.arch.x86_64.boot import longmode
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.arch.x86_64.layout import HOLE_END
from avmm.boot.elf_headers import PF_X, Elf
from avmm.boot.entry import Entry


def load_segments(assembly: Assembly, elf: Elf) -> None:
    """Claim every loadable segment at its physical address, then copy what the file holds.

    All is claimed before the first byte is copied. What a segment has in memory only (.bss) is
    claimed and not touched: fresh RAM is zero and costs nothing until it is used.
    """
    for s in elf.loadable:
        assembly.claims.claim(s.paddr, s.memsz, f"{elf.image.name}: segment {s.index}")
    for s in elf.loadable:
        assembly.load(elf.image, s.offset, s.filesz, s.paddr)


def physical_entry(elf: Elf) -> int:
    """Where `e_entry` is in physical memory.

    The ABI has it virtual, so it is translated by the segment that holds it; Linux's vmlinux
    has a physical one (`phys_startup_64`), so an address that no segment has as a virtual one
    is taken as it is if one has it as a physical one. Only executable segments count, where
    there are any: the per-CPU segment of a Linux kernel is at the virtual address 0.
    """
    loadable = elf.loadable
    candidates = [s for s in loadable if s.flags & PF_X] or loadable
    for s in candidates:
        if s.vaddr <= elf.entry < s.vaddr + s.memsz:
            return elf.entry - s.vaddr + s.paddr
    for s in candidates:
        if s.paddr <= elf.entry < s.paddr + s.memsz:
            return elf.entry
    raise elf.image.error(f"has its entry point at {elf.entry:#x}, within no executable segment")


def holds(elf: Elf, gpa: int) -> bool:
    """Whether a loadable segment covers the physical address."""
    return any(s.paddr <= gpa < s.paddr + s.memsz for s in elf.loadable)


def load(assembly: Assembly, elf: Elf, header: bytes | None = None) -> Entry:
    """Load a plain ELF, entered in long mode as in `longmode`, whose `header` this is."""
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
