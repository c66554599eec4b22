"""Ports by which a guest ends the run and says how it went.

They are for test guests and unikernels, which then need a single instruction, and neither ACPI nor
a triple fault. Both devices hand the status to a callback, in the vCPU's thread, and do nothing
else: the machine decides what ending means. A guest that writes again before it is stopped causes
another call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from avmm.devices.state import Stateless


class _ExitPort(Stateless):
    max_width: ClassVar[int] = 4

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def read(self, offset: int, size: int) -> int:
        """0, as in QEMU's `debug_exit_read`. Guests recognise the device by that."""
        return 0


class DebugExit(_ExitPort):
    """QEMU's isa-debug-exit (hw/misc/debugexit.c; there at 0x501, by convention at 0xf4).

    Writing `v` ends the run with the status ``(v << 1) | 1``: always odd, so that a guest's own
    status is never taken for a success of the machine monitor. The status is not cut to the
    eight bits that a process can return.
    """

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit(value << 1 | 1)


class ExitStatus(_ExitPort):
    """avmm's own port: writing `v`, up to 32 bits wide, ends the run with exactly the status
    `v`."""

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit(value)
