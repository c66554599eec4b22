"""Machine: a configuration becomes a running guest. The only place that puts the parts together.

`Parts` is all that exists before anything runs, built from a `MachineConfig` in the one order
that works and closed in the opposite one. `Machine` runs the parts in a nursery of its own.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
)
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack

import trio

from avmm import description, guests
from avmm.arch.x86_64 import acpi, cpu, layout, report
from avmm.arch.x86_64 import state as cpu_state
from avmm.bus import Bus, Placement, PostedWrites, pio
from avmm.calls import XEN_MSR, CallHandler
from avmm.coalesced import CoalescedWrites
from avmm.completion import CompletionPolicy, Mode
from avmm.config import UNCLAIMED, MachineConfig, Settings
from avmm.description import Described, Links
from avmm.devices.base import Device, Doorbell, InterruptLine
from avmm.devices.cmos import Cmos
from avmm.devices.console import ConsoleStream
from avmm.devices.exit import DebugExit, ExitStatus
from avmm.devices.i8042 import I8042
from avmm.devices.pci import PciConfig
from avmm.devices.post import DebugConsole, PostCode
from avmm.devices.power import SIZE as POWER_PORTS
from avmm.devices.power import Power
from avmm.devices.serial import Serial
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.mmio import VirtioMmio
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.port import Port
from avmm.devices.virtio.rng import Rng
from avmm.devices.virtio.vsock import Vsock
from avmm.dirty import DirtyLog
from avmm.disks import open_disk
from avmm.doorbell import EventDoorbell
from avmm.errors import (
    AvmmError,
    ConfigError,
    GuestMemoryError,
    HandOverUnknownError,
    ImageError,
    MigrationError,
    StateError,
)
from avmm.exits import Exits
from avmm.group import VcpuGroup
from avmm.irq import Interrupts, Line
from avmm.kvm import System, Vcpu, Vm, constants
from avmm.kvm.parking import ParkingLot
from avmm.kvm.ring import WriteRing
from avmm.loop import VcpuLoop, Wakeup, device_lock
from avmm.memory import HOLE_END, GuestMemory
from avmm.migration import Coordinator
from avmm.outcome import Cause, Outcome
from avmm.placing import Unplaced, allocate, named, virtio

if TYPE_CHECKING:
    from avmm.snapshot import Progress
    from avmm.transfer.pace import Progress as MigrationProgress
    from avmm.transfer.source import Report

logger = logging.getLogger(__name__)

SERIAL_PORT: Final = 0x3F8
SERIAL_IRQ: Final = 4
EXIT_STATUS_PORT: Final = 0xF8
"""Where a guest of avmm's own writes the status that the run is to end with."""
STATE_VERSION: Final = 1
_IN_KERNEL: Final = (
    ("pio", 0x20, 0x21, "PIC"),
    ("pio", 0xA0, 0xA1, "PIC"),
    ("pio", 0x4D0, 0x4D1, "PIC"),
    ("pio", 0x40, 0x43, "PIT"),
    ("pio", 0x61, 0x61, "PIT"),
    ("mmio", layout.IOAPIC, layout.IOAPIC + 0xFF, "IOAPIC"),
    ("mmio", layout.LAPIC, layout.LAPIC + 0xFFF, "LAPIC"),
    ("mmio", layout.KVM_IDENTITY_MAP, layout.KVM_PAGES_END - 1, "TSS"),
)
"""Where KVM answers by itself: a device there would never be called."""
_GPA_LIMIT: Final = 1 << 52
_PORTS: Final = 1 << 16
_MSRS: Final = 1 << 32
_Model = TypeVar("_Model", bound=VirtioDevice)


def _nothing() -> None:
    pass


def _no_progress(progress: object) -> None:
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
        # Reading images is most of what there is to import, and only needed from here on.
        from avmm.boot.formats import load  # noqa: PLC0415

        self.config = config
        self._end = end
        boots = state is None and not standby
        if config.xen and calls is None:
            raise ConfigError("xen: nobody answers the hypercalls; expected a handler of calls")
        with ExitStack() as stack:
            if memory is not None:
                stack.callback(memory.close)
            self.system = System()
            stack.callback(self.system.close)
            if config.cpus > self.system.max_vcpus:
                raise ConfigError(
                    f"cpus {config.cpus}: this host's KVM allows 1 to {self.system.max_vcpus}"
                )
            if memory is None:
                memory = GuestMemory(config.memory)
                stack.callback(memory.close)
            self.memory = memory
            roms = [(gpa, _read_rom(rom, config.memory)) for gpa, rom in config.roms]
            for gpa, data in described.roms if described is not None else roms:
                self.memory.add_readonly(gpa, data)
            self.serial = Serial()
            standard = self._standard_devices(config)
            devices = allocate([*devices, *_configured(config, stack, held=not standby)], standard)
            self.places = places = [*standard, *devices]
            if described is not None:
                described.demand_devices(places)
            entry = None
            if boots:
                # The bundled guests read no ACPI tables.
                has_acpi = config.acpi and config.kernel is not None
                cmdline = config.cmdline if has_acpi else named(config.cmdline, devices)
                entry = load(
                    self.memory,
                    config.kernel or guests.path("shell"),
                    cmdline=cmdline,
                    initrd=config.initrd,
                    modules=config.modules,
                    cpus=config.cpus,
                    flat=config.flat,
                    protocol=config.protocol,
                    acpi=_described(places) if config.acpi else None,
                )
            self.vm = self._create_vm(stack)
            self.policy = self._completion(config)
            self.interrupts = Interrupts(self.vm)
            stack.callback(self.interrupts.close)
            self.pio = Bus("port", _PORTS, UNCLAIMED[config.unclaimed])
            self.mmio = Bus("address", _GPA_LIMIT, UNCLAIMED[config.unclaimed])
            self.devices: list[Device] = []
            self.hosts: list[_Host] = []
            self.msrs = Bus("MSR", _MSRS, UNCLAIMED[config.unclaimed], unit=8)
            self._calls = calls
            self._coalescing = {id(p.device) for p in devices if getattr(p, "coalesced", False)}
            for place in places:
                self._place(place, places, stack)
            # Asked for only where somebody answers: without, nothing leaves the guest for it.
            if filtered := [(p.base, p.size) for p in devices if p.space == "msr"]:
                self.vm.filter_msrs(filtered)
            if config.xen:
                self._enable_xen()
            elif calls is not None and self.vm.check("KVM_CAP_EXIT_HYPERCALL"):
                self.vm.enable("KVM_CAP_EXIT_HYPERCALL", 1 << constants.KVM_HC_MAP_GPA_RANGE)
            self.needs: list[dict[str, Any]] = []
            """What a host must have for each vCPU; empty before there is a state."""
            self.vcpus = [self._create_vcpu(stack, i) for i in range(config.cpus)]
            self.coalesced = self._coalesce(devices)
            if boots:
                for vcpu in self.vcpus:
                    cpu.set_up(self.system, vcpu, config.cpus, entry if vcpu.index == 0 else None)
                self._note_needs()
            elif state is not None:
                self.load(state)
            self.group = self._group(stack)
            self._stack = stack.pop_all()

    def _create_vm(self, stack: ExitStack) -> Vm:
        vm = self.system.create_vm()
        stack.callback(vm.close)
        vm.create_irqchip(layout.KVM_IDENTITY_MAP, layout.KVM_TSS)
        vm.create_pit()
        for slot, (region, view) in enumerate(self.memory.addresses()):
            vm.set_memory(slot, region.gpa, view, readonly=region.readonly)
        return vm

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
        """What the machine is; see `avmm.description`."""
        regions = [region for region in self.memory.regions if region.readonly]
        roms = [(region.gpa, self.memory.read(region.gpa, region.size)) for region in regions]
        return description.describe(self.config, self.places, roms)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `save` gave; RAM that is not in it is taken as it is.

        Raises `StateError` where it is not of such a machine, `DeviceError` where a device does
        not take its part.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if type(version) is not int or version != STATE_VERSION:
            raise StateError(f"no state of a machine in version {STATE_VERSION}")
        if state.get("memory_size") != self.memory.size:
            raise StateError(
                f"the state has {state.get('memory_size')} bytes of memory, the machine "
                f"{self.memory.size}"
            )
        names = [device.name for device in self.devices]
        saved = _pairs("devices", state.get("devices"), str)
        if [name for name, _ in saved] != names:
            raise StateError(f"the state is of devices {[n for n, _ in saved]}, not {names}")
        vcpus = state.get("vcpus")
        if not isinstance(vcpus, list) or len(vcpus) != len(self.vcpus):
            raise StateError(f"the state is not of {len(self.vcpus)} vCPUs")
        for gpa, data in _pairs("memory", state.get("memory", []), int):
            try:
                self.memory.write(gpa, data)
            except (GuestMemoryError, TypeError) as error:
                raise StateError(f"the state's memory does not fit: {error}") from None
        cpu_state.load_vm(self.vm, state.get("vm", {}))
        for vcpu, vcpu_state in zip(self.vcpus, vcpus, strict=True):
            cpu_state.load_vcpu(self.system, vcpu, vcpu_state)
        cpu_state.load_time(self.vcpus, vcpus)
        self._note_needs()
        # Devices last. An edge that one raised just before the save may still have been on its
        # way through a work queue of the kernel's (irqfd), in no state that could be read. So a
        # device that has cause to interrupt does so again when it is loaded; interrupt chips
        # that were loaded after it would forget that.
        for device, (_, device_state) in zip(self.devices, saved, strict=True):
            device.load(device_state)

    def _note_needs(self) -> None:
        # Now: a vCPU that runs answers no ioctl before it leaves the guest.
        self.needs = [cpu_state.needs(self.system, vcpu) for vcpu in self.vcpus]

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

        Raises `ConfigError` where somebody else has it; then this machine holds nothing of it.
        """
        try:
            for device in self.devices:
                await device.acquire()
        except ConfigError:
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


@dataclass(frozen=True)
class Origin:
    """What a machine goes on from where it does not boot: the parameters of `Parts`."""

    state: Mapping[str, Any] | None = None
    open_memory: Callable[[], GuestMemory] | None = None
    described: Described | None = None
    needs: Any = None
    """What its vCPUs demand of this host (`Parts.needs`), to be compared before anything
    else."""
    standby: bool = False


class Machine:
    """A guest that runs while its `async with` block does.

        async with avmm.Machine(kernel="vmlinux", memory="64M", cpus=2) as vm:
            await vm.console.send_all(b"hello\\n")
            print(await vm.wait())

    Settings are those of `MachineConfig`; without `kernel` it runs the bundled shell.
    `devices` are the user's own, placed by `avmm.pio`, `avmm.mmio` and `avmm.msr`, and virtio
    devices, given by `avmm.virtio`; `calls` answers the guest's hypercalls (Xen's, with the
    setting `xen`). With a `state` that `save` gave of a machine like this one, it goes on from
    there instead of booting.

    Entering it raises `ConfigError` for what cannot be, `KvmError` where KVM fails. A device's
    exception, and a vCPU that cannot go on (`VcpuError`), cancel the block and are raised from
    it. Leaving it, however, ends the guest and leaves no thread, descriptor or mapping behind.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        devices: Sequence[Placement | Unplaced] = (),
        calls: CallHandler | None = None,
        state: Mapping[str, Any] | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        if config is not None and settings:
            raise ConfigError("expected either a MachineConfig or settings, not both")
        self.config = config or MachineConfig.make(**settings)
        self._devices = tuple(devices)
        self._calls = calls
        self._origin = Origin(state)
        self._outcomes: list[Outcome] = []
        self._migrating = self._unsettled = False
        self._ended = trio.Event()
        self._parts: Parts | None = None
        self._coordinator: Coordinator | None = None
        self._manager: AbstractAsyncContextManager[None] | None = None

    @classmethod
    def from_origin(
        cls,
        origin: Origin,
        config: MachineConfig,
        devices: Sequence[Placement | Unplaced],
        calls: CallHandler | None,
    ) -> Self:
        """For `avmm`'s own: a machine that goes on from `origin`."""
        machine = cls(config, devices=devices, calls=calls)
        machine._origin = origin
        return machine

    # -- what its user sees ---------------------------------------------------------------

    @property
    def console(self) -> ConsoleStream:
        """The guest's serial console as a trio stream."""
        return self._running.serial.stream

    @property
    def ports(self) -> dict[str, Port]:
        """The ports of the virtio consoles among the devices, by their names."""
        return {
            name: port
            for device in self._running.devices
            if isinstance(device, VirtioMmio) and isinstance(device.model, Console)
            for name, port in device.model.ports.items()
        }

    @property
    def vsock(self) -> Vsock:
        """The guest's socket device; `AvmmError` where it has none."""
        return self._only_model(Vsock, "socket device (the setting vsock)")

    @property
    def balloon(self) -> Balloon:
        """The guest's memory balloon; `AvmmError` where it has none."""
        return self._only_model(Balloon, "balloon (the setting balloon)")

    @property
    def nets(self) -> tuple[Net, ...]:
        """The guest's network devices, in the order in which it was given them."""
        models = (d.model for d in self._running.devices if isinstance(d, VirtioMmio))
        return tuple(model for model in models if isinstance(model, Net))

    def _only_model(self, kind: type[_Model], what: str) -> _Model:
        for device in self._running.devices:
            if isinstance(device, VirtioMmio) and isinstance(device.model, kind):
                return device.model
        raise AvmmError(f"this machine has no {what}")

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM, as the guest has it right now."""
        return self._running.memory

    @property
    def tsc_khz(self) -> int:
        """The frequency of the guest's time stamp counter, in kHz."""
        return int(self._running.needs[0]["tsc_khz"])

    async def wait(self) -> Outcome:
        """Wait until the guest has ended, and say how. May be called again, and by many."""
        await self._ended.wait()
        return self._outcomes[0]

    def stop(self, status: int = 0) -> None:
        """End the guest from outside, paused or not; `wait` tells when that is done."""
        self._end(Outcome(Cause.STOPPED, status))

    def paused(self, deadline: float | None = None) -> AbstractAsyncContextManager[None]:
        """`async with vm.paused():` the machine stands still inside, drained and quiesced.

        `deadline` is in seconds; see `avmm.migration.Coordinator.paused`.
        """
        if self._coordinator is None:
            raise AvmmError("the machine does not exist yet: pause it inside its `async with`")
        return self._coordinator.paused(deadline)

    def save(self) -> dict[str, Any]:
        """The whole state, as plain data; only inside `paused`, else `AvmmError`.

        Raises `DeviceError` where a device cannot be saved. RAM is copied into it.
        """
        if self._coordinator is None or not self._coordinator.is_paused:
            raise AvmmError("a running machine cannot be saved: save it inside `vm.paused()`")
        return self._running.save()

    async def snapshot(
        self,
        path: str | PathLike[str],
        *,
        deadline: float | None = None,
        on_progress: Callable[[Progress], object] = _no_progress,
    ) -> None:
        """Write the whole machine to a file at `path`, from which `avmm.restore` makes one like
        it.

        The guest runs on, but for a moment at the end; that it must come to a standstill within
        `deadline` seconds. The file replaces one that is there when it is whole, or not at all.
        What disks hold is not in it: where they are written, hold the guest in `paused` and copy
        them there as well. Raises `SnapshotError` (a full disk, say), `PauseTimeout`, and
        `DeviceError` where a device cannot be saved. Cancelled, it leaves nothing behind.
        """
        from avmm import snapshot  # noqa: PLC0415 - xxhash and msgpack, for who needs them

        parts, coordinator = self._running, self._coordinator
        assert coordinator is not None
        await snapshot.write(parts, coordinator, path, deadline=deadline, on_progress=on_progress)

    async def migrate(
        self,
        stream: trio.abc.Stream,
        *,
        target_downtime: float = 0.1,
        bandwidth: float | None = None,
        deadline: float | None = None,
        stall_seconds: float = 30.0,
        answer_seconds: float = 10.0,
        on_progress: Callable[[MigrationProgress], object] = _no_progress,
    ) -> Report:
        """Hand the running guest over to `avmm.receive` at the other end of `stream`.

        RAM is copied while the guest runs, until the rest can go over within `target_downtime`
        seconds, throttling a guest that writes faster than the line carries; at most `bandwidth`
        bytes a second. Then it is stopped (within `deadline` seconds), handed over, and this
        machine has ended (`Cause.MOVED`). The line counts as dead when it takes or gives nothing
        for `stall_seconds`.

        Raises `MigrationError`, `PauseTimeout` or `DeviceError` where that fails, or is cancelled,
        and the guest runs on here as before. Only from the moment of the hand-over itself it
        cannot be cancelled; where no answer comes within `answer_seconds` it raises
        `HandOverUnknownError`, the guest stays stopped, and `settle` is for you to call.
        """
        from avmm.transfer.source import Options, Sender  # noqa: PLC0415 - xxhash and msgpack

        parts, coordinator = self._running, self._coordinator
        assert coordinator is not None
        options = Options(target_downtime, bandwidth, deadline, stall_seconds, answer_seconds)
        if self._migrating or self._unsettled:
            raise MigrationError(
                "this machine was handed over and waits for settle()"
                if self._unsettled
                else "this machine is being migrated already"
            )
        self._migrating = True
        sender = Sender(
            parts, coordinator, stream, options, lambda: bool(self._outcomes), on_progress
        )
        try:
            report = await sender.send()
        except HandOverUnknownError:
            self._unsettled = True
            raise
        finally:
            self._migrating = False
        self._end(Outcome(Cause.MOVED))
        return report

    async def settle(self, *, runs_here: bool) -> None:
        """After a `HandOverUnknownError`: say where the guest runs.

        `runs_here=True` lets it run on here: only where it certainly does not run at the
        destination and never will. False ends this machine (`Cause.MOVED`). Raises `ConfigError`
        where somebody else holds its disks or interfaces; then it is as before.
        """
        coordinator = self._coordinator
        if not self._unsettled or coordinator is None:
            raise AvmmError("there is nothing to settle: no hand-over of this machine is unknown")
        if runs_here:
            await self._running.acquire()
            self._unsettled = False
            await coordinator.relinquish()
        else:
            self._unsettled = False
            coordinator.forsake()
            self._end(Outcome(Cause.MOVED))

    def clone(
        self,
        *,
        devices: Sequence[Placement | Unplaced] = (),
        calls: CallHandler | None = None,
        links: Links | None = None,
        deadline: float | None = None,
    ) -> AbstractAsyncContextManager[Machine]:
        """`async with vm.clone() as twin:` a second machine, which goes on from where this one is.

        RAM is shared until one of them writes to it. What cannot be shared is the caller's choice,
        and is asked for where it is missing: `links` says what the twin's disks, networks and
        sockets are, `devices` and `calls` are as for `Machine`. The guest keeps its MAC addresses
        unless `links` says others, which it notices when it looks. Output that this machine's
        consoles have not given to anybody yet is given by both.

        Entering it raises `ConfigError` for what is missing, and as `paused` and `Machine` do.
        """
        return _clone(self, devices, calls, links or Links(), deadline)

    def message_interrupt(self, address: int, data: int) -> Line:
        """A message-signalled interrupt to the guest: `pulse()` sends it, from any thread."""
        return self._running.interrupts.message(address, data)

    # -- its life -------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._manager is not None:
            raise AvmmError("a Machine runs once: make a new one")
        self._manager = self._life()
        await self._manager.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        assert self._manager is not None
        try:
            return await self._manager.__aexit__(kind, error, traceback)
        except BaseExceptionGroup as group:
            # That there are nurseries in here is our business: one failure is that failure.
            only = _only(group)
            if only is None:
                raise
            if only is error or isinstance(only, BaseExceptionGroup):
                return False  # the block's own; trio copies groups on their way
            raise only from only.__cause__

    @asynccontextmanager
    async def _life(self) -> AsyncIterator[None]:
        parts = self.prepare()
        try:
            quiescable = self._quiescable(parts)
            self._coordinator = Coordinator(parts.group, quiescable, parts.deliver_coalesced)
            if self._outcomes:  # stopped before it was entered
                self.stop()
            async with trio.open_nursery() as nursery:
                for device, host in zip(parts.devices, parts.hosts, strict=True):
                    host.start(nursery)
                    if type(device).run is not Device.run:
                        nursery.start_soon(device.run, name=f"{device.name}.run")
                nursery.start_soon(self._run_vcpus, parts)
                try:
                    yield
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            parts.close()

    def prepare(self) -> Parts:
        """For `avmm`'s own: put the parts together before the machine is entered, or look at them.

        They are closed when the machine has been left; who prepares one and does not enter it
        closes them.
        """
        if self._parts is None:
            origin, self._origin = self._origin, Origin()
            memory = None if origin.open_memory is None else origin.open_memory()
            self._parts = Parts(
                self.config,
                self._devices,
                self._end,
                self._calls,
                origin.state,
                memory=memory,
                described=origin.described,
                standby=origin.standby,
            )
            if origin.needs is not None:
                self._demand(self._parts, origin.needs)
        return self._parts

    @staticmethod
    def _demand(parts: Parts, needs: Any) -> None:
        try:
            parts.demand(needs)
        except BaseException:
            parts.close()
            raise

    @staticmethod
    def _quiescable(parts: Parts) -> list[Device]:
        """Who is to be asked at a pause; grows as devices begin tasks."""
        devices = []
        for device, host in zip(parts.devices, parts.hosts, strict=True):
            # A device without a task of its own has nothing that goes on by itself.
            if (type(device).run, type(device).quiesce) != (Device.run, Device.quiesce):
                devices.append(device)
                continue

            def has_tasks(device: Device = device) -> None:
                device.has_tasks = True
                devices.append(device)

            host.on_nursery = has_tasks
        return devices

    async def _run_vcpus(self, parts: Parts) -> None:
        try:
            await parts.group.run()
        finally:
            parts.deliver_coalesced()
            for device in parts.devices:
                device.finish()
            if not self._outcomes:
                self._outcomes.append(Outcome(Cause.STOPPED, detail="the machine was left"))
            self._ended.set()
        logger.debug("guest ended: %s", self._outcomes[0])

    def _end(self, outcome: Outcome) -> None:
        """Any thread. The first outcome counts; a list's append is atomic."""
        self._outcomes.append(outcome)
        if self._parts is not None:
            self._parts.group.stop()

    @property
    def _running(self) -> Parts:
        if self._parts is None:
            raise AvmmError("the machine does not exist yet: use it inside its `async with`")
        return self._parts


@asynccontextmanager
async def _clone(
    machine: Machine,
    devices: Sequence[Placement | Unplaced],
    calls: CallHandler | None,
    links: Links,
    deadline: float | None,
) -> AsyncIterator[Machine]:
    parts = machine._running
    described = description.read(parts.describe(), links)
    with ExitStack() as stack:
        async with machine.paused(deadline):
            state = parts.save(with_memory=False)
            memory = parts.memory.fork()
            stack.callback(memory.close)
        origin = Origin(state, lambda: memory, described)
        twin = Machine.from_origin(origin, described.config, devices, calls)
        async with twin:
            yield twin


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
        models.append(config.vsock.open(held=held))
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


def _pairs(key: str, value: object, kind: type) -> list[tuple[Any, Any]]:
    """A list of pairs out of a hostile state."""
    if not isinstance(value, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and type(pair[0]) is kind
        for pair in value
    ):
        raise StateError(f"the state's {key} are no list of pairs")
    return [(first, second) for first, second in value]


def _read_rom(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from None
    if not data or len(data) > most:
        raise ImageError(f"{path}: expected a ROM of 1 to {most} bytes")
    return data


def _only(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    """The one exception in nurseries' groups, None where there are several.

    A group that somebody raised on purpose is an exception like others.
    """
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and error.message == _NURSERY_GROUP:
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error


_NURSERY_GROUP: Final = "Exceptions from Trio nursery"
