"""Where virtio devices go that are given to a machine without a place of their own.

Each gets the next free window of `layout.VIRTIO` and the next free interrupt, in the order in
which they are given: a machine that is made in the same way again, for a saved state, has them in
the same places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from avmm.arch.x86_64 import layout
from avmm.bus.space import Placement
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.mmio import SIZE, VirtioMmio
from avmm.errors import ConfigError

_INTERRUPTS: Final = (5, 6, 7, 9, 10, 11, 12, 14, 15, *range(16, 24))
"""Inputs of the IOAPIC that no device of a PC's is expected at."""


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A device that the machine finds a place for; made by `virtio`."""

    device: VirtioMmio


def virtio(
    model: VirtioDevice, *, doorbells: bool = True, event_idx: bool = True, indirect: bool = True
) -> Unplaced:
    """Give the machine a virtio device, by virtio-mmio, wherever there is room.

    See `VirtioMmio` for the rest; `mmio(VirtioMmio(model), base, SIZE, irq=...)` puts it at a
    place of your own.
    """
    device = VirtioMmio(model, doorbells=doorbells, event_idx=event_idx, indirect=indirect)
    return Unplaced(device)


def allocate(
    devices: Iterable[Placement | Unplaced], standard: Sequence[Placement]
) -> list[Placement]:
    """`devices`, all of them placed. Raises `ConfigError` where interrupts run out."""
    devices = list(devices)
    placed = [place for place in devices if isinstance(place, Placement)]
    taken = {place.irq for place in (*standard, *placed)}
    interrupts = (irq for irq in _INTERRUPTS if irq not in taken)
    claimed = [(p.base, p.base + p.size) for p in placed if p.space == "mmio"]
    windows = (
        base
        for base in range(layout.VIRTIO, layout.VIRTIO_END, layout.VIRTIO_STEP)
        if not any(base < end and start < base + SIZE for start, end in claimed)
    )
    result = []
    for place in devices:
        if not isinstance(place, Unplaced):
            result.append(place)  # what is no placement at all is refused when it is placed
            continue
        irq, base = next(interrupts, None), next(windows, None)
        if irq is None or base is None:
            raise ConfigError(f"{place.device.name}: no interrupt or address is left for it")
        result.append(Placement(place.device, "mmio", base, SIZE, irq))
    return result


def named(cmdline: str, devices: Iterable[Placement]) -> str:
    """`cmdline`, and after it where Linux finds the virtio devices (for boots without ACPI)."""
    found = [
        f"virtio_mmio.device={place.size:#x}@{place.base:#x}:{place.irq}"
        for place in devices
        if isinstance(place, Placement) and isinstance(place.device, VirtioMmio)
    ]
    return " ".join([*([cmdline] if cmdline else []), *found])
