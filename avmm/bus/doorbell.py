"""Doorbells: a guest's write that wakes a task without an exit (KVM's ioeventfd)."""

from __future__ import annotations

import os

import trio

from avmm.kvm import eventfd
from avmm.kvm.vm import Vm


class EventDoorbell:
    """An eventfd that KVM, a device's `write`, or both write to; see
    `avmm.devices.base.Doorbell`."""

    def __init__(self) -> None:
        self._fd = eventfd()

    def listen(self, vm: Vm, address: int, size: int, value: int, *, port: bool) -> bool:
        """Let KVM ring it; False where this KVM cannot."""
        return vm.ioeventfd(self._fd, address, size, value, port=port)

    def ring(self) -> None:
        """Any thread."""
        os.eventfd_write(self._fd, 1)

    async def wait(self) -> None:
        """Return once it was rung since the last return."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                os.eventfd_read(self._fd)
            except BlockingIOError:
                continue
            return

    def close(self) -> None:
        """After all vCPUs and tasks have ended; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
