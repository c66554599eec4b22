"""Whether a PC can never run again: its CPUs are halted, and nothing is there that could wake one.

HLT ends with an interrupt that the CPU takes, an NMI, an SMI or INIT (Intel SDM 2A, HLT). With
RFLAGS.IF clear there is no ordinary interrupt. An NMI or SMI can come from a pin of the IOAPIC
that is set up for it. INIT comes only from another CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from avmm.arch.x86_64 import ioapic
from avmm.arch.x86_64.kvm import X86Vcpu, X86Vm
from avmm.kvm import constants

_IF: Final = 1 << 9
_NOT_STARTED: Final = (
    constants.KVM_MP_STATE_UNINITIALIZED,
    constants.KVM_MP_STATE_INIT_RECEIVED,
)


def are_halted(vm: X86Vm, vcpus: Sequence[X86Vcpu]) -> bool:
    """See `avmm.arch.contract.Architecture.are_halted`."""
    if not all(_is_halted(vcpu) for vcpu in vcpus):
        return False
    return not any(
        pin.delivery in (ioapic.SMI, ioapic.NMI) for pin in ioapic.pins(vm) if not pin.is_masked
    )


def _is_halted(vcpu: X86Vcpu) -> bool:
    state = vcpu.mp_state()
    if state in _NOT_STARTED:
        return True
    return state == constants.KVM_MP_STATE_HALTED and not vcpu.regs().rflags & _IF
