"""The parts of a machine, put together: all that exists before anything runs.

Built from a `MachineConfig` in the one order that works, and closed in the opposite one.
`avmm.machine` runs them in a nursery.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
)
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from avmm import guests
from avmm.arch.x86_64 import acpi, cpu, layout, report
from avmm.arch.x86_64 import state as cpu_state
from avmm.boot.entry import Entry
from avmm.bus.coalesced import CoalescedWrites
from avmm.bus.doorbell import EventDoorbell
from avmm.bus.interrupts import Interrupts
from avmm.bus.space import Bus, Placement, PostedWrites, pio
from avmm.config import UNCLAIMED, MachineConfig
from avmm.devices.base import Device, Doorbell, InterruptLine
from avmm.devices.pc.cmos import Cmos
from avmm.devices.pc.exit import DebugExit, ExitStatus
from avmm.devices.pc.i8042 import I8042
from avmm.devices.pc.pci import PciConfig
from avmm.devices.pc.post import DebugConsole, PostCode
from avmm.devices.pc.power import SIZE as POWER_PORTS
from avmm.devices.pc.power import Power
from avmm.devices.serial import Serial
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.rng import Rng
from avmm.disks import open_disk
from avmm.errors import (
    AvmmError,
    ConfigError,
    GuestMemoryError,
    ImageError,
    StateError,
)
from avmm.kvm import System, Vcpu, Vm, constants
from avmm.kvm.parking import ParkingLot
from avmm.kvm.ring import WriteRing
from avmm.loop import VcpuGroup, VcpuLoop, Wakeup, device_lock
from avmm.memory.dirty import DirtyLog
from avmm.memory.pages import PAGE
from avmm.memory.ram import GPA_LIMIT, HOLE_END, GuestMemory
from avmm.outcome import Cause, Outcome
from avmm.parts import description
from avmm.parts.description import STATE_VERSION, Described
from avmm.parts.placing import Unplaced, allocate, named, virtio
from avmm.plain import MAPPING, U64, Bytes, Fields, ListOf, OrMissing, Row, Text
from avmm.vcpu.calls import XEN_MSR, CallHandler
from avmm.vcpu.completion import CompletionPolicy, Mode
from avmm.vcpu.exits import Exits

logger = logging.getLogger(__name__)

SERIAL_PORT: Final = 0x3F8
SERIAL_IRQ: Final = 4
EXIT_STATUS_PORT: Final = 0xF8
"""Where a guest of avmm's own writes the status that the run is to end with."""
_IN_KERNEL: Final = (
    ("pio", 0x20, 0x21, "PIC"),
    ("pio", 0xA0, 0xA1, "PIC"),
    ("pio", 0x4D0, 0x4D1, "PIC"),
    ("pio", 0x40, 0x43, "PIT"),
    ("pio", 0x61, 0x61, "PIT"),
    ("mmio", layout.IOAPIC, layout.IOAPIC + 0xFF, "IOAPIC"),
    ("mmio", layout.LAPIC, layout.LAPIC + 0xFFF, "LAPIC"),
    ("mmio", layout.KVM_IDENTITY_MAP, layout.KVM_PAGES_END - 1, "TSS"),
    ("msr", 0x800, 0x8FF, "LAPIC"),
)
"""Where KVM answers by itself: a device there would never be called."""
_PORTS: Final = 1 << 16
_MSRS: Final = 1 << 32


class _State(Fields, version=STATE_VERSION):
    """What `Parts.save` gives."""

    memory_size = U64
    vcpus = ListOf(MAPPING)
    vm = MAPPING
    devices = ListOf(Row(Text(), MAPPING))
    """[name, state] of each."""
    memory = OrMissing(ListOf(Row(U64, Bytes()), most=GPA_LIMIT // PAGE))
    """[address, contents] of each run of RAM, where RAM is in the state."""


def _nothing() -> None:
    pass


class _Host:
    """What one device gets; see `avmm.devices.base.Host`."""

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
        self.posted: PostedWrites | None = None
        self.on_nursery: Callable[[], None] = _nothing
        """Called when the device first takes its nursery."""
        self._nursery: trio.Nursery | None = None

    @property
    def nursery(self) -> trio.Nursery:
        if self._nursery is None:
            raise AvmmError("the machine does not run yet: it has no nursery")
        self.on_nursery()
        self.on_nursery = _nothing
        return self._nursery

    def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def wakeup(self) -> Wakeup:
        return Wakeup()

    def doorbell(self, offset: int, size: int, value: int, *, by_exit: bool = False) -> Doorbell:
        return self._doorbell(offset, size, value, by_exit)


class Parts:
    """A machine that does not run yet: VM, memory with the guest loaded, devices, vCPUs.

    `end` is called, in a vCPU's thread, when the guest ends the run. With a `state` nothing is
    booted; RAM is then in `memory`, if that is given (which is closed with the machine, and at
    once where this raises), else in the state, and `described` tells which devices and read-only
    regions the guest knows. With `standby` the state comes later, by `load`,
    and until then the machine holds nothing that another may still need (`acquire`). Raises
    `ConfigError` and `KvmError`, and leaves nothing behind then.
    """

    def __init__(
        self,
        config: MachineConfig,
        devices: Sequence[Placement | Unplaced] = (),
        end: Callable[[Outcome], None] = lambda outcome: None,
        calls: CallHandler | None = None,
        state: Mapping[str, Any] | None = None,
        *,
        memory: GuestMemory | None = None,
        described: Described | None = None,
        standby: bool = False,
    ) -> None:
        self.config = config
        self._end = end
        self._calls = calls
        boots = state is None and not standby
        with ExitStack() as stack:
            if memory is not None:
                stack.callback(memory.close)
                if memory.size != config.memory:
                    raise StateError(
                        f"the guest has {config.memory} bytes of RAM, here are {memory.size}"
                    )
            if config.xen and calls is None:
                raise ConfigError(
                    "xen: nobody answers the hypercalls; expected a handler of calls"
                )
            self.system = System()
            stack.callback(self.system.close)
            if config.cpus > self.system.max_vcpus:
                raise ConfigError(
                    f"cpus {config.cpus}: this host's KVM allows 1 to {self.system.max_vcpus}"
                )
            if memory is None:
                memory = GuestMemory(config.memory)
                stack.callback(memory.close)
            elif memory.size != config.memory:
                raise StateError(
                    f"there are {memory.size} bytes of RAM, of a guest that has {config.memory}"
                )
            self.memory = memory
            self._lay_roms(described)
            self.serial = Serial()
            standard = self._standard_devices(config)
            devices = allocate([*devices, *_configured(config, stack, held=not standby)], standard)
            self.places = [*standard, *devices]
            if described is not None:
                described.demand_devices(self.places)
            entry = self._load_image(devices) if boots else None
            self.vm = self._create_vm(stack)
            self.policy = self._completion(config)
            self._place_all(devices, stack)
            self._enable_exits(devices)
            self.needs: list[dict[str, Any]] = []
            """What a host must have for each vCPU; empty before there is a state. Noted at once: a
            vCPU that runs answers no ioctl before it leaves the guest."""
            self.vcpus = [self._create_vcpu(stack, i) for i in range(config.cpus)]
            self.coalesced = self._coalesce(devices)
            if boots:
                for vcpu in self.vcpus:
                    cpu.set_up(self.system, vcpu, config.cpus, entry if vcpu.index == 0 else None)
                self.needs = [cpu_state.needs(self.system, vcpu) for vcpu in self.vcpus]
            elif state is not None:
                self.load(state)
            self.group = self._group(stack)
            self._stack = stack.pop_all()

    def _lay_roms(self, described: Described | None) -> None:
        roms = [(gpa, _read_rom(rom, self.memory.size)) for gpa, rom in self.config.roms]
        for gpa, data in described.roms if described is not None else roms:
            self.memory.add_readonly(gpa, data)

    def _load_image(self, devices: Sequence[Placement]) -> Entry:
        # Reading images is most of what there is to import, and only needed from here on.
        from avmm.boot.formats import load  # noqa: PLC0415

        config = self.config
        # The bundled guests read no ACPI tables.
        has_acpi = config.acpi and config.kernel is not None
        return load(
            self.memory,
            config.kernel or guests.path("shell"),
            cmdline=config.cmdline if has_acpi else named(config.cmdline, devices),
            initrd=config.initrd,
            modules=config.modules,
            cpus=config.cpus,
            flat=config.flat,
            protocol=config.protocol,
            acpi=_described(self.places) if config.acpi else None,
        )

    def _place_all(self, devices: Sequence[Placement], stack: ExitStack) -> None:
        unclaimed = UNCLAIMED[self.config.unclaimed]
        self.interrupts = Interrupts(self.vm)
        stack.callback(self.interrupts.close)
        self.pio = Bus("port", _PORTS, unclaimed)
        self.mmio = Bus("address", GPA_LIMIT, unclaimed)
        self.msrs = Bus("MSR", _MSRS, unclaimed, unit=8)
        self.devices: list[Device] = []
        self.hosts: list[_Host] = []
        self._coalescing = {id(p.device) for p in devices if getattr(p, "coalesced", False)}
        for place in self.places:
            self._place(place, self.places, stack)

    def _enable_exits(self, devices: Sequence[Placement]) -> None:
        """Asked for only where somebody answers: without, nothing leaves the guest for it."""
        if filtered := [p for p in devices if p.space == "msr"]:
            self._filter_msrs(filtered)
        if self.config.xen:
            self._enable_xen()
        elif self._calls is not None and self.vm.check("KVM_CAP_EXIT_HYPERCALL"):
            self.vm.enable("KVM_CAP_EXIT_HYPERCALL", 1 << constants.KVM_HC_MAP_GPA_RANGE)

    def _create_vm(self, stack: ExitStack) -> Vm:
        vm = self.system.create_vm()
        stack.callback(vm.close)
        vm.create_irqchip(layout.KVM_IDENTITY_MAP, layout.KVM_TSS)
        vm.create_pit()
        for slot, (region, view) in enumerate(self.memory.addresses()):
            vm.set_memory(slot, region.gpa, view, readonly=region.readonly)
        return vm

    def _filter_msrs(self, places: Sequence[Placement]) -> None:
        names = ", ".join(place.device.name for place in places)
        if len(places) > constants.KVM_MSR_FILTER_MAX_RANGES:
            raise ConfigError(
                f"{names}: {len(places)} ranges of MSRs; expected at most "
                f"{constants.KVM_MSR_FILTER_MAX_RANGES}, KVM filters no more"
            )
        if not all(map(self.vm.check, ("KVM_CAP_X86_USER_SPACE_MSR", "KVM_CAP_X86_MSR_FILTER"))):
            raise ConfigError(
                f"{names}: this host's KVM does not hand MSRs over; expected one that offers "
                "KVM_CAP_X86_USER_SPACE_MSR and KVM_CAP_X86_MSR_FILTER (Linux 5.10)"
            )
        self.vm.filter_msrs([(place.base, place.size) for place in places])

    def _enable_xen(self) -> None:
        if not self.vm.intercept_xen(XEN_MSR):
            raise ConfigError(
                "xen: this host's KVM does not hand Xen's hypercalls over; expected one that "
                "offers KVM_CAP_XEN_HVM with their interception (Linux 5.12, CONFIG_KVM_XEN)"
            )

    def _completion(self, config: MachineConfig) -> CompletionPolicy:
        number = config.completion_capability
        announced = number is not None and self.vm.announces(number)
        if number is not None and not announced:
            logger.warning(
                "completion: this KVM does not announce capability %d: the documented list "
                "decides, until the kernel's flag has proved itself",
                number,
            )
        return CompletionPolicy(Mode(config.completion), capability=number, announced=announced)

    def _create_vcpu(self, stack: ExitStack, index: int) -> Vcpu:
        vcpu = self.vm.create_vcpu(index)
        stack.callback(vcpu.close)
        return vcpu

    def _standard_devices(self, config: MachineConfig) -> list[Placement]:
        """What a guest finds on every PC and may not be able to do without."""
        keyboard = I8042(lambda: self._end(Outcome(Cause.RESET)))
        high = sum(region.size for region in self.memory.ram if region.gpa >= HOLE_END)
        cmos = Cmos(low_memory=config.memory - high, high_memory=high, cpus=config.cpus)
        places = [
            pio(self.serial, SERIAL_PORT, 8, irq=SERIAL_IRQ),
            pio(cmos, 0x70, 2),
            pio(keyboard, 0x60, 1, offset=0),
            pio(keyboard, 0x64, 1, offset=4),
            pio(PostCode(), 0x80, 1),
            pio(DebugConsole(), 0xE9, 1),
            pio(PciConfig(), 0xCF8, 8),
            pio(ExitStatus(self._end_with), EXIT_STATUS_PORT, 4),
        ]
        if config.acpi:
            power = Power(
                lambda: self._end(Outcome(Cause.SHUTDOWN)),
                lambda: self._end(Outcome(Cause.RESET)),
                off_type=acpi.SLEEP_TYPE_OFF,
                reset_value=acpi.RESET_VALUE,
            )
            places.append(pio(power, layout.POWER_PORT, POWER_PORTS))
        if config.debug_exit is not None:
            width = min(4, _PORTS - config.debug_exit)
            places.append(pio(DebugExit(self._end_with), config.debug_exit, width))
        return places

    def _end_with(self, status: int) -> None:
        self._end(Outcome(Cause.EXIT, status))

    def _doorbell(
        self,
        device: Device,
        places: Sequence[Placement],
        stack: ExitStack,
        offset: int,
        size: int,
        value: int,
        by_exit: bool,
    ) -> Doorbell:
        bell = EventDoorbell()
        stack.callback(bell.close)
        for place in places:
            at = place.base + offset - place.offset
            if not isinstance(place, Placement) or place.device is not device:
                continue  # what is none is refused in its turn
            mine = place.space in ("pio", "mmio")
            if mine and not by_exit and place.base <= at <= place.base + place.size - size:
                bell.listen(self.vm, at, size, value, port=place.space == "pio")
        return bell

    def _place(self, place: Placement, places: Sequence[Placement], stack: ExitStack) -> None:
        if not isinstance(place, Placement):
            raise ConfigError(f"{place!r} is not placed: expected avmm.pio(...) or avmm.mmio(...)")
        device = place.device
        for space, first, last, owner in _IN_KERNEL:
            if place.space == space and place.base <= last and first < place.base + place.size:
                raise ConfigError(
                    f"{device.name} at {space} {place.base:#x} overlaps the {owner} at "
                    f"{first:#x}-{last:#x}, which is in the kernel"
                )
        bus = {"pio": self.pio, "mmio": self.mmio, "msr": self.msrs}[place.space]
        # By identity: devices may define equality as they like.
        known = [at for at, other in enumerate(self.devices) if other is device]
        host = self.hosts[known[0]] if known else None
        if host is None:
            line = None if place.irq is None else self.interrupts.line(place.irq, device.name)
            host = _Host(self.memory, line, partial(self._doorbell, device, places, stack))
            if id(device) in self._coalescing:
                host.posted = PostedWrites(device, host.lock)
            self.devices.append(device)
            self.hosts.append(host)
            device.attach(host)
        elif place.irq is not None:
            raise ConfigError(f"{device.name}: its interrupt belongs to its first region")
        if place.space == "mmio":
            for region in self.memory.regions:
                if place.base < region.end and region.gpa < place.base + place.size:
                    raise ConfigError(
                        f"{device.name} at address {place.base:#x} overlaps guest memory at "
                        f"{region.gpa:#x}-{region.end - 1:#x}"
                    )
        bus.add(place, host.lock, host.posted)

    def _coalesce(self, devices: Sequence[Placement]) -> CoalescedWrites | None:
        posted = [host.posted for host in self.hosts if host.posted is not None]
        done = [
            self.vm.coalesce(place.base, place.size, port=place.space == "pio")
            for place in devices
            if place.coalesced
        ]
        if not any(done):
            return None
        buses = {True: self.pio, False: self.mmio}
        return CoalescedWrites(WriteRing(self.vm, self.vcpus[0]), buses, posted)

    def save(self, *, with_memory: bool = True) -> dict[str, Any]:
        """All state, as plain data, of a machine that stands still; RAM only `with_memory`."""
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "memory_size": self.memory.size,
            "vcpus": [cpu_state.save_vcpu(self.system, vcpu) for vcpu in self.vcpus],
            "vm": cpu_state.save_vm(self.vm),
            "devices": [[device.name, dict(device.save())] for device in self.devices],
        }
        if with_memory:
            state["memory"] = [[gpa, data] for gpa, data in self.memory.contents()]
        return state

    def describe(self) -> dict[str, Any]:
        """What the machine is; see `avmm.parts.description`."""
        regions = [region for region in self.memory.regions if region.readonly]
        roms = [(region.gpa, self.memory.read(region.gpa, region.size)) for region in regions]
        return description.describe(self.config, self.places, roms)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `save` gave; RAM that is not in it is taken as it is.

        Raises `StateError` where it is not of such a machine, `DeviceError` where a device does
        not take its part.
        """
        saved = _State.read("the machine's state", state)
        if saved.memory_size != self.memory.size:
            raise saved.wrong("memory_size", f"{self.memory.size}, as the machine has")
        names = [device.name for device in self.devices]
        if [name for name, _ in saved.devices] != names:
            raise saved.wrong("devices", f"the states of {', '.join(names)}")
        if len(saved.vcpus) != len(self.vcpus):
            raise saved.wrong("vcpus", f"a list of {len(self.vcpus)}")
        for gpa, data in saved.memory or ():
            try:
                self.memory.write(gpa, data)
            except GuestMemoryError as error:
                raise StateError(f"the state's memory does not fit: {error}") from None
        cpu_state.load_vm(self.vm, saved.vm)
        for vcpu, vcpu_state in zip(self.vcpus, saved.vcpus, strict=True):
            cpu_state.load_vcpu(self.system, vcpu, vcpu_state)
        cpu_state.load_time(self.vcpus, saved.vcpus)
        self.needs = [
            cpu_state.needs_of(self.system, vcpu, vcpu_state)
            for vcpu, vcpu_state in zip(self.vcpus, saved.vcpus, strict=True)
        ]
        # Devices last. An edge that one raised just before the save may still have been on its
        # way through a work queue of the kernel's (irqfd), in no state that could be read. So a
        # device that has cause to interrupt does so again when it is loaded; interrupt chips
        # that were loaded after it would forget that.
        for device, (_, device_state) in zip(self.devices, saved.devices, strict=True):
            device.load(device_state)

    def demand(self, needs: Any) -> None:
        """Raise `StateError` where this host lacks what `needs` told of another machine's."""
        if type(needs) is not list or len(needs) != len(self.vcpus):
            raise StateError(f"the needs of {len(self.vcpus)} vCPUs are expected")
        for vcpu, needed in zip(self.vcpus, needs, strict=True):
            cpu_state.demand(self.system, vcpu, needed)

    async def release(self) -> None:
        """Let go of what only one machine may hold (disks' locks, interfaces), for one that takes
        over. Only while the machine stands still."""
        for device in self.devices:
            await device.release()

    async def acquire(self) -> None:
        """Take hold of it, again or, after `standby`, for the first time.

        Raises `ConfigError` where somebody else has it; then, or cancelled, this machine holds
        nothing of it.
        """
        try:
            for device in self.devices:
                await device.acquire()
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.release()
            raise

    def dirty_log(self) -> DirtyLog:
        """Begin to log which pages of RAM are written; close it."""
        return DirtyLog(self.vm, self.memory)

    def exits(self, vcpu: Vcpu) -> Exits:
        """What serves the exits of `vcpu`."""
        registers = partial(report.registers, vcpu, self.memory)
        return Exits(
            vcpu,
            self.pio,
            self.mmio,
            self.msrs,
            self._end,
            registers,
            self._calls,
            self.coalesced,
        )

    def deliver_coalesced(self) -> None:
        """Let the devices have what the guest has written that no exit has shown."""
        if self.coalesced is not None:
            self.coalesced.deliver()

    def _group(self, stack: ExitStack) -> VcpuGroup:
        lot = ParkingLot(self.vcpus, always=self.policy.mode is Mode.ALWAYS)
        stack.callback(lot.close)
        loops = []
        for vcpu, spot in zip(self.vcpus, lot.spots, strict=True):
            loop = VcpuLoop(vcpu, self.exits(vcpu), self.policy, spot)
            stack.callback(loop.close)
            loops.append(loop)
        return VcpuGroup(lot, loops)

    def close(self) -> None:
        """Give everything back to the host; idempotent, after all that ran has ended."""
        self._stack.close()


def _configured(config: MachineConfig, stack: ExitStack, *, held: bool) -> list[Unplaced]:
    """The virtio devices that the settings ask for, always in the same order.

    Without `held` they do not yet hold what another machine may hold.
    """
    models: list[VirtioDevice] = []
    for number, disk in enumerate(config.disks):
        backend = stack.enter_context(open_disk(disk, held=held))
        models.append(VirtioBlock(backend, serial=disk.serial or f"disk{number}"))
    if config.rng:
        models.append(Rng())
    if config.balloon:
        models.append(Balloon())
    if config.vsock is not None:
        vsock = config.vsock.open(held=held)
        stack.callback(vsock.close)
        models.append(vsock)
    for options in config.net:
        net = options.open(held=held)
        stack.callback(net.backend.close)
        models.append(net)
    return [virtio(model) for model in models]


def _described(places: Sequence[Placement]) -> list[acpi.Described]:
    """What ACPI is to say of the devices that have a name there."""
    grouped: dict[int, list[Placement]] = {}
    for place in places:
        if isinstance(place, Placement) and place.device.acpi_hid:
            grouped.setdefault(id(place.device), []).append(place)
    return [
        acpi.Described(
            mine[0].device.acpi_hid,
            ports=[(place.base, place.size) for place in mine if place.space == "pio"],
            windows=[(place.base, place.size) for place in mine if place.space == "mmio"],
            gsi=next((place.irq for place in mine if place.irq is not None), None),
        )
        for mine in grouped.values()
    ]


def _read_rom(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
    if not data or len(data) > most:
        raise ImageError(f"{path}: expected a ROM of 1 to {most} bytes")
    return data
