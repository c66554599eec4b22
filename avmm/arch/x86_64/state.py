"""The state of an x86-64 vCPU and of its VM: read whole, and written in the order that works.

Only a drained vCPU has a state that can be read (`avmm.vcpu.completion`), and only when its
devices are quiesced is the VM's the whole truth.

**Reading.** MP_STATE comes first: reading it lets KVM settle pending INIT and SIPI, which changes
the LAPIC and the registers. VCPU_EVENTS comes last: what other reads settle shows up there.

**Writing**, into a fresh VM, because CPUID cannot be changed once a vCPU has run (Linux 5.16):

1. CPUID: which registers, MSRs and XSAVE components exist follows from it.
2. TSC frequency: before any MSR that counts in it.
3. MP_STATE.
4. REGS, then SREGS. SREGS sets the APIC base, so it precedes the LAPIC; REGS clears a pending
   exception, so it precedes VCPU_EVENTS.
5. XSAVE, XCRS, DEBUGREGS.
6. LAPIC: its timer mode must be there before the deadline is written to an MSR.
7. MSRs, but for the TSC and its deadline.
8. VCPU_EVENTS: pending exceptions, interrupts and NMIs, after all that would clear them.
9. KVMCLOCK_CTRL, so that the guest's watchdogs know that it stood still.
10. When all vCPUs are so far, their TSCs, together (`avmm.arch.x86_64.tsc`), and last the TSC
   deadlines, which are compared with them. A deadline that reads 0 in a timer that is in
   deadline mode has just fired or was never set; written as 0 it would disarm a timer whose
   interrupt is still on its way, so the TSC's value is written, which makes it fire at once: a
   spurious tick is harmless, a lost one stops a guest.

The VM's own state: PICs, IOAPIC, PIT and kvmclock. They are written before the vCPUs': an
interrupt that an IOAPIC raises on being set must find LAPICs that are set after it.

A saved state is plain data (numbers, bytes, lists, dicts). Loading treats it as hostile: its
shape is checked here, the values by the kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from avmm.arch.x86_64 import cpu, features, tsc
from avmm.errors import StateError
from avmm.kvm import KvmError, System, Vcpu, Vm, constants
from avmm.plain import U32, U64, Bytes, Fields, Int, ListOf, OrNone, Row

_TSC_DEADLINE = 0x6E0
_LVT_TIMER = 0x320
_TIMER_MODE, _MODE_DEADLINE = 3 << 17, 2 << 17
_CHIPS: Final = (
    constants.KVM_IRQCHIP_PIC_MASTER,
    constants.KVM_IRQCHIP_PIC_SLAVE,
    constants.KVM_IRQCHIP_IOAPIC,
)
_TSC_TOLERANCE: Final = 250e-6
"""As much may TSC frequencies differ and still count as one (KVM's own default)."""
_ALWAYS: Final = (tsc.MSR, 0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0084, 0xC000_0102)
"""MSRs that every x86-64 KVM lists: TSC, SYSENTER's, STAR, LSTAR, FMASK, KERNEL_GS_BASE."""
_STRUCTURE: Final = Bytes(most=1 << 16)
"""One of the kernel's structures: its size is compared where it is handed over."""
_CPUID: Final = ListOf(Row(*[U32] * 7))
"""(function, index, flags, eax, ebx, ecx, edx) of each leaf."""
_KHZ: Final = Int(1, (1 << 32) - 1)


class SavedVcpu(Fields, version=1):
    """What `save_vcpu` gives."""

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
    """(index, value) of each."""
    events = _STRUCTURE


class Needs(Fields, version=1):
    """What `needs` tells."""

    cpuid = _CPUID
    msrs = ListOf(U32)
    xsave = U32
    tsc_khz = _KHZ


class SavedVm(Fields, version=1):
    """What `save_vm` gives."""

    irqchips = ListOf(_STRUCTURE, least=len(_CHIPS), most=len(_CHIPS))
    pit = _STRUCTURE
    clock = U64


def save_vcpu(system: System, vcpu: Vcpu) -> dict[str, Any]:
    """The state of a drained vCPU. Raises `KvmError` where KVM does not give all of it."""
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


def needs(system: System, vcpu: Vcpu) -> dict[str, Any]:
    """What a host must have for this vCPU, as far as it can be told before its state is taken."""
    return Needs.plain(
        cpuid=[list(leaf) for leaf in vcpu.cpuid()],
        msrs=list(system.msr_indices()),
        xsave=len(vcpu.xsave(system.check("KVM_CAP_XSAVE2"))),
        tsc_khz=vcpu.tsc_khz(),
    )


def needs_of(system: System, vcpu: Vcpu, state: Mapping[str, Any]) -> dict[str, Any]:
    """The `needs` of a vCPU that has just been given this state, most of which are in it: asking
    KVM again would add a millisecond to the time that a guest stands still."""
    return Needs.plain(
        cpuid=state["cpuid"],
        msrs=list(system.msr_indices()),
        xsave=len(state["xsave"]),
        tsc_khz=vcpu.tsc_khz(),
    )


def demand(system: System, vcpu: Vcpu, needed: Mapping[str, Any]) -> None:
    """Raise `StateError` where this host lacks what `needs` told of another one's vCPU."""
    needs_ = Needs.read(f"what vCPU {vcpu.index} needs", needed)
    features.demand(needs_.cpuid, _offered(system, vcpu))
    _demand_msrs(system, needs_.msrs)
    _demand_xsave(system, vcpu, needs_.xsave)


def _demand_msrs(system: System, wanted: Iterable[int]) -> None:
    here = set(system.msr_indices())
    if missing := [f"{index:#x}" for index in wanted if index not in here]:
        raise StateError(f"this host's KVM lacks MSRs that the state holds: {', '.join(missing)}")


def _demand_xsave(system: System, vcpu: Vcpu, size: int) -> None:
    here = system.check("KVM_CAP_XSAVE2") or len(vcpu.xsave(0))
    if size != here:
        raise StateError(
            f"the state's XSAVE area has {size} bytes, this host's {here}: its CPU has other "
            "vector registers"
        )


def load_vcpu(system: System, vcpu: Vcpu, state: Mapping[str, Any]) -> None:
    """Give a fresh vCPU the state that `save_vcpu` gave, here or on another host.

    Raises `StateError` where it is no such state, or where this host lacks what it needs.
    """
    saved = SavedVcpu.read(f"vCPU {vcpu.index}'s state", state)
    features.demand(saved.cpuid, _offered(system, vcpu))
    msrs = dict(saved.msrs)
    if lost := [f"{index:#x}" for index in _ALWAYS if index not in msrs]:
        raise StateError(f"the state holds no values of MSRs {', '.join(lost)}")
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


def _offered(system: System, vcpu: Vcpu) -> list[features.Leaf]:
    """The CPUID that a new vCPU, the first that is asked for, shows its guest here; KVM may show
    more than it was told to (kvm_pvm, whose guests see the hardware's)."""
    if not _shown:
        vcpu.set_cpuid(cpu.cpuid(system, vcpu.index, cpus=vcpu.index + 1))
        _shown.append(vcpu.cpuid())
    return _shown[0]


_shown: Final[list[list[features.Leaf]]] = []
"""The answer, once it is known: in features, which it is for, all vCPUs of a host are alike."""


def load_time(vcpus: Sequence[Vcpu], states: Sequence[Mapping[str, Any]]) -> None:
    """Set the TSCs of all vCPUs going, and their deadlines; after `load_vcpu` of each, which has
    checked its state.

    Raises `StateError` as that does.
    """
    msrs = [dict(state["msrs"]) for state in states]
    saved = [
        tsc.Saved(values[tsc.MSR], state["tsc_offset"])
        for values, state in zip(msrs, states, strict=True)
    ]
    try:
        tsc.load(vcpus, saved)
        for vcpu, values in zip(vcpus, msrs, strict=True):
            if _TSC_DEADLINE in values:
                vcpu.set_msrs({_TSC_DEADLINE: values[_TSC_DEADLINE]})
    except KvmError as error:
        raise StateError(f"this host's KVM refuses the guest's time: {error}") from error


def save_vm(vm: Vm) -> dict[str, Any]:
    """PICs, IOAPIC, PIT and kvmclock, with all vCPUs parked and devices quiesced."""
    return SavedVm.plain(
        irqchips=[vm.irqchip(chip) for chip in _CHIPS], pit=vm.state("pit"), clock=vm.clock()
    )


def load_vm(vm: Vm, state: object) -> None:
    """Give a fresh VM the state that `save_vm` gave; before its vCPUs get theirs.

    Raises `StateError` as `load_vcpu` does.
    """
    saved = SavedVm.read("the VM's state", state)
    if [int.from_bytes(chip[:4], "little") for chip in saved.irqchips] != list(_CHIPS):
        raise saved.refusal("irqchips: expected two PICs and an IOAPIC, in this order")
    try:
        for chip in saved.irqchips:
            vm.set_irqchip(chip)
        vm.set_state("pit", saved.pit)
        vm.set_clock(saved.clock)
    except (KvmError, ValueError) as error:
        raise StateError(f"this host's KVM refuses the state of the VM: {error}") from error


def _set_frequency(system: System, vcpu: Vcpu, khz: int) -> None:
    here = vcpu.tsc_khz()
    if khz == here:
        return
    if system.check("KVM_CAP_TSC_CONTROL"):
        vcpu.set_tsc_khz(khz)
        if vcpu.tsc_khz() != khz:
            raise StateError(f"this host's KVM does not let a TSC run at {khz} kHz")
    elif abs(khz - here) > here * _TSC_TOLERANCE:
        raise StateError(
            f"the guest's TSC runs at {khz} kHz, this host's at {here}, and its KVM cannot scale "
            "it (KVM_CAP_TSC_CONTROL)"
        )


def _in_deadline_mode(lapic: bytes) -> bool:
    timer = int.from_bytes(lapic[_LVT_TIMER : _LVT_TIMER + 4], "little")
    return timer & _TIMER_MODE == _MODE_DEADLINE
