"""A vCPU's state before its first instruction.

The boot processor starts where the image's format says, in the mode it asks for. The other
processors stay as KVM made them. They wait for INIT and SIPI, as real ones do.
"""

from __future__ import annotations

from typing import Final

from avmm.arch.x86_64 import layout, tables
from avmm.arch.x86_64.kvm import (
    Cpuid,
    LapicRegisters,
    Regs,
    Segment,
    Sregs,
    X86System,
    X86Vcpu,
    copy_cpuid,
)
from avmm.boot.entry import Entry, Mode

# Control bits (Intel SDM 3A, 2.5 and 2.2.1).
_CR0_PE, _CR0_ET, _CR0_NE, _CR0_PG = 1 << 0, 1 << 4, 1 << 5, 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS_FIXED = 1 << 1

# CPUID bits (SDM 2A, CPUID).
_TSC_DEADLINE, _HYPERVISOR, _HTT = 1 << 24, 1 << 31, 1 << 28
_VMX, _SVM = 1 << 5, 1 << 2
_SMT_LEVEL, _CORE_LEVEL = 1 << 8, 2 << 8

# MSRs that firmware would have set (SDM 4, table 2-2).
_STARTUP_MSRS: Final = {
    0x1A0: 1,  # IA32_MISC_ENABLE: fast string operations
    0x2FF: 0x806,  # IA32_MTRR_DEF_TYPE: MTRRs on, memory is write-back
}

# Local APIC registers (SDM 3A, 12.5.1): LINT0 gets the PIC's interrupts, and LINT1 gets the NMI.
_LVT_LINT0, _LVT_LINT1 = 0x350, 0x360
_DELIVER_EXTINT, _DELIVER_NMI = 0x700, 0x400


def set_up(system: X86System, vcpu: X86Vcpu, cpus: int, entry: Entry | None) -> None:
    """Prepare `vcpu`, one of `cpus` vCPUs. `entry` says where the boot processor starts; it is
    None for the others.
    """
    vcpu.set_cpuid(cpuid(system, vcpu.index, cpus))
    vcpu.set_msrs(_STARTUP_MSRS)
    vcpu.set_fpu(fcw=0x37F, mxcsr=0x1F80)
    lapic = vcpu.lapic()
    _put32(lapic.regs, _LVT_LINT0, _DELIVER_EXTINT)
    _put32(lapic.regs, _LVT_LINT1, _DELIVER_NMI)
    vcpu.set_lapic(lapic)
    if entry is not None:
        enter(vcpu, entry)


def enter(vcpu: X86Vcpu, entry: Entry) -> None:
    """Let a fresh vCPU start at `entry`."""
    sregs, regs = vcpu.sregs(), vcpu.regs()
    _enter(entry, sregs, regs)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(regs)


def cpuid(system: X86System, index: int, cpus: int) -> Cpuid:
    """What the host offers, with this vCPU's APIC id and a topology of single-thread cores.

    Virtualization is not offered, because no saved state contains what runs in a guest's guest.
    """
    offered = _host_cpuid(system)
    deadline = system.check("KVM_CAP_TSC_DEADLINE_TIMER")
    for entry in offered.entries:
        if entry.function == 1:
            entry.ebx = entry.ebx & 0xFFFF | min(cpus, 255) << 16 | (index & 0xFF) << 24
            entry.ecx |= _HYPERVISOR | (_TSC_DEADLINE if deadline else 0)
            entry.edx = entry.edx | _HTT if cpus > 1 else entry.edx & ~_HTT
            entry.ecx &= ~_VMX
        elif entry.function == 0x8000_0001:
            entry.ecx &= ~_SVM
        elif entry.function == 0x8000_000A:
            entry.eax = entry.ebx = entry.ecx = entry.edx = 0
        elif entry.function in (0x0B, 0x1F):
            entry.edx = index
            if entry.index == 0:
                entry.eax, entry.ebx, entry.ecx = 0, 1, _SMT_LEVEL
            elif entry.index == 1:
                entry.eax, entry.ebx, entry.ecx = (cpus - 1).bit_length(), cpus, _CORE_LEVEL | 1
            else:
                entry.eax, entry.ebx, entry.ecx = 0, 0, entry.index
    return offered


_asked: Final[dict[str, Cpuid]] = {}
"""Each engine's CPUID. It is kept, because it never changes, and asking KVM takes half a
millisecond."""


def _host_cpuid(system: X86System) -> Cpuid:
    """A copy of the host's CPUID, which the caller may change."""
    if system.engine not in _asked:
        _asked[system.engine] = system.supported_cpuid()
    return copy_cpuid(_asked[system.engine])


def _enter(entry: Entry, sregs: Sregs, regs: Regs) -> None:
    for name, value in entry.registers.items():
        setattr(regs, name, value)
    regs.rflags = _RFLAGS_FIXED
    if entry.mode is Mode.REAL:
        base = entry.ip & ~0xFFFF
        sregs.cs.base, sregs.cs.selector = base, base >> 4 & 0xFFFF
        regs.rip = entry.ip & 0xFFFF
        return
    regs.rip = entry.ip
    long = entry.mode is Mode.LONG
    code = tables.CODE64 if long else tables.CODE32
    _segment(sregs.cs, code, kind=0xB)
    sregs.cs.l, sregs.cs.db = long, not long
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        _segment(segment, tables.DATA, kind=0x3)
    sregs.cr0 = _CR0_PE | _CR0_ET
    if long:
        sregs.gdt.base, sregs.gdt.limit = layout.GDT, tables.GDT_LIMIT
        sregs.cr3 = layout.PAGE_TABLES
        sregs.cr4 |= _CR4_PAE
        sregs.efer |= _EFER_LME | _EFER_LMA
        sregs.cr0 |= _CR0_PG | _CR0_NE


def _segment(segment: Segment, selector: int, kind: int) -> None:
    """A flat 4 GiB segment; `kind` is the descriptor's type, with the accessed bit."""
    segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, selector
    segment.type, segment.present, segment.dpl, segment.s = kind, 1, 0, 1
    segment.db, segment.l, segment.g, segment.avl, segment.unusable = 1, 0, 1, 0, 0


def _put32(page: LapicRegisters, offset: int, value: int) -> None:
    for index, byte in enumerate(value.to_bytes(4, "little")):
        page[offset + index] = bytes([byte])
