"""Finds out whether this KVM can run an operating system's kernel.

A KVM without hardware virtualization (such as kvm_pvm) interprets ring 0. Its interpreter lacks
instructions that every kernel of a distribution uses, and the guest ends with an internal error.
Whether this host's KVM is of that kind cannot be asked for, so it is tried.
"""

from __future__ import annotations

import errno
from typing import Final

from avmm.arch.x86_64 import cpu, tables
from avmm.arch.x86_64.kvm import X86System, X86Vcpu
from avmm.boot.entry import Entry, Mode
from avmm.kvm import KvmError, constants
from avmm.memory.ram import GuestMemory

_ORIGIN: Final = 0x1000
_CODE: Final = bytes.fromhex("f3480fb8c0 e680")
"""`popcnt rax, rax; out 0x80, al`. KVM's instruction emulator does not know popcnt, and every
processor with hardware virtualization and nested page tables has it."""


def runs_kernels(system: X86System) -> bool:
    """Does the instruction run in ring 0? Blocks for some milliseconds. Raises `KvmError`."""
    memory = GuestMemory("1M")
    try:
        memory.write(_ORIGIN, _CODE)
        tables.write_long_mode_tables(memory)
        vm = system.create_vm()
        try:
            for slot, (region, view) in enumerate(memory.addresses()):
                vm.set_memory(slot, region.gpa, view)
            vcpu = vm.create_vcpu(0)
            try:
                return _run(system, vcpu) != constants.KVM_EXIT_INTERNAL_ERROR
            finally:
                vcpu.close()
        finally:
            vm.close()
    finally:
        memory.close()


def _run(system: X86System, vcpu: X86Vcpu) -> int:
    """The exit reason."""
    vcpu.set_cpuid(cpu.cpuid(system, 0, cpus=1))
    cpu.enter(vcpu, Entry(Mode.LONG, _ORIGIN))
    while (answer := vcpu.run()) == -errno.EINTR:
        pass  # a signal of somebody else's
    if answer < 0:
        raise KvmError("KVM_RUN", -answer)
    return answer
