"""Interrupts as a device sees them: a line to an interrupt controller, or a message (MSI).

A line is an eventfd that the kernel listens to (irqfd), so to raise it, any thread writes eight
bytes. No vCPU, no lock and no exit is involved. A line is an edge interrupt: the guest is
interrupted when it goes from low to high.

A message is one ioctl (KVM_SIGNAL_MSI), which needs no route of its own. With a route for an
irqfd, a message would be as cheap as a line. But setting a route replaces KVM's whole table and
waits for a grace period of the kernel, which takes many times as long as an ioctl.

Interrupt numbers are KVM's GSIs. The architecture says which of them are input pins that a device
can drive (`Pins`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from avmm.errors import ConfigError, StateError
from avmm.forks import close_descriptor, closed_in_child
from avmm.kvm import eventfd
from avmm.kvm.vm import Vm


class Pins(NamedTuple):
    """The input pins of a board's interrupt controller: GSIs from 0 on."""

    size: int
    reserved: Mapping[int, str] = MappingProxyType({})
    """Pins that no device may drive, each with its owner."""

    def demand(self, gsi: int, owner: str) -> None:
        """Raise `ConfigError`, which names `owner`, if a device cannot have this pin."""
        if 0 <= gsi < self.size and gsi not in self.reserved:
            return
        why = f"belongs to {self.reserved[gsi]}" if gsi in self.reserved else "does not exist"
        raise ConfigError(f"{owner}: interrupt {gsi} {why}; expected {self._spans()}")

    def _spans(self) -> str:
        """The free pins in words: "1, 3 to 12 or 14 to 23"."""
        free = [gsi for gsi in range(self.size) if gsi not in self.reserved]
        spans: list[list[int]] = []
        for gsi in free:
            if spans and spans[-1][-1] == gsi - 1:
                spans[-1].append(gsi)
            else:
                spans.append([gsi])
        words = [f"{s[0]}" if len(s) == 1 else f"{s[0]} to {s[-1]}" for s in spans]
        return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


class IrqLine:
    """One interrupt input, driven by one device. See `avmm.devices.base.InterruptLine`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._asserted = False
        # One thread may drive the line while another closes the machine. After the close, the
        # descriptor's number may belong to another file and must not be written to.
        self._closing = threading.Lock()
        # In the child nobody can hold that lock to any purpose, so it is not taken.
        closed_in_child(self, lambda line: close_descriptor(line._fd))

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

    def connect(self, vm: Vm, gsi: int) -> None:
        """Connect the line to `vm`. An interrupt that was raised before arrives now. Raises
        `KvmError`."""
        vm.irqfd(self._fd, gsi)

    def close(self) -> None:
        """Close the eventfd; idempotent."""
        with self._closing:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class LevelInput:
    """A level-triggered interrupt input, which is high while any of its lines is.

    Lines are driven by their devices in any threads, and no lock is shared by them. Whoever has
    changed a line tells KVM how the input is now, and looks again afterwards: if another thread
    has changed it meanwhile and told KVM first, the second look finds the difference.
    """

    def __init__(self, gsi: int) -> None:
        self._gsi = gsi
        self._vm: Vm | None = None
        self.lines: list[LevelLine] = []

    @property
    def is_high(self) -> bool:
        """Does any line assert it?"""
        return any(line.asserted for line in self.lines)

    def connect(self, vm: Vm) -> None:
        """From now on KVM is told. Raises `KvmError`."""
        self._vm = vm
        self.drive()

    def drive(self) -> None:
        """Tell KVM how it is. Does nothing before there is a VM."""
        if self._vm is None:
            return
        while True:
            level = self.is_high
            self._vm.irq_line(self._gsi, level)
            if self.is_high is level:
                return


class LevelLine:
    """One device's line to a level-triggered input. See `avmm.devices.base.InterruptLine`."""

    def __init__(self, input_: LevelInput) -> None:
        self._input = input_
        self.asserted = False
        # As in `IrqLine`: after the close, the VM's descriptor may be another file's.
        self._closing = threading.Lock()
        self._closed = False

    def set(self, asserted: bool) -> None:
        """Drive the line; the guest is interrupted while any device asserts the input."""
        asserted = bool(asserted)  # a device may give a bit of its status
        with self._closing:
            if not self._closed and asserted is not self.asserted:
                self.asserted = asserted
                self._input.drive()

    def pulse(self) -> None:
        """Assert the line for a moment. A guest that has the interrupt masked misses it."""
        self.set(True)
        self.set(False)

    def close(self) -> None:
        """Drive nothing from now on; idempotent."""
        with self._closing:
            self._closed = True


class MessageInterrupt:
    """A message-signalled interrupt of a running machine. Any thread."""

    def __init__(self, vm: Vm, address: int, data: int) -> None:
        self._vm: Vm | None = vm
        self._address = address
        self._data = data
        self._asserted = False
        self._closing = threading.Lock()

    def set(self, asserted: bool) -> None:
        """Send the message at each change from false to true."""
        if asserted and not self._asserted:
            self.pulse()
        self._asserted = asserted

    def pulse(self) -> None:
        """Send the message once; does nothing once the machine is closed."""
        with self._closing:
            if self._vm is not None:
                self._vm.signal_msi(self._address, self._data)

    def close(self) -> None:
        """Send nothing from now on; idempotent."""
        with self._closing:
            self._vm = None


class Interrupts:
    """The interrupt inputs of one machine and who drives them; owns their eventfds.

    Lines are handed out while the machine is assembled, possibly before there is a VM. `connect`
    then tells KVM about all of them.
    """

    def __init__(self, pins: Pins) -> None:
        self._pins = pins
        self._owners: dict[int, str] = {}
        self._lines: dict[int, IrqLine] = {}
        self._inputs: dict[int, LevelInput] = {}
        self._messages: list[MessageInterrupt] = []
        self._vm: Vm | None = None

    def line(self, gsi: int, owner: str, *, level: bool = False) -> IrqLine | LevelLine:
        """The input pin `gsi` for the device named `owner`. With `level` others may share it.

        Raises `ConfigError` if there is no such pin, or if another device already drives it and
        one of the two does not share it.
        """
        self._pins.demand(gsi, owner)
        if gsi in self._owners and not (level and gsi in self._inputs):
            share = ""
            if level or gsi in self._inputs:
                share = "; expected level=True for each of those that share it"
            raise ConfigError(
                f"{owner}: interrupt {gsi} is already driven by {self._owners[gsi]}{share}"
            )
        if level:
            self._owners.setdefault(gsi, owner)
            input_ = self._inputs.setdefault(gsi, LevelInput(gsi))
            input_.lines.append(LevelLine(input_))
            return input_.lines[-1]
        line = IrqLine(eventfd())
        self._lines[gsi], self._owners[gsi] = line, owner
        return line

    def connect(self, vm: Vm) -> None:
        """Let `vm` listen to all lines. Raises `KvmError`."""
        self._vm = vm
        for gsi, line in self._lines.items():
            line.connect(vm, gsi)
        for input_ in self._inputs.values():
            input_.connect(vm)

    @property
    def levels(self) -> list[list[int]]:
        """For each level-triggered input: its number, and a bit for each of its lines that is
        asserted."""
        return [
            [gsi, sum(line.asserted << at for at, line in enumerate(input_.lines))]
            for gsi, input_ in self._inputs.items()
        ]

    def set_levels(self, levels: Sequence[tuple[int, int]]) -> None:
        """Drive the lines as `levels` has told. Raises `StateError` if these are not the levels of
        these inputs."""
        known = [(gsi, 1 << len(input_.lines)) for gsi, input_ in self._inputs.items()]
        if [gsi for gsi, _ in levels] != [gsi for gsi, _ in known] or any(
            bits >= limit for (_, bits), (_, limit) in zip(levels, known, strict=True)
        ):
            raise StateError("it has levels of other interrupts than this machine")
        for gsi, bits in levels:
            input_ = self._inputs[gsi]
            for at, line in enumerate(input_.lines):
                line.asserted = bool(bits >> at & 1)
            input_.drive()

    def message(self, address: int, data: int) -> MessageInterrupt:
        """A message-signalled interrupt: each `pulse` sends `data` to `address` (Intel SDM 3A,
        11.11). Call it after `connect`."""
        assert self._vm is not None
        message = MessageInterrupt(self._vm, address, data)
        self._messages.append(message)
        return message

    @property
    def has_messages(self) -> bool:
        """Has anybody asked for a message-signalled interrupt?"""
        return bool(self._messages)

    def close(self) -> None:
        """Close the eventfds. Call it after all vCPUs have ended; idempotent."""
        for line in self._lines.values():
            line.close()
        for input_ in self._inputs.values():
            for level in input_.lines:
                level.close()
        for message in self._messages:
            message.close()
