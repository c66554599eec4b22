"""Implements the contract of an architecture for x86-64 with a PC's board.

Each part is in a file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from avmm.arch.contract import Architecture, Board, BoardOptions, GuestImage, Probe
from avmm.arch.x86_64 import (
    board,
    cpu,
    generation,
    halt,
    kernels,
    layout,
    mptable,
    probes,
    report,
    state,
    vm,
)
from avmm.arch.x86_64.kvm import X86System, X86Vcpu, X86Vm
from avmm.kvm import constants
from avmm.vcpu.calls import KINDS

if TYPE_CHECKING:
    from avmm.boot.entry import Entry
    from avmm.bus.space import Placement
    from avmm.memory.ram import GuestMemory
    from avmm.outcome import Outcome


class X86_64(Architecture[X86System, X86Vm, X86Vcpu]):  # noqa: N801 - the architecture's own spelling
    """A PC without firmware: PICs, IOAPIC, LAPICs and PIT in the kernel, a serial port at COM1."""

    name = "x86_64"
    ram = layout.RAM
    most_cpus = mptable.MAX_CPUS
    spaces = board.SPACES
    in_kernel = board.IN_KERNEL
    pins = board.PINS
    virtio = board.VIRTIO
    own_window = board.OWN_WINDOW
    exit_reasons = frozenset(
        {
            constants.KVM_EXIT_IO,
            constants.KVM_EXIT_MMIO,
            constants.KVM_EXIT_X86_RDMSR,
            constants.KVM_EXIT_X86_WRMSR,
            constants.KVM_EXIT_SHUTDOWN,
            constants.KVM_EXIT_SYSTEM_EVENT,
            constants.KVM_EXIT_INTR,
            *KINDS,
        }
    )
    probe_names = probes.NAMES
    probe_end = probes.END

    def board(
        self, options: BoardOptions, memory_size: int, end: Callable[[Outcome], None]
    ) -> Board:
        return board.board(options, memory_size, end)

    def load_image(
        self, memory: GuestMemory, image: GuestImage, devices: Sequence[Placement]
    ) -> Entry:
        # The code that reads images is most of what avmm imports, and is only needed from here on.
        from avmm.arch.x86_64.boot.load import load_image  # noqa: PLC0415

        return load_image(memory, image, devices)

    def open_system(self, engine: Callable[[], int] | None = None) -> X86System:
        return X86System(engine=engine)

    def runs_kernels(self, system: X86System) -> bool:
        return kernels.runs_kernels(system)

    def create_vm(self, system: X86System) -> X86Vm:
        return vm.create_vm(system)

    def set_up(self, system: X86System, vcpus: Sequence[X86Vcpu], entry: Entry) -> None:
        for vcpu in vcpus:
            cpu.set_up(system, vcpu, len(vcpus), entry if vcpu.index == 0 else None)

    def enable_exits(
        self, vm_: X86Vm, devices: Sequence[Placement], *, xen: bool, has_calls: bool
    ) -> None:
        vm.enable_exits(vm_, devices, xen=xen, has_calls=has_calls)

    def needs(self, system: X86System, vcpu: X86Vcpu) -> dict[str, Any]:
        return state.needs(system, vcpu)

    def needs_of(
        self, system: X86System, vcpu: X86Vcpu, state_: Mapping[str, Any]
    ) -> dict[str, Any]:
        return state.needs_of(system, vcpu, state_)

    def demand(self, system: X86System, vcpu: X86Vcpu, needs: Mapping[str, Any]) -> None:
        state.demand(system, vcpu, needs)

    def clock_khz(self, needs: Mapping[str, Any]) -> int:
        return int(needs["tsc_khz"])

    def save_vcpu(self, system: X86System, vcpu: X86Vcpu) -> dict[str, Any]:
        return state.save_vcpu(system, vcpu)

    def save_vm(self, vm_: X86Vm) -> dict[str, Any]:
        return state.save_vm(vm_)

    def stood_still(self, state_: object) -> int:
        return state.stood_still(state_)

    def load_vm(self, vm_: X86Vm, state_: object, ahead: int) -> None:
        state.load_vm(vm_, state_, ahead)

    def load_vcpus(
        self, system: X86System, vcpus: Sequence[X86Vcpu], states: Sequence[Any], ahead: int
    ) -> None:
        for vcpu, vcpu_state in zip(vcpus, states, strict=True):
            state.load_vcpu(system, vcpu, vcpu_state)
        state.load_time(vcpus, states, ahead)

    def renew_generation(self, memory: GuestMemory, vm_: X86Vm) -> None:
        generation.renew(memory, vm_)

    def are_halted(self, vm_: X86Vm, vcpus: Sequence[X86Vcpu]) -> bool:
        return halt.are_halted(vm_, vcpus)

    def registers(self, vcpu: X86Vcpu, memory: GuestMemory) -> str:
        return report.registers(vcpu, memory)

    def count_msrs(self, system: X86System) -> int:
        return len(system.msr_indices())

    def set_registers(self, vcpu: X86Vcpu, values: Mapping[str, int]) -> None:
        registers = vcpu.regs()
        for name, value in values.items():
            setattr(registers, name, value)
        vcpu.set_regs(registers)

    def unpacked_kernel(self, kernel: Path) -> bytes:
        from avmm.arch.x86_64.boot.load import unpacked  # noqa: PLC0415 - as in load_image

        return unpacked(kernel)

    def probes(
        self, system: X86System, origin: int, port: int, window: int, register: int
    ) -> list[Probe]:
        return probes.probes(system, origin, port, window, register)


ARCHITECTURE: Final = X86_64()
