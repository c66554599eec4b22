"""The state of an x86-64 vCPU and of its VM: reading all of it, and writing it in an order that
works.

The state of a vCPU can be read only after it is drained (`avmm.vcpu.completion`). The VM's state
is complete only while the devices are quiesced.

**Reading.** MP_STATE comes first: reading it lets KVM settle pending INIT and SIPI, which changes
the LAPIC and the registers. VCPU_EVENTS comes last, because it shows what the other reads have
settled.

**Writing**, into a fresh VM, because CPUID cannot be changed once a vCPU has run (Linux 5.16):

1. CPUID, because it decides which registers, MSRs and XSAVE components exist.
2. The TSC frequency, before any MSR that is measured in TSC ticks.
3. MP_STATE.
4. REGS, then SREGS. SREGS sets the APIC base, so it precedes the LAPIC; REGS clears a pending
   exception, so it precedes VCPU_EVENTS.
5. XSAVE, XCRS, DEBUGREGS.
6. LAPIC, because its timer mode must be set before the deadline is written to an MSR.
7. MSRs, except the TSC and its deadline.
8. VCPU_EVENTS: pending exceptions, interrupts and NMIs, after all that would clear them.
9. KVMCLOCK_CTRL, so that the guest's watchdogs know that it stood still.
10. When all vCPUs have got this far, their TSCs are set together (`avmm.arch.x86_64.tsc`). Last
   come the TSC deadlines, which are compared with the TSCs. A deadline that reads 0 in a timer
   that is in deadline mode has just fired or was never set. Writing 0 would disarm a timer whose
   interrupt is still on its way. So the TSC's own value is written, which makes the timer fire at
   once: a spurious tick is harmless, but a lost one stops a guest.

The VM's own state: PICs, IOAPIC, PIT and kvmclock. They are written before the vCPUs' state. An
IOAPIC may raise an interrupt when it is set, and the LAPICs must be set after that.

A saved state is plain data (numbers, bytes, lists, dicts). Loading treats it as hostile: its shape
is checked here, and its values by the kernel.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from avmm.arch.x86_64 import cpu, features, tsc
from avmm.arch.x86_64.kvm import X86System, X86Vcpu, X86Vm
from avmm.errors import StateError
from avmm.kvm import KvmError, constants
from avmm.plain import U32, U64, Bytes, Fields, Int, ListOf, OrMissing, OrNone, Row

_TSC_DEADLINE = 0x6E0
_LVT_TIMER = 0x320
_TIMER_MODE, _MODE_DEADLINE = 3 << 17, 2 << 17
_CHIPS: Final = (
    constants.KVM_IRQCHIP_PIC_MASTER,
    constants.KVM_IRQCHIP_PIC_SLAVE,
    constants.KVM_IRQCHIP_IOAPIC,
)
_TSC_TOLERANCE: Final = 250e-6
"""TSC frequencies that differ by no more than this share are taken as equal (KVM's own
default).
"""
_ALWAYS: Final = (tsc.MSR, 0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0084, 0xC000_0102)
"""MSRs that every x86-64 KVM lists: TSC, SYSENTER's, STAR, LSTAR, FMASK, KERNEL_GS_BASE."""
_STRUCTURE: Final = Bytes(most=1 << 16)
"""One of the kernel's structures. Its size is checked when it is handed to KVM."""
_CPUID: Final = ListOf(Row(*[U32] * 7))
"""(function, index, flags, eax, ebx, ecx, edx) of each leaf."""
_MOST_CLOCK: Final = (1 << 64) - 1
_KHZ: Final = Int(1, (1 << 32) - 1)


class SavedVcpu(Fields, version=1):
    """What `save_vcpu` returns."""

    mp_state = _STRUCTURE
    regs = _STRUCTURE
    sregs = _STRUCTURE
    xsave = _STRUCTURE
    xcrs = _STRUCTURE
    debugregs = _STRUCTURE
    lapic = _STRUCTURE
    cpuid = _CPUID
    tsc_khz = _KHZ
    tsc_offset = OrNone(U64)
    msrs = ListOf(Row(U32, U64))
    """The (index, value) of each MSR."""
    events = _STRUCTURE


class Needs(Fields, version=1):
    """What `needs` returns."""

    cpuid = _CPUID
    msrs = ListOf(U32)
    xsave = U32
    tsc_khz = _KHZ


class SavedVm(Fields, version=1):
    """What `save_vm` returns."""

    irqchips = ListOf(_STRUCTURE, least=len(_CHIPS), most=len(_CHIPS))
    pit = _STRUCTURE
    clock = U64
    real = OrMissing(U64)
    """The host's wall clock when it was saved, in nanoseconds since 1970. Earlier versions did not
    tell it."""


def save_vcpu(system: X86System, vcpu: X86Vcpu) -> dict[str, Any]:
    """The state of a drained vCPU. Raises `KvmError` if KVM does not return all of it."""
    parts: dict[str, object] = {"mp_state": vcpu.state("mp_state")}
    for part in ("regs", "sregs"):
        parts[part] = vcpu.state(part)
    parts["xsave"] = vcpu.xsave(system.check("KVM_CAP_XSAVE2"))
    for part in ("xcrs", "debugregs"):
        parts[part] = vcpu.state(part)
    lapic = vcpu.state("lapic")
    parts["cpuid"] = [list(leaf) for leaf in vcpu.cpuid()]
    parts["tsc_khz"] = vcpu.tsc_khz()
    parts["tsc_offset"] = vcpu.tsc_offset()
    msrs = vcpu.msrs(system.msr_indices())
    if _in_deadline_mode(lapic) and msrs.get(_TSC_DEADLINE) == 0:
        msrs[_TSC_DEADLINE] = msrs[tsc.MSR]
    parts["msrs"] = [[index, value] for index, value in msrs.items()]
    parts["events"] = vcpu.state("events")
    return SavedVcpu.plain(lapic=lapic, **parts)


def needs(system: X86System, vcpu: X86Vcpu) -> dict[str, Any]:
    """What a host must have for this vCPU, as far as that is known before the vCPU's state is
    read.
    """
    return Needs.plain(
        cpuid=[list(leaf) for leaf in vcpu.cpuid()],
        msrs=list(system.msr_indices()),
        xsave=len(vcpu.xsave(system.check("KVM_CAP_XSAVE2"))),
        tsc_khz=vcpu.tsc_khz(),
    )


def needs_of(system: X86System, vcpu: X86Vcpu, state: Mapping[str, Any]) -> dict[str, Any]:
    """The `needs` of a vCPU that has just been given this state. Most of them are in the state;
    asking KVM again would let the guest stand still a millisecond longer.
    """
    return Needs.plain(
        cpuid=state["cpuid"],
        msrs=list(system.msr_indices()),
        xsave=len(state["xsave"]),
        tsc_khz=vcpu.tsc_khz(),
    )


def demand(system: X86System, vcpu: X86Vcpu, needed: Mapping[str, Any]) -> None:
    """Raise `StateError` if this host lacks something that a vCPU of another host needs
    (`needs`).
    """
    needs_ = Needs.read(f"what vCPU {vcpu.index} needs", needed)
    features.demand(needs_.cpuid, _offered(system, vcpu))
    _demand_msrs(system, needs_.msrs)
    _demand_xsave(system, vcpu, needs_.xsave)


def _demand_msrs(system: X86System, wanted: Iterable[int]) -> None:
    here = set(system.msr_indices())
    if missing := [f"{index:#x}" for index in wanted if index not in here]:
        raise StateError(
            f"this host's KVM lacks MSRs that the state contains: {', '.join(missing)}"
        )


def _demand_xsave(system: X86System, vcpu: X86Vcpu, size: int) -> None:
    here = system.check("KVM_CAP_XSAVE2") or len(vcpu.xsave(0))
    if size != here:
        raise StateError(
            f"the state's XSAVE area has {size} bytes, but this host's has {here}: the CPUs "
            "have different vector registers"
        )


def load_vcpu(system: X86System, vcpu: X86Vcpu, state: Mapping[str, Any]) -> None:
    """Give a fresh vCPU the state that `save_vcpu` returned, here or on another host. Raises
    `StateError` if it is not such a state, or if this host lacks something that it needs.
    """
    saved = SavedVcpu.read(f"vCPU {vcpu.index}'s state", state)
    features.demand(saved.cpuid, _offered(system, vcpu))
    msrs = dict(saved.msrs)
    if lost := [f"{index:#x}" for index in _ALWAYS if index not in msrs]:
        raise StateError(f"the state has no values of the MSRs {', '.join(lost)}")
    _demand_msrs(system, msrs)
    _demand_xsave(system, vcpu, len(saved.xsave))
    try:
        vcpu.set_cpuid_leaves(saved.cpuid)
        _set_frequency(system, vcpu, saved.tsc_khz)
        vcpu.set_state("mp_state", saved.mp_state)
        vcpu.set_state("regs", saved.regs)
        vcpu.set_state("sregs", saved.sregs)
        vcpu.set_xsave(saved.xsave)
        vcpu.set_state("xcrs", saved.xcrs)
        vcpu.set_state("debugregs", saved.debugregs)
        vcpu.set_state("lapic", saved.lapic)
        later = (tsc.MSR, _TSC_DEADLINE)
        vcpu.set_msrs({index: value for index, value in msrs.items() if index not in later})
        vcpu.set_state("events", saved.events)
        vcpu.clock_paused()
    except (KvmError, ValueError) as error:
        raise StateError(
            f"this host's KVM refuses the state of vCPU {vcpu.index}: {error}"
        ) from error


def _offered(system: X86System, vcpu: X86Vcpu) -> list[features.Leaf]:
    """The CPUID that a new vCPU shows its guest on this host. KVM may show more than it was told
    to: under kvm_pvm, guests see the hardware's CPUID.
    """
    if system.engine not in _shown:
        vcpu.set_cpuid(cpu.cpuid(system, vcpu.index, cpus=vcpu.index + 1))
        _shown[system.engine] = vcpu.cpuid()
    return _shown[system.engine]


_shown: Final[dict[str, list[features.Leaf]]] = {}
"""The answer of the first call on each engine is kept. It is used only to compare features,
which are the same for all vCPUs of a host.
"""


def load_time(
    vcpus: Sequence[X86Vcpu], states: Sequence[Mapping[str, Any]], ahead: int = 0
) -> None:
    """Start the TSCs of all vCPUs, `ahead` nanoseconds later than they were saved, and set their
    deadlines. Call it after `load_vcpu` of each vCPU, which has checked the states. Raises
    `StateError` as that does.
    """
    msrs = [dict(state["msrs"]) for state in states]
    saved = [
        tsc.Saved(values[tsc.MSR], state["tsc_offset"], ahead * state["tsc_khz"] // 1_000_000)
        for values, state in zip(msrs, states, strict=True)
    ]
    try:
        tsc.load(vcpus, saved)
        for vcpu, values in zip(vcpus, msrs, strict=True):
            if _TSC_DEADLINE in values:
                vcpu.set_msrs({_TSC_DEADLINE: values[_TSC_DEADLINE]})
    except KvmError as error:
        raise StateError(f"this host's KVM refuses the guest's time: {error}") from error


def save_vm(vm: X86Vm) -> dict[str, Any]:
    """The state of PICs, IOAPIC, PIT and kvmclock. Call it while all vCPUs are parked and all
    devices are quiesced.
    """
    return SavedVm.plain(
        irqchips=[vm.irqchip(chip) for chip in _CHIPS],
        pit=vm.state("pit"),
        clock=vm.clock(),
        real=time.time_ns(),
    )


def stood_still(state: object) -> int:
    """See `avmm.arch.contract.Architecture.stood_still`."""
    saved = SavedVm.read("the VM's state", state)
    if saved.real is None:
        raise saved.refusal("it does not tell when it was saved, as clock 'host' needs")
    return max(0, time.time_ns() - saved.real)


def load_vm(vm: X86Vm, state: object, ahead: int = 0) -> None:
    """Give a fresh VM the state that `save_vm` returned, with its kvmclock `ahead` nanoseconds
    later. Call it before the vCPUs get their state.

    Raises `StateError` as `load_vcpu` does.
    """
    saved = SavedVm.read("the VM's state", state)
    if [int.from_bytes(chip[:4], "little") for chip in saved.irqchips] != list(_CHIPS):
        raise saved.refusal("irqchips: expected two PICs and an IOAPIC, in this order")
    try:
        for chip in saved.irqchips:
            vm.set_irqchip(chip)
        vm.set_state("pit", saved.pit)
        vm.set_clock(min(saved.clock + ahead, _MOST_CLOCK))
    except (KvmError, ValueError) as error:
        raise StateError(f"this host's KVM refuses the state of the VM: {error}") from error


def _set_frequency(system: X86System, vcpu: X86Vcpu, khz: int) -> None:
    here = vcpu.tsc_khz()
    if khz == here:
        return
    if system.check("KVM_CAP_TSC_CONTROL"):
        vcpu.set_tsc_khz(khz)
        if vcpu.tsc_khz() != khz:
            raise StateError(f"this host's KVM does not let a TSC run at {khz} kHz")
    elif abs(khz - here) > here * _TSC_TOLERANCE:
        raise StateError(
            f"the guest's TSC runs at {khz} kHz and this host's at {here} kHz, and this "
            "host's KVM cannot scale it (KVM_CAP_TSC_CONTROL)"
        )


def _in_deadline_mode(lapic: bytes) -> bool:
    timer = int.from_bytes(lapic[_LVT_TIMER : _LVT_TIMER + 4], "little")
    return timer & _TIMER_MODE == _MODE_DEADLINE
