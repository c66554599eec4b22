"""Which pages of a guest's RAM are written while somebody copies it.

Two sides write, and each has a log of its own: the guest (and KVM, for it) that of KVM's, the
host's devices that of `GuestMemory`. A page is read only after it was taken out of both; what is
written later is in a log again, so copying round after round misses nothing. The last round is
made while the machine stands still.

KVM notes a page when it first maps it for writing (Documentation/virt/kvm/api.rst,
KVM_GET_DIRTY_LOG), so an open log costs a guest a fault for each page that it writes between two
calls of `collect`. Turning it on or off changes a memory slot, for which KVM waits until no part
of the kernel uses the old one: that takes milliseconds, and is done in a thread.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from avmm.errors import AvmmError
from avmm.kvm.vm import Vm
from avmm.memory.pages import PAGE, Bitmap
from avmm.memory.ram import GuestMemory
from avmm.threads import in_thread, in_thread_shielded


class DirtyLog:
    """`async with DirtyLog(vm, memory) as log:` logs inside the block. From one task.

    There can be one at a time, since whoever collects a page takes it from all others: entering a
    second one raises `AvmmError`. Raises `KvmError` where KVM does not log.
    """

    def __init__(self, vm: Vm, memory: GuestMemory) -> None:
        self._vm = vm
        self._memory = memory
        self._slots = [
            (slot, region, view)
            for slot, (region, view) in enumerate(memory.addresses())
            if not region.readonly
        ]
        self._parts = {slot: Bitmap(region.size // PAGE) for slot, region, _ in self._slots}

    async def __aenter__(self) -> Self:
        """Cancelled, it logs nothing."""
        if self._memory.is_logged:
            raise AvmmError(
                "this machine's RAM is being copied already, for another snapshot or a migration"
            )
        self._memory.log()
        try:
            await in_thread(self._set, True)
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def collect(self, into: Bitmap) -> None:
        """Add the pages that were written since the log began, or since the last call.

        Cancelled, it has added them, or they are added by the next call.
        """
        await in_thread(self._collect, into)

    def _collect(self, into: Bitmap) -> None:
        self._memory.take_dirty(into)
        for slot, region, _ in self._slots:
            part = self._parts[slot]
            self._vm.dirty_log(slot, part.data)
            into.add(part, region.offset // PAGE)

    async def _close(self) -> None:
        try:
            await in_thread_shielded(self._set, False)
        finally:
            self._memory.unlog()  # last: from here on there may be another log

    def _set(self, on: bool) -> None:
        for slot, region, view in self._slots:
            self._vm.set_memory(slot, region.gpa, view, log_dirty=on)
