"""QEMU's microvm. Of QEMU's machines, it is the most similar to avmm's."""

from __future__ import annotations

from typing import Final

QEMU: Final = "qemu-system-x86_64"
_MACHINE: Final = (
    *("-M", "microvm,x-option-roms=off,pit=on,pic=on,rtc=on,isa-serial=on"),
    # A named model: "host" fails on hosts whose KVM lacks some of the host's own MSRs.
    *("-cpu", "qemu64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
    *("-serial", "stdio"),
)
MICROVM: Final = (*_MACHINE, "-accel", "kvm")
MICROVM_TCG: Final = (*_MACHINE, "-accel", "tcg")
"""The same without KVM: QEMU emulates the processor."""
