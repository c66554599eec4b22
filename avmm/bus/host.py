"""The implementation of `avmm.devices.base.Host`: what one device gets from its machine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import trio

from avmm.bus.wakeup import TaskWakeup, device_lock
from avmm.errors import AvmmError

if TYPE_CHECKING:
    from avmm.bus.registers import DeviceRegisters
    from avmm.bus.space import PostedWrites
    from avmm.devices.base import Doorbell, InterruptLine
    from avmm.memory.ram import GuestMemory


class DeviceHost:
    """One device's host. `doorbell` makes a doorbell of (offset, size, value, by_exit)."""

    def __init__(
        self,
        memory: GuestMemory,
        interrupt: InterruptLine | None,
        doorbell: Callable[[int, int, int, bool], Doorbell],
    ) -> None:
        self.memory = memory
        self.interrupt = interrupt
        self._doorbell = doorbell
        self.lock: AbstractContextManager[Any] = device_lock()
        self.registers: DeviceRegisters
        """Set by whoever attaches the device, before it does."""
        self.posted: PostedWrites | None = None
        self.has_tasks = False
        """Has the device used its nursery? If so, it may have started tasks."""
        self._nursery: trio.Nursery | None = None

    @property
    def nursery(self) -> trio.Nursery:
        """The machine's nursery. Raises `AvmmError` before the machine runs."""
        if self._nursery is None:
            raise AvmmError("the machine does not run yet: it has no nursery")
        self.has_tasks = True
        return self._nursery

    def start(self, nursery: trio.Nursery) -> None:
        """Say that the machine runs, in this nursery."""
        self._nursery = nursery

    def wakeup(self) -> TaskWakeup:
        """A new wake-up, not set."""
        return TaskWakeup()

    def doorbell(self, offset: int, size: int, value: int, *, by_exit: bool = False) -> Doorbell:
        """See `avmm.devices.base.Host.doorbell`."""
        return self._doorbell(offset, size, value, by_exit)
