"""The power switch of a hardware-reduced ACPI machine: sleep and reset registers at ports.

ACPI specification 6.5, 4.8.4.1 (sleep control and status) and 4.8.3.6 (reset). Three ports: sleep
control, sleep status, reset; the FADT tells the guest where they are (`arch.x86_64.acpi`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final

from avmm.devices.state import Stateless

SIZE: Final = 3
_CONTROL, _STATUS, _RESET = range(SIZE)
_SLEEP_ENABLE: Final = 1 << 5
_TYPE_SHIFT, _TYPE_MASK = 2, 7


class Power(Stateless):
    """Calls `off` when the guest enters the sleep type `off_type`, and `reset` when it writes
    `reset_value` to the reset register. Both are called in the vCPU's thread. Other sleep types
    have no meaning here and are ignored."""

    max_width: ClassVar[int] = 1

    def __init__(
        self,
        off: Callable[[], None],
        reset: Callable[[], None],
        *,
        off_type: int,
        reset_value: int,
    ) -> None:
        self._off = off
        self._reset = reset
        self._off_type = off_type
        self._reset_value = reset_value

    def read(self, offset: int, size: int) -> int:
        """0: the machine has not been asleep."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _CONTROL and value & _SLEEP_ENABLE:
            if value >> _TYPE_SHIFT & _TYPE_MASK == self._off_type:
                self._off()
        elif offset == _RESET and value == self._reset_value:
            self._reset()
