"""The parts of a machine: everything that exists before it runs and while it runs.

`avmm.parts.builder` puts them together; `avmm.machine` runs them in a nursery.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from avmm import engine
from avmm.bus.host import DeviceHost
from avmm.bus.interrupts import Interrupts
from avmm.config import Clock
from avmm.ctrl_c import context, undisturbed
from avmm.devices.base import Device
from avmm.errors import DeviceError, GuestMemoryError, StateError
from avmm.memory.dirty import DirtyLog
from avmm.parts import description
from avmm.parts.description import STATE_VERSION
from avmm.plain import MAPPING, U32, U64, Bytes, Fields, ListOf, OneOf, OrMissing, Row, Text
from avmm.threads import in_thread, in_thread_shielded
from avmm.vcpu.exits import Exits

if TYPE_CHECKING:
    from avmm.arch.contract import AnyArchitecture, Board
    from avmm.bus.coalesced import CoalescedWrites
    from avmm.bus.space import Placement
    from avmm.config import MachineConfig
    from avmm.kvm import System, Vcpu, Vm
    from avmm.lockstep import Lockstep
    from avmm.loop import VcpuGroup
    from avmm.memory.ram import GuestMemory
    from avmm.outcome import Outcome
    from avmm.parts.placing import Attached
    from avmm.vcpu.calls import CallHandler
    from avmm.vcpu.completion import CompletionPolicy


_MOST_LEVELS: Final = 256
_MOST_RUNS: Final = 1 << 28
"""The most runs of RAM in a state. A guest that has touched every second page has half as many
runs as pages.
"""


class MachineState(Fields, version=STATE_VERSION):
    """What `Parts.save` returns."""

    memory_size = U64
    vcpus = ListOf(MAPPING)
    vm = MAPPING
    devices = ListOf(Row(Text(), MAPPING))
    memory = OrMissing(ListOf(Row(U64, Bytes()), most=_MOST_RUNS))
    """Runs of RAM, as (GPA, contents)."""
    lines = OrMissing(ListOf(Row(U32, U64), most=_MOST_LEVELS))
    """[interrupt, a bit for each of its lines that is asserted] of each level-triggered input."""
    registers = OrMissing(ListOf(Row(U32, ListOf(Bytes()))))
    """[a device's number, what each of its registers holds that are saved with the machine]."""
    engine = OrMissing(OneOf(*engine.NAMES))
    """The engine whose state it is. Missing: KVM's."""


def engine_of(state: object) -> str:
    """The engine whose state this is; KVM if `state` is none, which is refused later."""
    name = state.get("engine") if isinstance(state, Mapping) else None
    return engine.SOFT if name == engine.SOFT else engine.KVM


def _nothing() -> None:
    pass


class Parts:
    """A machine's VM, memory, devices and vCPUs. `close` gives all of them back."""

    group: VcpuGroup
    """Runs the vCPUs."""

    def __init__(
        self,
        *,
        config: MachineConfig,
        arch: AnyArchitecture,
        system: System,
        memory: GuestMemory,
        board: Board,
        places: Sequence[Placement],
        attached: Attached,
        vm: Vm,
        vcpus: Sequence[Vcpu],
        policy: CompletionPolicy,
        coalesced: CoalescedWrites | None,
        end: Callable[[Outcome], None],
        calls: CallHandler | None,
        lockstep: Lockstep | None,
    ) -> None:
        self.config = config
        self.arch = arch
        self.system = system
        self.memory = memory
        self.serial = board.serial
        self._press_power = board.press_power
        self.places = places
        self.vm = vm
        self.vcpus = vcpus
        self.policy = policy
        self.coalesced = coalesced
        self.buses = attached.buses
        self.interrupts: Interrupts = attached.interrupts
        self.devices: list[Device] = attached.devices
        self.hosts: list[DeviceHost] = attached.hosts
        self.needs: list[dict[str, Any]] = []
        """What a host must have for each vCPU. Empty until the vCPUs have a state."""
        self._end = end
        self._calls = calls
        self.lockstep = lockstep
        """How the guest and the program take turns, if it runs deterministically."""
        self._stack = ExitStack()

    def owns(self, stack: ExitStack) -> None:
        """Let `close` close this stack from now on."""
        self._stack = stack

    def close(self) -> None:
        """Give everything back to the host. Call it after everything that ran has ended. It is
        idempotent, and blocks.
        """
        self._stack.close()

    # -- what runs ------------------------------------------------------------------------------

    def exits(self, vcpu: Vcpu) -> Exits:
        """Make the object that serves the exits of `vcpu`."""
        return Exits(
            vcpu,
            self.buses,
            self.arch.exit_reasons,
            self._end,
            partial(self.arch.registers, vcpu, self.memory),
            self._calls,
            self.coalesced,
            lambda: self.memory.missing,
            _nothing if self.lockstep is None else self.lockstep.settle,
        )

    def press_power(self) -> bool:
        """Press the power button. Returns False if the guest does not listen to it."""
        return self._press_power(self.vm)

    def are_halted(self) -> bool:
        """Can the guest never run again? Call it while the vCPUs are parked."""
        # Whoever has a message-signalled interrupt may send an NMI with it.
        return not self.interrupts.has_messages and self.arch.are_halted(self.vm, self.vcpus)

    def deliver_coalesced(self) -> None:
        """Deliver to the devices the writes that the guest has made without an exit."""
        if self.coalesced is not None:
            self.coalesced.deliver()

    @property
    def quiescable(self) -> Iterable[Device]:
        """The devices to quiesce at a pause. Each iteration looks at their current state."""
        return _Quiescable(self)

    @context
    async def dirty_log(self) -> AsyncIterator[DirtyLog]:
        """Log inside the block which pages of RAM are written. Raises what `DirtyLog` raises."""
        log = DirtyLog(self.vm, self.memory)
        try:
            await in_thread(log.open)
            yield log
        finally:
            await in_thread_shielded(log.close)

    @property
    def clock_khz(self) -> int:
        """The frequency of the guest's own counter, in kHz."""
        return self.arch.clock_khz(self.needs[0])

    # -- what it is ------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The machine's description; see `avmm.parts.description`."""
        regions = [region for region in self.memory.regions if region.readonly]
        roms = [(region.gpa, self.memory.read(region.gpa, region.size)) for region in regions]
        return description.describe(self.config, self.places, roms)

    def demand(self, needs: object) -> None:
        """Raise `StateError` if this host lacks something in `needs`, which another machine's
        vCPUs need.
        """
        if not isinstance(needs, list) or len(needs) != len(self.vcpus):
            raise StateError(f"expected the needs of {len(self.vcpus)} vCPUs")
        for vcpu, needed in zip(self.vcpus, needs, strict=True):
            self.arch.demand(self.system, vcpu, needed)

    # -- its state ------------------------------------------------------------------------------

    def save(self, *, with_memory: bool = True) -> dict[str, Any]:
        """Return the whole state of a machine that stands still, as plain data. It includes RAM
        only if `with_memory` is true.
        """
        return self.save_machine(with_memory=with_memory) | self.save_devices()

    def save_machine(self, *, with_memory: bool = True) -> dict[str, Any]:
        """Return the part of the state that KVM holds, and RAM if `with_memory` is true. Blocks
        for some milliseconds. May be called in any thread.
        """
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "memory_size": self.memory.size,
            "vcpus": [self.arch.save_vcpu(self.system, vcpu) for vcpu in self.vcpus],
            "vm": self.arch.save_vm(self.vm),
        }
        if self.system.engine != engine.KVM:
            state["engine"] = self.system.engine
        if with_memory:
            state["memory"] = [[gpa, data] for gpa, data in self.memory.contents()]
        return state

    def save_devices(self, saved: Mapping[int, Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return the devices' part of the state. `saved` has the states that are saved already, by
        the devices' numbers. `save` of all other devices is called. Call this in trio's thread.
        """
        states = saved or {}
        state: dict[str, Any] = {
            "devices": [
                [
                    device.name,
                    _plain(device, states[number] if number in states else device.save()),
                ]
                for number, device in enumerate(self.devices)
            ]
        }
        if levels := self.interrupts.levels:
            state["lines"] = levels
        saved_registers = (
            (number, host.registers.save()) for number, host in enumerate(self.hosts)
        )
        if registers := [[number, held] for number, held in saved_registers if held]:
            state["registers"] = registers
        return state

    def load(self, state: object) -> None:
        """Restore what `save` returned. RAM that is not in the state stays as it is.

        Raises `StateError` if the state is not one of a machine like this, and `DeviceError` if a
        device refuses its part.
        """
        self.load_machine(state)
        for device, device_state in self.device_states(state):
            device.load(device_state)

    def load_machine(self, state: object) -> None:
        """Do all of `load` except the devices' part, which is only checked. Blocks for some
        milliseconds. May be called in any thread. Raises `StateError`.
        """
        saved = self._read(state)
        for gpa, data in saved.memory or ():
            try:
                self.memory.write(gpa, data)
            except GuestMemoryError as error:
                raise saved.refusal(f"its memory does not fit: {error}") from None
        is_late = self.config.clock == Clock.HOST.value
        ahead = self.arch.stood_still(saved.vm) if is_late else 0
        self.arch.load_vm(self.vm, saved.vm, ahead)
        self.arch.load_vcpus(self.system, self.vcpus, saved.vcpus, ahead)
        try:
            self.interrupts.set_levels([(gsi, bits) for gsi, bits in saved.lines or ()])
        except StateError as error:
            raise saved.refusal(str(error)) from None
        registers = {number: held for number, held in saved.registers or ()}
        rows = len(saved.registers or ())
        if registers.keys() - range(len(self.hosts)) or len(registers) != rows:
            raise saved.wrong("registers", f"those of {len(self.hosts)} devices, each once")
        for number, host in enumerate(self.hosts):
            try:
                host.registers.load(registers.get(number, ()))
            except StateError as error:
                raise saved.refusal(str(error)) from None
        self.needs = [
            self.arch.needs_of(self.system, vcpu, vcpu_state)
            for vcpu, vcpu_state in zip(self.vcpus, saved.vcpus, strict=True)
        ]

    def device_states(self, state: object) -> list[tuple[Device, Any]]:
        """Return each device with its part of the state. Load them in this order, after everything
        else. Raises `StateError` if the states do not belong to this machine's devices.

        Devices are loaded last for this reason: an edge that a device raised just before the save
        may still have been in one of the kernel's work queues (irqfd), and is in no saved state
        then. So a device that has a reason to interrupt does so again when it is loaded. If the
        interrupt chips were loaded after it, that interrupt would be lost.
        """
        states = self._read(state).devices
        return [
            (device, device_state)
            for device, (_, device_state) in zip(self.devices, states, strict=True)
        ]

    def _read(self, state: object) -> MachineState:
        """Read the state of a machine with this one's RAM, vCPUs and devices. Raises `StateError`
        if it is not such a state.
        """
        saved = MachineState.read("the machine's state", state)
        theirs = saved.engine or engine.KVM
        if theirs != self.system.engine:
            raise saved.refusal(
                f"it is of a guest on the engine {theirs!r}; expected {self.system.engine!r}, on "
                "which this machine runs"
            )
        if saved.memory_size != self.memory.size:
            raise saved.wrong("memory_size", f"{self.memory.size}, as the machine has")
        if len(saved.vcpus) != len(self.vcpus):
            raise saved.wrong("vcpus", f"a list of {len(self.vcpus)}")
        names = [device.name for device in self.devices]
        if [name for name, _ in saved.devices] != names:
            raise saved.wrong("devices", f"the states of {', '.join(names)}")
        return saved

    # -- what only one machine may hold at a time ------------------------------------------------

    async def release(self) -> None:
        """Release what only one machine may hold (locks of disks, interfaces), so that another
        machine can take over. Call it only while this one stands still.
        """
        for device in self.devices:
            await device.release()

    async def acquire(self) -> None:
        """Take what only one machine may hold, again or, after standby, for the first time.

        Raises `ConfigError` if somebody else holds a part of it. After an error or a cancellation
        this machine holds none of it.
        """
        try:
            for device in self.devices:
                await device.acquire()
        except BaseException:
            await undisturbed(self.release)
            raise


def _plain(device: Device, state: object) -> dict[str, Any]:
    """A device's state. Raises `DeviceError` if its `save` has returned anything but a mapping."""
    if not isinstance(state, Mapping):
        raise DeviceError(f"{device.name}: save() returned {state!r}; expected a mapping")
    return dict(state)


class _Quiescable:
    """The devices that may be active by themselves: those with a task or a `quiesce` of their
    own.
    """

    def __init__(self, parts: Parts) -> None:
        idle = (Device.run, Device.quiesce)
        self._devices = [
            (device, host, (type(device).run, type(device).quiesce) != idle)
            for device, host in zip(parts.devices, parts.hosts, strict=True)
        ]

    def __iter__(self) -> Iterator[Device]:
        for device, host, is_active in self._devices:
            if is_active or host.has_tasks:
                yield device
