"""Interrupts as a device sees them: a line to the PIC and IOAPIC, or a message (MSI).

Both are an eventfd that the kernel listens to (irqfd), so raising one is a write of eight
bytes from whichever thread: no vCPU, no lock and no exit is involved. A line is an edge
interrupt: the guest is interrupted when it goes from low to high.

Interrupt numbers are KVM's GSIs. The first 24 are the pins of the IOAPIC (and the first 16 of
them those of the two PICs as well), as KVM lays them out by itself; messages get the GSIs after
them. Setting a route replaces KVM's whole table, so `Interrupts` keeps all of it.
"""

from __future__ import annotations

import os
import threading
from typing import Final

from avmm.errors import ConfigError
from avmm.kvm import constants, eventfd
from avmm.kvm.vm import Vm

PINS: Final = 24
"""Input pins of the IOAPIC."""
_RESERVED: Final = {0: "the timer", 2: "the second PIC"}


class Line:
    """One interrupt input, driven by one device. See `avmm.devices.base.InterruptLine`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._asserted = False
        # Any thread may drive it, while another closes the machine: a number must not be
        # written to once it may be another file's.
        self._closing = threading.Lock()

    def set(self, asserted: bool) -> None:
        """Drive the line; a change from low to high interrupts the guest."""
        if asserted and not self._asserted:
            self.pulse()
        self._asserted = asserted

    def pulse(self) -> None:
        """Interrupt the guest once; does nothing once the machine is closed."""
        with self._closing:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """Close the eventfd; idempotent."""
        with self._closing:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class Interrupts:
    """The interrupt inputs of one VM and who drives them; owns their eventfds."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lines: dict[int, str] = {}
        self._messages: dict[int, tuple[int, int]] = {}
        self._open: list[Line] = []

    def line(self, gsi: int, owner: str) -> Line:
        """The input pin `gsi` for the device named `owner`.

        Raises `ConfigError` where there is no such pin or somebody drives it already.
        """
        if not 0 <= gsi < PINS or gsi in _RESERVED:
            why = f"belongs to {_RESERVED[gsi]}" if gsi in _RESERVED else "does not exist"
            raise ConfigError(f"{owner}: interrupt {gsi} {why}; expected 1 or 3 to {PINS - 1}")
        if gsi in self._lines:
            raise ConfigError(f"{owner}: interrupt {gsi} is driven by {self._lines[gsi]} already")
        line = self._irqfd(gsi)
        self._lines[gsi] = owner
        return line

    def message(self, address: int, data: int) -> Line:
        """A message-signalled interrupt: each `pulse` sends `data` to `address` (Intel SDM 3A,
        11.11), without an ioctl. Raises `KvmError` where KVM refuses the route."""
        gsi = PINS + len(self._messages)
        messages = {**self._messages, gsi: (address, data)}
        self._vm.set_routing(_default_pins(), messages)
        self._messages = messages
        return self._irqfd(gsi)

    def _irqfd(self, gsi: int) -> Line:
        fd = eventfd()
        line = Line(fd)
        self._open.append(line)
        self._vm.irqfd(fd, gsi)
        return line

    def close(self) -> None:
        """Close the eventfds, when no vCPU runs any more; idempotent."""
        while self._open:
            self._open.pop().close()


def _default_pins() -> list[tuple[int, int, int]]:
    """KVM's own table (arch/x86/kvm/irq_comm.c, `default_routing`)."""
    pins = [(gsi, constants.KVM_IRQCHIP_IOAPIC, gsi) for gsi in range(PINS)]
    for gsi in range(16):
        chip = constants.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else constants.KVM_IRQCHIP_PIC_SLAVE
        pins.append((gsi, chip, gsi % 8))
    return pins
