"""QEMU's microvm. Of QEMU's machines, it is the most similar to avmm's."""

from __future__ import annotations

from typing import Final

from avmm import arch, engine

QEMU: Final = "qemu-system-x86_64"
_MACHINE: Final = (
    *("-M", "microvm,x-option-roms=off,pit=on,pic=on,rtc=on,isa-serial=on"),
    # A named model: "host" fails on hosts whose KVM lacks some of the host's own MSRs.
    *("-cpu", "qemu64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
    *("-serial", "stdio"),
)
MICROVM_TCG: Final = (*_MACHINE, "-accel", "tcg")
"""Without KVM: QEMU emulates the processor."""


def microvm() -> tuple[str, ...]:
    """The options for a microvm on what avmm's own guests run on: KVM or, without it, QEMU's
    emulator. Blocks for some milliseconds. Raises what `engine.opened` raises."""
    system = engine.opened(arch.host(), engine.AUTO)
    system.close()
    return MICROVM_TCG if system.engine == engine.SOFT else (*_MACHINE, "-accel", "kvm")
