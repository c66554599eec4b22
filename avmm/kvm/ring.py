"""The ring in which KVM collects coalesced writes (`struct kvm_coalesced_mmio_ring`)."""

from __future__ import annotations

from collections.abc import Iterator

from avmm.kvm._kvm import ffi, lib
from avmm.kvm.vcpu import Vcpu
from avmm.kvm.vm import Vm

Write = tuple[bool, int, int, int]
"""(whether to a port, address, size in bytes, value)"""


class WriteRing:
    """The ring of a VM, which is visible in the mappings of all its vCPUs. Only one thread at a
    time may take from it."""

    def __init__(self, vm: Vm, vcpu: Vcpu) -> None:
        """`vcpu` is any vCPU of `vm`. The ring is valid as long as that vCPU is open."""
        self._ring = vcpu.page.write_ring(vm.check("KVM_CAP_COALESCED_MMIO"))
        self._write = ffi.new("struct kvm_coalesced_mmio *")
        self._value = ffi.cast("uint64_t *", self._write.data)

    @property
    def is_empty(self) -> bool:
        """Is there nothing in it, as of now?"""
        return self._ring.first == self._ring.last

    def __iter__(self) -> Iterator[Write]:
        """Take out the writes, oldest first. A write leaves the ring only when the next one is
        asked for."""
        write = self._write
        while lib.avmm_ring_peek(self._ring, write):
            size = min(write.len, 8)
            yield bool(write.pio), write.phys_addr, size, self._value[0] & ((1 << 8 * size) - 1)
            lib.avmm_ring_drop(self._ring)
