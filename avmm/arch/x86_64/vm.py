"""A PC's VM in KVM: its interrupt controllers and timer, and the exits that KVM makes only on
request.
"""

from __future__ import annotations

from collections.abc import Sequence

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.kvm import X86System, X86Vm
from avmm.bus.space import Placement
from avmm.errors import ConfigError
from avmm.kvm import constants
from avmm.vcpu.calls import XEN_MSR


def create_vm(system: X86System) -> X86Vm:
    """A VM with two PICs, an IOAPIC, a PIT, and a LAPIC for each vCPU that is created later."""
    vm = system.create_vm()
    try:
        vm.create_irqchip(layout.KVM_IDENTITY_MAP, layout.KVM_TSS)
        vm.create_pit()
    except BaseException:
        vm.close()
        raise
    return vm


def enable_exits(vm: X86Vm, devices: Sequence[Placement], *, xen: bool, has_calls: bool) -> None:
    """See `avmm.arch.contract.Architecture.enable_exits`."""
    if filtered := [place for place in devices if place.space == "msr"]:
        _filter_msrs(vm, filtered)
    if xen:
        _intercept_xen(vm)
    elif has_calls and vm.check("KVM_CAP_EXIT_HYPERCALL"):
        vm.enable("KVM_CAP_EXIT_HYPERCALL", 1 << constants.KVM_HC_MAP_GPA_RANGE)


def _filter_msrs(vm: X86Vm, places: Sequence[Placement]) -> None:
    names = ", ".join(place.device.name for place in places)
    if len(places) > constants.KVM_MSR_FILTER_MAX_RANGES:
        raise ConfigError(
            f"{names}: {len(places)} ranges of MSRs; expected at most "
            f"{constants.KVM_MSR_FILTER_MAX_RANGES}, because KVM filters no more"
        )
    if not (vm.check("KVM_CAP_X86_USER_SPACE_MSR") and vm.check("KVM_CAP_X86_MSR_FILTER")):
        raise ConfigError(
            f"{names}: this host's KVM does not hand MSRs over; expected one that offers "
            "KVM_CAP_X86_USER_SPACE_MSR and KVM_CAP_X86_MSR_FILTER (Linux 5.10)"
        )
    vm.filter_msrs([(place.base, place.size) for place in places])


def _intercept_xen(vm: X86Vm) -> None:
    if not vm.intercept_xen(XEN_MSR):
        raise ConfigError(
            "xen: this host's KVM does not hand Xen's hypercalls over; expected one that "
            "offers KVM_CAP_XEN_HVM with their interception (Linux 5.12, CONFIG_KVM_XEN)"
        )
