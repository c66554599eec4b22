"""Tells KVM about a machine: its RAM, its doorbells and interrupts, and which exits it needs.

All of this is done by ioctls. Those for memory slots and doorbells wait for a grace period of the
kernel, which takes milliseconds. So none of them is called in trio's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from avmm.arch.contract import AnyArchitecture
from avmm.bus.space import Placement
from avmm.kvm import System, Vm
from avmm.memory.ram import GuestMemory
from avmm.parts.placing import Attached


def create_vm(stack: ExitStack, kind: AnyArchitecture, system: System, memory: GuestMemory) -> Vm:
    """A VM with this RAM in its memory slots. A slot has the same number as its region."""
    vm: Vm = kind.create_vm(system)
    stack.callback(vm.close)
    for slot, (region, view) in enumerate(memory.addresses()):
        vm.set_memory(slot, region.gpa, view, readonly=region.readonly)
    if system.watcher:
        memory.watch(system.watcher, vm.fd)
        stack.callback(memory.watch, 0, 0)
    return vm


def wire(
    kind: AnyArchitecture,
    vm: Vm,
    memory: GuestMemory,
    attached: Attached,
    devices: Sequence[Placement],
    xen: bool,
    has_calls: bool,
) -> None:
    """Tell KVM about the devices: their pages, interrupts and doorbells, the writes that it should
    collect, and the exits that it makes only on request.
    """
    for slot, page in enumerate(attached.pages, len(memory.regions)):
        vm.set_memory(slot, page.gpa, page.register.view(), readonly=True)
    attached.interrupts.connect(vm)
    for bell in attached.doorbells:
        bell.connect(vm)
    attached.has_ring = any(
        # This is a list, not a generator, because every region has to be registered.
        [
            vm.coalesce(place.base, place.size, port=place.space == "pio")
            for place in devices
            if place.coalesced
        ]
    )
    kind.enable_exits(vm, devices, xen=xen, has_calls=has_calls)
