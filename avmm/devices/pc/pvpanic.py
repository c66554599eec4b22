"""The pvpanic device: a guest that panics says so, before it reboots or stops.

QEMU's docs/specs/pvpanic.rst: one port. A read gives the events that the device takes; a write
tells events. Linux finds it by ACPI (QEMU0001; CONFIG_PVPANIC_MMIO, also as a module).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from avmm.devices.state import Stateless

PANICKED: Final = 1 << 0
CRASH_LOADED: Final = 1 << 1
"""The guest has panicked, and handles it itself, by a crash kernel."""


class Pvpanic(Stateless):
    """Calls `panicked` in the vCPU's thread when the guest has panicked and goes no further."""

    acpi_hid = "QEMU0001"
    max_width: ClassVar[int] = 1

    def __init__(self, panicked: Callable[[], None]) -> None:
        self._panicked = panicked

    def read(self, offset: int, size: int) -> int:
        """The events that are understood."""
        return PANICKED | CRASH_LOADED

    def write(self, offset: int, size: int, value: int) -> None:
        if value & PANICKED:
            self._panicked()
