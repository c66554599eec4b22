"""The steps from a config to a machine that could run, in order. See `avmm.parts`.

**Where a step runs.** Steps that wait for files or for KVM run in a worker thread: above all
decompressing a kernel, setting memory slots (KVM waits for a grace period of the kernel) and
closing a VM. Steps that call a user's code (`Device.attach` and `Device.load`) run in trio's
thread, where its author expects it to run.

**Failure and cancellation.** Each step puts what it has opened on the machine's exit stack before
it does anything that could fail. A step that has begun in a thread runs to its end. Between two
steps, `build` can be cancelled. Before `build` raises, for whatever reason, everything that was
opened is closed again, also in a worker thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar, TypeVarTuple

from avmm import arch, engine, guests
from avmm.arch.contract import AnyArchitecture, BoardOptions, GuestImage
from avmm.bus.coalesced import CoalescedWrites
from avmm.config import Clock, MachineConfig
from avmm.errors import ConfigError, EngineUnavailable, host_errors
from avmm.kvm import KvmUnavailable, System
from avmm.kvm.claims import DeviceClaims
from avmm.kvm.parking import ParkingLot
from avmm.kvm.ring import WriteRing
from avmm.lockstep import GuestTime
from avmm.loop import VcpuGroup, VcpuLoop
from avmm.memory.layout import RamLayout
from avmm.memory.ram import GuestMemory
from avmm.outcome import Outcome
from avmm.parts import memory as ram
from avmm.parts import wiring
from avmm.parts.configured import configured
from avmm.parts.description import Described
from avmm.parts.parts import Parts, engine_of
from avmm.parts.placing import Unplaced, allocate, attach
from avmm.parts.saving import load
from avmm.threads import in_thread, in_thread_shielded
from avmm.vcpu.calls import CallHandler
from avmm.vcpu.completion import CompletionMode, CompletionPolicy

if TYPE_CHECKING:
    from avmm.boot.entry import Entry
    from avmm.bus.space import Placement
    from avmm.kvm import Vcpu, Vm
    from avmm.parts.placing import Attached

logger = logging.getLogger(__name__)

_CANNOT: Final = "the machine cannot be made"

_Value = TypeVar("_Value")
_Args = TypeVarTuple("_Args")


class Origin(NamedTuple):
    """From where a machine continues if it does not boot."""

    state: object = None
    """What `Parts.save` returned for a machine like this one."""
    open_memory: Callable[[RamLayout], GuestMemory] | None = None
    """Returns the RAM that belongs to the state. The machine closes it. If this is None, RAM is in
    the state.
    """
    described: Described | None = None
    """The description that was read: which devices and read-only regions the guest knows."""
    needs: object = None
    """What the vCPUs need from this host (`Parts.needs`)."""
    standby: bool = False
    """The state comes later, with `Parts.load`. Until then the machine holds nothing that another
    machine may still need (`Parts.acquire`).
    """

    @property
    def boots(self) -> bool:
        """Does the machine boot an image, instead of continuing from a state?"""
        return self.state is None and not self.standby


BOOT: Final = Origin()
"""The origin of a machine that boots: there is nothing from which it continues."""


async def build(
    config: MachineConfig,
    devices: Sequence[Placement | Unplaced] = (),
    end: Callable[[Outcome], None] = lambda outcome: None,
    calls: CallHandler | None = None,
    origin: Origin = BOOT,
) -> Parts:
    """Put a machine together. `end` is called, in a vCPU's thread, when the guest ends the run.

    Raises `ConfigError` for an impossible setting, `StateError` if the machine cannot continue
    from `origin`, and `KvmError` if KVM fails. After an error or a cancellation nothing is left
    behind.
    """
    stack = ExitStack()
    try:
        return await _build(stack, config, devices, end, calls, origin)
    except BaseException:
        await in_thread_shielded(stack.close)
        raise


async def dismantle(parts: Parts) -> None:
    """Give everything back to the host. Call it after everything that ran has ended. It is
    shielded from cancellation, and idempotent.
    """
    await in_thread_shielded(parts.close)


async def _build(
    stack: ExitStack,
    config: MachineConfig,
    devices: Sequence[Placement | Unplaced],
    end: Callable[[Outcome], None],
    calls: CallHandler | None,
    origin: Origin,
) -> Parts:
    kind = await in_thread(arch.host)  # in a thread, because it imports the architecture
    with host_errors(_CANNOT):
        # Memory comes first, because the file that it is opened from is closed with it.
        memory = await in_thread(ram.open_memory, stack, kind.ram, config, origin)
    if origin.boots and config.clock != Clock.GUEST.value:
        raise ConfigError(
            f"clock {config.clock!r}: it is for a machine that continues from a saved state"
        )
    seed = config.deterministic
    if seed is not None and not origin.boots:
        raise ConfigError(f"deterministic {seed}: it is for a machine that boots")
    if config.cpus > kind.most_cpus:
        raise ConfigError(f"cpus {config.cpus}: expected 1 to {kind.most_cpus}")
    guest_time = None if seed is None else engine.guest_time()
    board = kind.board(_board_options(config, guest_time), config.memory, end)
    own = await in_thread(_configured, stack, config, not origin.standby)
    added = allocate([*devices, *own], board.places, kind.virtio)
    places = [*board.places, *added]
    if origin.described is not None:
        origin.described.demand_devices(places)
    entry = None
    if origin.boots:
        entry = await in_thread(kind.load_image, memory, _image(config), places)
    with host_errors(_CANNOT):
        system = await in_thread(_open_system, stack, kind, config, calls, origin, entry, seed)
        config = replace(config, engine=system.engine)
        vm = await in_thread(wiring.create_vm, stack, kind, system, memory)
    lockstep = None
    if guest_time is not None:
        lockstep = engine.lockstep(vm)
        guest_time.order = lockstep.order
    attached = attach(stack, kind, config, memory, places)
    with host_errors(_CANNOT):
        await in_thread(
            wiring.wire, kind, vm, memory, attached, added, config.xen, calls is not None
        )
        vcpus = await in_thread(_create_vcpus, stack, vm, config.cpus)
    parts = Parts(
        config=config,
        arch=kind,
        system=system,
        memory=memory,
        board=board,
        places=places,
        attached=attached,
        vm=vm,
        vcpus=vcpus,
        policy=_policy(vm, config),
        coalesced=_coalesced(attached, vm, vcpus),
        end=end,
        calls=calls,
        lockstep=lockstep,
    )
    if entry is not None:
        parts.needs = await in_thread(_set_up, kind, system, vcpus, entry)
    elif origin.state is not None:
        await load(parts, origin.state)
        await in_thread(kind.renew_generation, memory, vm)
    if origin.needs is not None:
        await in_thread(parts.demand, origin.needs)
    with host_errors(_CANNOT):
        parts.group = _loops(stack, parts)
    parts.owns(stack)
    return parts


# -- the steps that belong to no other module ---------------------------------------------------


def _open_system(
    stack: ExitStack,
    kind: AnyArchitecture,
    config: MachineConfig,
    calls: CallHandler | None,
    origin: Origin,
    entry: Entry | None,
    seed: int | None,
) -> System:
    """Open the engine, and check that it can run what the config asks for."""
    if config.xen and calls is None:
        raise ConfigError("xen: expected a handler for the hypercalls (`calls`)")
    choice, is_kernel = config.engine, entry is not None and entry.is_kernel
    if choice == engine.AUTO and not origin.boots:
        choice = engine_of(origin.state)
    try:
        system = engine.opened(kind, choice, is_kernel=is_kernel, seed=seed)
    except (KvmUnavailable, EngineUnavailable) as error:
        if not origin.boots:
            error.add_note(
                f"The guest was on the engine {choice!r}. It can go on only on that one."
            )
        raise
    stack.callback(system.close)
    if config.cpus > (most := system.max_vcpus):
        where = "the software engine" if system.engine == engine.SOFT else "this host"
        raise ConfigError(f"cpus {config.cpus}: expected 1 to {most} on {where}")
    return system


def _configured(stack: ExitStack, config: MachineConfig, held: bool) -> list[Unplaced]:
    return configured(config, stack, held=held)


def _board_options(config: MachineConfig, guest_time: GuestTime | None) -> BoardOptions:
    options = BoardOptions(config.cpus, config.acpi, config.debug_exit)
    if guest_time is None:
        return options
    # Whoever reads the serial port has read all that he wants whenever the guest runs. So if it is
    # full, nobody reads, and there is no use in waiting by a clock that stands still.
    return options._replace(wall=guest_time.wall, stall=0.0)


def _image(config: MachineConfig) -> GuestImage:
    return GuestImage(
        kernel=config.kernel or guests.path("shell"),
        cmdline=config.cmdline,
        initrd=config.initrd,
        modules=config.modules,
        cpus=config.cpus,
        flat=config.flat,
        protocol=config.protocol,
        acpi=config.acpi,
        is_bundled=config.kernel is None,
    )


def _create_vcpus(stack: ExitStack, vm: Vm, count: int) -> list[Vcpu]:
    vcpus = []
    for index in range(count):
        vcpu = vm.create_vcpu(index)
        stack.callback(vcpu.close)
        vcpus.append(vcpu)
    return vcpus


def _policy(vm: Vm, config: MachineConfig) -> CompletionPolicy:
    """Which exits are completed; see `avmm.vcpu.completion`."""
    number = config.completion_capability
    announced = number is not None and vm.announces(number)
    if number is not None and not announced:
        logger.warning(
            "completion: this KVM does not announce capability %d. avmm goes by its own "
            "list of exits, until the kernel's flag has proved itself",
            number,
        )
    return CompletionPolicy(
        CompletionMode(config.completion), capability=number, announced=announced
    )


def _coalesced(attached: Attached, vm: Vm, vcpus: list[Vcpu]) -> CoalescedWrites | None:
    """Delivers the writes that KVM collects. None if it collects none."""
    if not attached.has_ring:
        return None
    posted = [host.posted for host in attached.hosts if host.posted is not None]
    buses = {True: attached.buses["pio"], False: attached.buses["mmio"]}
    return CoalescedWrites(WriteRing(vm, vcpus[0]), buses, posted)


def _set_up(
    kind: AnyArchitecture, system: System, vcpus: list[Vcpu], entry: Entry
) -> list[dict[str, Any]]:
    """Bring the vCPUs to the image's entry, and return what a host must have for each of them. The
    needs are read now, because a vCPU in the guest does not answer ioctls until it exits.
    """
    kind.set_up(system, vcpus, entry)
    return [kind.needs(system, vcpu) for vcpu in vcpus]


def _loops(stack: ExitStack, parts: Parts) -> VcpuGroup:
    lot = ParkingLot(parts.vcpus, always=parts.policy.mode is CompletionMode.ALWAYS)
    stack.callback(lot.close)
    loops = []
    claims = _claims(parts)
    for vcpu, spot in zip(parts.vcpus, lot.spots, strict=True):
        loop = VcpuLoop(vcpu, parts.exits(vcpu), parts.policy, spot, parts.lockstep, claims)
        stack.callback(loop.close)
        loops.append(loop)
    return VcpuGroup(lot, loops, parts.lockstep)


def _claims(parts: Parts) -> DeviceClaims | None:
    """None if each exit has to be served in the vCPU's thread: where coalesced writes come first,
    and in a deterministic run.
    """
    if parts.coalesced is not None or parts.lockstep is not None:
        return None
    return DeviceClaims({name: bus.claims() for name, bus in parts.buses.items()})
