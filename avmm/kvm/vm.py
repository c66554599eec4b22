"""A VM: its memory slots, its interrupts, and the writes that ring a doorbell."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from avmm.kvm._kvm import ffi, lib
from avmm.kvm.handle import Handle

if TYPE_CHECKING:
    from avmm.kvm import _kvm
    from avmm.kvm.vcpu import Vcpu


class Vm(Handle, ABC):
    """One VM: memory slots, interrupts, vCPUs."""

    def __init__(self, fd: int, run_size: int) -> None:
        """`run_size`: bytes of a vCPU's `kvm_run` mapping (`System.run_size`)."""
        super().__init__(fd)
        self._run_size = run_size

    @abstractmethod
    def create_vcpu(self, index: int) -> Vcpu:
        """The vCPU number `index`."""

    def set_memory(
        self,
        slot: int,
        gpa: int,
        view: memoryview,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> None:
        """Back `gpa` onwards with the memory under `view`, which must outlive the VM.

        With `log_dirty` KVM logs which pages are written from now on (`dirty_log`); calling it
        again with everything else the same turns that on or off.
        """
        region = ffi.new("struct kvm_userspace_memory_region *")
        region.slot = slot
        region.flags = lib.KVM_MEM_READONLY if readonly else 0
        region.flags |= lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        region.guest_phys_addr = gpa
        region.memory_size = view.nbytes
        region.userspace_addr = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
        self._ioctl("KVM_SET_USER_MEMORY_REGION", region)

    def dirty_log(self, slot: int, bitmap: bytearray) -> None:
        """KVM_GET_DIRTY_LOG: which pages of the slot were written since the last call, a bit for
        each, in 64-bit words; `bitmap` must have room for all of them."""
        pointer = ffi.from_buffer(bitmap)
        log = ffi.new("struct kvm_dirty_log *", {"slot": slot, "dirty_bitmap": pointer})
        self._ioctl("KVM_GET_DIRTY_LOG", log)

    def irqfd(self, fd: int, gsi: int, *, assign: bool = True) -> None:
        """Let a write to eventfd `fd` raise the interrupt `gsi` (an edge). With `assign` False,
        stop that."""
        flags = 0 if assign else lib.KVM_IRQFD_FLAG_DEASSIGN
        self._ioctl(
            "KVM_IRQFD", ffi.new("struct kvm_irqfd *", {"fd": fd, "gsi": gsi, "flags": flags})
        )

    def ioeventfd(
        self,
        fd: int,
        address: int,
        size: int,
        value: int,
        *,
        port: bool = False,
        assign: bool = True,
    ) -> bool:
        """KVM_IOEVENTFD: let a write of `value` (`size` bytes) at `address` raise eventfd `fd`,
        without an exit. With `assign` False, stop that. Returns False if this KVM cannot do it."""
        if not self.check("KVM_CAP_IOEVENTFD"):
            return False
        flags = lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        flags |= lib.KVM_IOEVENTFD_FLAG_PIO if port else 0
        flags |= 0 if assign else lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        watch: _kvm.KvmIoeventfdInit = {
            "datamatch": value,
            "addr": address,
            "len": size,
            "fd": fd,
            "flags": flags,
        }
        self._ioctl("KVM_IOEVENTFD", ffi.new("struct kvm_ioeventfd *", watch))
        return True

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive the interrupt input `gsi`."""
        self._ioctl(
            "KVM_IRQ_LINE", ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": level})
        )

    def coalesce(self, address: int, size: int, *, port: bool) -> bool:
        """KVM_REGISTER_COALESCED_MMIO: collect writes there in the ring (`avmm.kvm.ring`).

        Returns False if this KVM has no ring for them.
        """
        if not self.check("KVM_CAP_COALESCED_PIO" if port else "KVM_CAP_COALESCED_MMIO"):
            return False
        zone: _kvm.KvmCoalescedMmioZoneInit = {"addr": address, "size": size, "pio": port}
        self._ioctl(
            "KVM_REGISTER_COALESCED_MMIO", ffi.new("struct kvm_coalesced_mmio_zone *", zone)
        )
        return True

    def signal_msi(self, address: int, data: int) -> int:
        """Deliver a message-signalled interrupt. Returns 0 if no CPU of the guest accepts it."""
        message = ffi.new("struct kvm_msi *")
        message.address_lo, message.address_hi = address & 0xFFFF_FFFF, address >> 32
        message.data = data
        return self._ioctl("KVM_SIGNAL_MSI", message)

    def enable(self, capability: _kvm.Capability, argument: int) -> None:
        """KVM_ENABLE_CAP with one argument."""
        enable = ffi.new("struct kvm_enable_cap *", {"cap": getattr(lib, capability)})
        enable.args[0] = argument
        self._ioctl("KVM_ENABLE_CAP", enable)

    def set_routing(
        self, pins: Iterable[tuple[int, int, int]], messages: Mapping[int, tuple[int, int]]
    ) -> None:
        """Replace the table from interrupt numbers (GSIs) to chips and messages.

        `pins` holds (gsi, chip, pin), `messages` GSI → (MSI address, MSI data).
        """
        pins = list(pins)
        total = len(pins) + len(messages)
        table = ffi.new("struct kvm_irq_routing *", {"nr": total, "entries": total})
        for entry, (gsi, chip, pin) in zip(table.entries, pins, strict=False):
            entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_IRQCHIP
            entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
        for index, (gsi, (address, data)) in enumerate(messages.items(), len(pins)):
            entry = table.entries[index]
            entry.gsi, entry.type = gsi, lib.KVM_IRQ_ROUTING_MSI
            entry.u.msi.address_lo, entry.u.msi.address_hi = address & 0xFFFF_FFFF, address >> 32
            entry.u.msi.data = data
        self._ioctl("KVM_SET_GSI_ROUTING", table)
