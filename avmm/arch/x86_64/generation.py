"""The generation id: tells a guest that it is a copy, so that it makes new random numbers.

A clone, and a guest that is restored, would otherwise hand out the same keys, tokens and UUIDs as
the guest that it is a copy of. The id is 16 random bytes in reserved RAM. An ACPI device names
their address, and a generic event device tells the guest by an interrupt that they have changed
("Virtual Machine Generation ID", Microsoft; ACPI 6.5, 5.6.9). Linux reseeds its random number
generator then (drivers/virt/vmgenid.c, from 5.18 on; by ACPI alone).

The interrupt is pending before the guest runs, but Linux answers it in a work queue, so the first
reads after a load may still give old numbers.
"""

from __future__ import annotations

from typing import Final

from avmm import chance
from avmm.arch.x86_64 import aml, ioapic, layout
from avmm.arch.x86_64.kvm import X86Vm
from avmm.kvm import constants
from avmm.memory.ram import GuestMemory

GSI: Final = 13
"""The interrupt. Nothing else of a PC without firmware uses the FPU's pin."""
SIZE: Final = 32
"""Bytes in reserved RAM: a mark, and the id behind it."""
_MARK: Final = b"avmm vmgenid\0\0\0\1"
_ID_BYTES: Final = 16
_CHANGED: Final = 0x80
_PIC_MASK: Final = 8 + 2
_PIC_BASE: Final = 8 + 5
"""Offsets in `struct kvm_irqchip`: a PIC's mask, and the vector of its first pin."""
_FIRST_VECTOR: Final = 32
"""Those below are the processor's own exceptions."""


def first(memory: GuestMemory) -> None:
    """Give a guest that boots its first id. The range must have been claimed."""
    memory.write(layout.GENERATION, _MARK + chance.random_bytes(_ID_BYTES))


def renew(memory: GuestMemory, vm: X86Vm) -> None:
    """Give a guest that was just loaded a new id, and interrupt it. Does nothing if the guest was
    booted without an id."""
    if memory.ram[0].end < layout.BIOS_END:
        return
    if memory.read(layout.GENERATION, len(_MARK)) != _MARK:
        return
    memory.write(layout.GENERATION + len(_MARK), chance.random_bytes(_ID_BYTES))
    if _is_listened_to(vm):
        vm.irq_line(GSI, True)
        vm.irq_line(GSI, False)


def _is_listened_to(vm: X86Vm) -> bool:
    """Has the guest set up the interrupt? A guest that boots has not: its PICs are as they are at
    reset, unmasked, and would give it the vector of an exception."""
    if not ioapic.pins(vm)[GSI].is_masked:
        return True
    slave = vm.irqchip(constants.KVM_IRQCHIP_PIC_SLAVE)
    return slave[_PIC_BASE] >= _FIRST_VECTOR and not slave[_PIC_MASK] >> GSI % 8 & 1


def devices() -> bytes:
    """The two devices for the DSDT's scope `\\_SB`."""
    address = layout.GENERATION + len(_MARK)
    generation = aml.name("_HID", aml.string("VMGENCTR"))
    generation += aml.name("_CID", aml.string("VM_Gen_Counter"))
    generation += aml.name("_DDN", aml.string("VM_Gen_Counter"))
    generation += aml.name("ADDR", aml.package(aml.integer(address), aml.integer(0)))
    return aml.device("VGEN", generation) + aml.event_device("GED", 0, GSI, "VGEN", _CHANGED)
