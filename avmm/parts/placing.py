"""Finds places for devices, and makes them part of a machine.

**Places.** A virtio device without a place of its own gets the next free window and the next free
interrupt of the architecture (`VirtioRoom`). Devices get them in the order in which they are
given. So if a machine is made again in the same way, for a saved state, its devices are in the
same places.

**Attaching.** Each device gets its host once, with the interrupt of its first place, and each of
its places is claimed on a bus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from avmm.arch.contract import AnyArchitecture, VirtioRoom
from avmm.bus.doorbell import EventDoorbell, Watch
from avmm.bus.host import DeviceHost
from avmm.bus.interrupts import Interrupts
from avmm.bus.registers import DeviceRegisters, Page
from avmm.bus.space import Bus, Placement, PostedWrites
from avmm.config import UNCLAIMED, MachineConfig
from avmm.devices.base import Device
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.mmio import SIZE, VirtioMmio
from avmm.errors import ConfigError
from avmm.memory.ram import GuestMemory


@dataclass(frozen=True, slots=True)
class Unplaced:
    """A device for which the machine finds a place. Made by `virtio`."""

    device: VirtioMmio


def virtio(
    model: VirtioDevice, *, doorbells: bool = True, event_idx: bool = True, indirect: bool = True
) -> Unplaced:
    """A virtio device, attached by virtio-mmio, which the machine puts wherever there is room.

    `VirtioMmio` explains the other arguments. To choose the place yourself, use
    `mmio(VirtioMmio(model), base, SIZE, irq=...)`.
    """
    device = VirtioMmio(model, doorbells=doorbells, event_idx=event_idx, indirect=indirect)
    return Unplaced(device)


def allocate(
    devices: Iterable[Placement | Unplaced], standard: Sequence[Placement], room: VirtioRoom
) -> list[Placement]:
    """`devices`, each with a place.

    Raises `ConfigError` if something is not a placement, or if addresses or interrupts run out.
    """
    devices = list(devices)
    for device in devices:
        if not isinstance(device, Placement | Unplaced):
            raise ConfigError(
                f"{device!r} is not placed: expected avmm.pio(...), avmm.mmio(...), avmm.msr(...) "
                "or avmm.virtio(...)"
            )
    placed = [place for place in devices if isinstance(place, Placement)]
    taken = {place.irq for place in (*standard, *placed)}
    interrupts = (irq for irq in room.interrupts if irq not in taken)
    claimed = [(p.base, p.base + p.size) for p in placed if p.space == "mmio"]
    windows = (
        base
        for base in room.bases
        if not any(base < end and start < base + SIZE for start, end in claimed)
    )
    result = []
    for place in devices:
        if isinstance(place, Placement):
            result.append(place)
            continue
        irq, base = next(interrupts, None), next(windows, None)
        if irq is None or base is None:
            raise ConfigError(f"{place.device.name}: no interrupt or address is left for it")
        result.append(Placement(place.device, "mmio", base, SIZE, irq))
    return result


# -- attaching -----------------------------------------------------------------------------------


@dataclass
class Attached:
    """The devices of a machine in their places. Each has its host, and each bus knows which device
    answers where.
    """

    buses: dict[str, Bus]
    """The bus of each address space, by the name that `Placement.space` uses."""
    interrupts: Interrupts
    devices: list[Device]
    """Each device once, in the order of their first places."""
    hosts: list[DeviceHost]
    """The host of each device, in the same order."""
    doorbells: list[EventDoorbell]
    has_ring: bool = False
    """Does KVM collect writes for at least one of them?"""

    @property
    def pages(self) -> list[Page]:
        """The pages that devices publish."""
        return [page for host in self.hosts for page in host.registers.pages]


def attach(
    stack: ExitStack,
    kind: AnyArchitecture,
    config: MachineConfig,
    memory: GuestMemory,
    places: Sequence[Placement],
) -> Attached:
    """Give each device its host, and claim each place on its bus. Calls the devices' `attach`, in
    trio's thread. KVM is told later (`avmm.parts.wiring`).

    Raises `ConfigError` if a place overlaps another one, RAM or a range in which KVM answers, or
    if two devices want the same interrupt.
    """
    unclaimed = UNCLAIMED[config.unclaimed]
    buses = {
        name: Bus(
            space.name,
            space.limit,
            unclaimed,
            unit=space.unit,
            ram=memory.regions if name == "mmio" else (),
        )
        for name, space in kind.spaces.items()
    }
    interrupts = Interrupts(kind.pins)
    stack.callback(interrupts.close)
    attached = Attached(buses, interrupts, [], [], [])
    for place in places:
        _check_place(kind, memory, place)
        host = _host(attached, place.device)
        if host is None:
            mine = [other for other in places if other.device is place.device]
            host = _new_host(stack, attached, memory, place, mine)
        elif place.irq is not None:
            raise ConfigError(
                f"{place.device.name}: expected its interrupt only with its first region"
            )
        registers = host.registers if host.registers else None
        buses[place.space].add(place, host.lock, host.posted, registers)
    return attached


def _check_place(kind: AnyArchitecture, memory: GuestMemory, place: Placement) -> None:
    name = place.device.name
    if place.space not in kind.spaces:
        raise ConfigError(
            f"{name}: guests of {kind.name} have no address space {place.space!r}; expected one "
            f"of {', '.join(kind.spaces)}"
        )
    end = place.base + place.size
    for taken in kind.in_kernel:
        if place.space == taken.space and place.base <= taken.last and taken.first < end:
            raise ConfigError(
                f"{name} at {place.space} {place.base:#x} overlaps the {taken.owner} at "
                f"{taken.first:#x}-{taken.last:#x}, where the kernel answers"
            )
    if place.space == "mmio":
        for region in memory.regions:
            if place.base < region.end and region.gpa < end:
                raise ConfigError(
                    f"{name} at address {place.base:#x} overlaps guest memory at "
                    f"{region.gpa:#x}-{region.end - 1:#x}"
                )


def _host(attached: Attached, device: Device) -> DeviceHost | None:
    """The host of a device, if it has one already. Devices are compared by identity, because they
    may define equality as they like.
    """
    for known, host in zip(attached.devices, attached.hosts, strict=True):
        if known is device:
            return host
    return None


def _new_host(
    stack: ExitStack,
    attached: Attached,
    memory: GuestMemory,
    first: Placement,
    places: Sequence[Placement],
) -> DeviceHost:
    """Make the host of a device. `places` are all its places, and `first` is the first of them."""
    device = first.device
    if first.level and first.irq is None:
        raise ConfigError(f"{device.name}: level is for an interrupt; expected irq as well")
    line = None
    if first.irq is not None:
        line = attached.interrupts.line(first.irq, device.name, level=first.level)
    host = DeviceHost(memory, line, partial(_doorbell, stack, attached, places))
    host.registers = DeviceRegisters(device, host.lock, host.wakeup, places)
    if any(place.coalesced for place in places):
        host.posted = PostedWrites(device, host.lock, host.registers)
    attached.devices.append(device)
    attached.hosts.append(host)
    device.attach(host)
    host.registers.complete()
    return host


def _doorbell(
    stack: ExitStack,
    attached: Attached,
    places: Sequence[Placement],
    offset: int,
    size: int,
    value: int,
    by_exit: bool,
) -> EventDoorbell:
    """A doorbell at `offset` of a device, in each of its `places` that contains this offset."""
    watches = []
    for place in places:
        at = place.base + offset - place.offset
        inside = place.base <= at <= place.base + place.size - size
        if place.space in ("pio", "mmio") and inside and not by_exit:
            watches.append(Watch(at, size, value, place.space == "pio"))
    bell = EventDoorbell(watches)
    stack.callback(bell.close)
    attached.doorbells.append(bell)
    return bell
