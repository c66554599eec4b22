"""Keeps L1's kernel from patching its own code whenever a guest comes or goes.

KVM turns some of its work on and off by static keys, which Linux flips by writing instructions
of the running kernel: `preempt_notifier_key`, in schedule(), with the first VM and the last;
`apic_sw_disabled` with the first vCPU whose LAPIC is off and the last, `kvm_has_noapic_vcpu` with
those that have none. QEMU's TCG, up to version 8.0, translates a page before it watches it for
writes ("accel/tcg: Always lock pages before translation"); a CPU that translates such an
instruction in the moment of a flip by another keeps the breakpoint that stood there for as long as
the flip took, and runs into it for ever.

So one vCPU of each kind is held from beginning to end, none of which ever runs: the keys stay on.
"""

from __future__ import annotations

import signal

from avmm.arch.x86_64 import layout
from avmm.kvm import System


def main() -> None:
    """Hold the two until killed."""
    system = System()
    with_lapic, without = system.create_vm(), system.create_vm()
    with_lapic.create_irqchip(layout.KVM_IDENTITY_MAP, layout.KVM_TSS)
    vcpus = [vm.create_vcpu(0) for vm in (with_lapic, without)]
    assert vcpus
    signal.pause()


if __name__ == "__main__":
    main()
