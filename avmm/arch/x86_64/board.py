"""A PC's board: the devices that every PC has, and the ranges in which KVM itself answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from avmm.arch.contract import Board, BoardOptions, KernelRange, Space, VirtioRoom
from avmm.arch.x86_64 import acpi, button, generation, layout, mptable
from avmm.bus.interrupts import Pins
from avmm.bus.space import Placement, pio
from avmm.devices.pc.cmos import Cmos
from avmm.devices.pc.exit import DebugExit, ExitStatus
from avmm.devices.pc.i8042 import I8042
from avmm.devices.pc.pci import PciConfig
from avmm.devices.pc.post import DebugConsole, PostCode
from avmm.devices.pc.power import SIZE as POWER_PORTS
from avmm.devices.pc.power import Power
from avmm.devices.pc.pvpanic import Pvpanic
from avmm.devices.serial import Serial
from avmm.options import IO_PORTS
from avmm.outcome import CRASHED, Cause, Outcome

SERIAL_PORT: Final = 0x3F8
SERIAL_IRQ: Final = 4
PANIC_PORT: Final = 0x505
"""The port that QEMU's pvpanic has."""
EXIT_STATUS_PORT: Final = 0xF8
"""The port at which avmm's own guests write the status with which the run ends."""

_PORTS: Final = IO_PORTS.most + 1
SPACES: Final = {
    "pio": Space("port", _PORTS),
    "mmio": Space("address", layout.GPA_LIMIT),
    "msr": Space("MSR", 1 << 32, unit=8),
}
IN_KERNEL: Final = (
    KernelRange("pio", 0x20, 0x21, "PIC"),
    KernelRange("pio", 0xA0, 0xA1, "PIC"),
    KernelRange("pio", 0x4D0, 0x4D1, "PIC"),
    KernelRange("pio", 0x40, 0x43, "PIT"),
    KernelRange("pio", 0x61, 0x61, "PIT"),
    KernelRange("mmio", layout.IOAPIC, layout.IOAPIC + 0xFF, "IOAPIC"),
    KernelRange("mmio", layout.LAPIC, layout.LAPIC + 0xFFF, "LAPIC"),
    KernelRange("mmio", layout.KVM_IDENTITY_MAP, layout.KVM_PAGES_END - 1, "TSS"),
    KernelRange("msr", 0x800, 0x8FF, "LAPIC"),
)
PINS: Final = Pins(
    mptable.IRQ_PINS,
    {
        0: "the timer",
        2: "the second PIC",
        button.GSI: "the power button",
        generation.GSI: "the generation id",
    },
)
"""The pins of the IOAPIC. The first 16 are also the inputs of the two PICs. KVM lays them out in
this way by itself.
"""
VIRTIO: Final = VirtioRoom(
    range(layout.VIRTIO, layout.VIRTIO_END, layout.VIRTIO_STEP),
    # Inputs of the IOAPIC at which guests do not expect a standard device of a PC.
    (5, 6, 7, 9, 10, 11, 12, 14, 15, *range(16, 24)),
)
OWN_WINDOW: Final = range(layout.MMIO, layout.MMIO_END)


def board(options: BoardOptions, memory_size: int, end: Callable[[Outcome], None]) -> Board:
    """The devices that every PC has and that a guest may depend on."""

    def end_with(status: int) -> None:
        end(Outcome(Cause.EXIT, status))

    def reset() -> None:
        end(Outcome(Cause.RESET))

    def power_off() -> None:
        end(Outcome(Cause.SHUTDOWN))

    def panicked() -> None:
        end(Outcome(Cause.CRASH, CRASHED, "the guest has panicked"))

    serial = Serial(stall=options.stall)
    keyboard = I8042(reset)
    high = layout.RAM.above_hole(memory_size)
    cmos = Cmos(
        low_memory=memory_size - high, high_memory=high, cpus=options.cpus, clock=options.wall
    )
    places: list[Placement] = [
        pio(serial, SERIAL_PORT, 8, irq=SERIAL_IRQ),
        pio(cmos, 0x70, 2),
        pio(keyboard, 0x60, 1, offset=0, irq=button.KEYBOARD_IRQ),
        pio(keyboard, 0x64, 1, offset=4),
        pio(PostCode(), 0x80, 1),
        pio(DebugConsole(), 0xE9, 1),
        pio(PciConfig(), 0xCF8, 8),
        pio(ExitStatus(end_with), EXIT_STATUS_PORT, 4),
    ]
    if options.acpi:
        power = Power(power_off, reset, off_type=acpi.SLEEP_TYPE_OFF, reset_value=acpi.RESET_VALUE)
        places.append(pio(power, layout.POWER_PORT, POWER_PORTS))
        places.append(pio(Pvpanic(panicked), PANIC_PORT, 1))
    if options.debug_exit is not None:
        width = min(4, _PORTS - options.debug_exit)
        places.append(pio(DebugExit(end_with), options.debug_exit, width))
    return Board(serial, places, partial(button.press, keyboard=keyboard, has_acpi=options.acpi))
