"""Which pages of a guest's RAM are written while somebody copies it.

Two sides write, and each has a log of its own: the guest (and KVM, for it) that of KVM's, the
host's devices that of `GuestMemory`. A page is read only after it was taken out of both; what is
written later is in a log again, so copying round after round misses nothing. The last round is
made while the machine stands still.

KVM notes a page when it first maps it for writing (Documentation/virt/kvm/api.rst,
KVM_GET_DIRTY_LOG), so an open log costs a guest a fault for each page that it writes between two
calls of `collect`.
"""

from __future__ import annotations

from avmm.errors import AvmmError
from avmm.kvm.vm import Vm
from avmm.memory.pages import PAGE, Bitmap
from avmm.memory.ram import GuestMemory


class DirtyLog:
    """Logs from when it is made until it is closed. From one task; raises `KvmError`.

    There can be one at a time, since whoever collects a page takes it from all others:
    `AvmmError` for a second one.
    """

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        if memory.is_logged:
            raise AvmmError(
                "this machine's RAM is being copied already, for another snapshot or a migration"
            )
        self._vm = vm
        self._memory = memory
        self._slots = [
            (slot, region, view)
            for slot, (region, view) in enumerate(memory.addresses())
            if not region.readonly
        ]
        self._parts = {slot: Bitmap(region.size // PAGE) for slot, region, _ in self._slots}
        self._is_open = True
        memory.log()
        try:
            self._set(True)
        except BaseException:
            self.close()
            raise

    def collect(self, into: Bitmap) -> None:
        """Add the pages that were written since the log began, or since the last call."""
        self._memory.take_dirty(into)
        for slot, region, _ in self._slots:
            part = self._parts[slot]
            self._vm.dirty_log(slot, part.data)
            into.add(part, region.offset // PAGE)

    def close(self) -> None:
        """Log no more; idempotent."""
        if self._is_open:
            self._is_open = False
            self._memory.unlog()
            self._set(False)

    def _set(self, on: bool) -> None:
        for slot, region, view in self._slots:
            self._vm.set_memory(slot, region.gpa, view, log_dirty=on)
