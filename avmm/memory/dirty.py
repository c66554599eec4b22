"""Logs which pages of a guest's RAM are written while RAM is copied.

Two sides write, and each has its own log. KVM logs what the guest writes (and what KVM writes for
it). `GuestMemory` logs what the host's devices write. A page is read only after it has been taken
out of both logs. A later write is logged again, so copying round after round misses nothing. The
last round is made while the machine stands still.

KVM notes a page when it first maps it for writing (Documentation/virt/kvm/api.rst,
KVM_GET_DIRTY_LOG). So while a log is open, the guest takes one fault for each page that it writes
between two calls of `collect`. Turning it on or off changes a memory slot, for which KVM waits
until no part of the kernel uses the old one: that takes milliseconds.
"""

from __future__ import annotations

from avmm.errors import AvmmError
from avmm.kvm import Vm
from avmm.memory.pages import PAGE, Bitmap
from avmm.memory.ram import GuestMemory


class DirtyLog:
    """The log of one machine's RAM, from `open` until `close`. Call these one after the other,
    from any thread. Raises `KvmError` if KVM does not log.

    There can be one at a time, since whoever collects a page takes it from all others: making a
    second one raises `AvmmError`. Whoever makes one closes it.
    """

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        if memory.is_logged:
            raise AvmmError(
                "this machine's RAM is already being copied for a snapshot or a migration"
            )
        self._vm = vm
        self._memory = memory
        self._slots = [
            (slot, region, view)
            for slot, (region, view) in enumerate(memory.addresses())
            if not region.readonly
        ]
        self._parts = {slot: Bitmap(region.size // PAGE) for slot, region, _ in self._slots}
        memory.log()

    def open(self) -> None:
        """Begin to log the guest's writes. Blocks for milliseconds."""
        self._set(True)

    def collect(self, into: Bitmap) -> None:
        """Add the pages that were written since the log began, or since the last call. Blocks for
        as long as KVM needs to look through its log."""
        self._memory.take_dirty(into)
        for slot, region, _ in self._slots:
            part = self._parts[slot]
            self._vm.dirty_log(slot, part.data)
            into.add(part, region.offset // PAGE)

    def close(self) -> None:
        """Stop logging. Blocks for milliseconds."""
        try:
            self._set(False)
        finally:
            self._memory.unlog()  # last: from here on there may be another log

    def _set(self, on: bool) -> None:
        for slot, region, view in self._slots:
            self._vm.set_memory(slot, region.gpa, view, log_dirty=on)
