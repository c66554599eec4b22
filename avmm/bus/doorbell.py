"""Doorbells: a guest's write that wakes a task without an exit (KVM's ioeventfd)."""

from __future__ import annotations

import os
from typing import NamedTuple

import trio

from avmm.forks import closed_in_child
from avmm.kvm import eventfd
from avmm.kvm.vm import Vm


class Watch(NamedTuple):
    """The write that rings a doorbell: `value`, of `size` bytes, at an address or port."""

    address: int
    size: int
    value: int
    is_port: bool


class EventDoorbell:
    """An eventfd that KVM, a device's `write`, or both write to; see
    `avmm.devices.base.Doorbell`."""

    def __init__(self, watches: list[Watch]) -> None:
        """`watches` are the writes that KVM should handle once there is a VM (`connect`)."""
        self._fd = eventfd()
        self._watches = watches
        closed_in_child(self, EventDoorbell.close)

    def connect(self, vm: Vm) -> None:
        """Have KVM ring it, if this KVM can. Otherwise such writes reach the device."""
        for watch in self._watches:
            vm.ioeventfd(self._fd, watch.address, watch.size, watch.value, port=watch.is_port)

    def ring(self) -> None:
        """Ring it. Any thread may call this."""
        os.eventfd_write(self._fd, 1)

    async def wait(self) -> None:
        """Return once it has been rung since the last return."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                os.eventfd_read(self._fd)
            except BlockingIOError:
                continue
            return

    def close(self) -> None:
        """Close the eventfd. Call it after all vCPUs and tasks have ended; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
