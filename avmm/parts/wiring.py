"""What KVM must be told of a machine: RAM, who rings and interrupts, what leaves the guest.

All of it is ioctls, and some of them wait for the kernel's grace period, which takes milliseconds:
memory slots and doorbells. None of it is called in trio's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from avmm.arch.contract import Architecture
from avmm.bus.space import Placement
from avmm.kvm import System, Vm
from avmm.memory.ram import GuestMemory
from avmm.parts.placing import Attached


def create_vm(stack: ExitStack, kind: Architecture, system: System, memory: GuestMemory) -> Vm:
    """A VM with this RAM in its memory slots; a slot's number is its region's index."""
    vm = kind.create_vm(system)
    stack.callback(vm.close)
    for slot, (region, view) in enumerate(memory.addresses()):
        vm.set_memory(slot, region.gpa, view, readonly=region.readonly)
    return vm


def wire(
    kind: Architecture,
    vm: Vm,
    attached: Attached,
    devices: Sequence[Placement],
    xen: bool,
    has_calls: bool,
) -> None:
    """Tell KVM of the devices: their interrupts and doorbells, the writes that it is to collect,
    and the exits that only come where somebody asks for them."""
    attached.interrupts.connect(vm)
    for bell in attached.doorbells:
        bell.connect(vm)
    attached.has_ring = any(
        # A list: each region is to be known.
        [
            vm.coalesce(place.base, place.size, port=place.space == "pio")
            for place in devices
            if place.coalesced
        ]
    )
    kind.enable_exits(vm, devices, xen=xen, has_calls=has_calls)
