"""The IOAPIC's redirection table, as KVM tells it: what becomes of each interrupt pin.

82093AA datasheet, 3.2.4; `struct kvm_ioapic_state` in arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from avmm.arch.x86_64 import mptable
from avmm.arch.x86_64.kvm import X86Vm
from avmm.kvm import constants

_TABLE: Final = struct.Struct(f"<32x{mptable.IRQ_PINS}Q")
"""Behind the chip's number and five registers."""
_MASKED: Final = 1 << 16
_DELIVERY: Final = 7

SMI: Final = 2
NMI: Final = 4


class Pin(NamedTuple):
    """One pin."""

    is_masked: bool
    delivery: int
    """The delivery mode: 0 and 1 are ordinary interrupts."""


def pins(vm: X86Vm) -> list[Pin]:
    """All pins, in order."""
    table = _TABLE.unpack_from(vm.irqchip(constants.KVM_IRQCHIP_IOAPIC))
    return [Pin(bool(entry & _MASKED), entry >> 8 & _DELIVERY) for entry in table]
