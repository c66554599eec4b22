"""Machine: a configuration becomes a running guest.

`avmm.parts` puts together what it consists of; here it runs, in a nursery of its own, until its
block is left, and is paused, saved, cloned and handed over meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
)
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, Unpack

import trio

from avmm.bus.space import Placement
from avmm.config import HostSettings, MachineConfig, Settings
from avmm.devices.base import Device, InterruptLine
from avmm.devices.console import ConsoleStream
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.mmio import VirtioMmio
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.port import Port
from avmm.devices.virtio.vsock import Vsock
from avmm.errors import (
    AvmmError,
    ConfigError,
    MigrationError,
)
from avmm.memory.pages import Bitmap
from avmm.memory.ram import GuestMemory
from avmm.migration import Coordinator
from avmm.outcome import Cause, Outcome
from avmm.parts import Origin, Parts, build, description, dismantle
from avmm.parts.placing import Unplaced
from avmm.vcpu.calls import CallHandler

if TYPE_CHECKING:
    from avmm.progress import MigrationProgress, Report, SnapshotProgress

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=VirtioDevice)


def _no_progress(progress: object) -> None:
    pass


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
        if config is not None and not isinstance(config, MachineConfig):
            raise ConfigError(f"config {config!r}: expected a MachineConfig, or settings by name")
        if not isinstance(devices, Iterable) or isinstance(devices, str | Mapping):
            raise ConfigError(f"devices {devices!r}: expected a list, like [avmm.virtio(...)]")
        self.config = config or MachineConfig.make(**settings)
        self._devices = tuple(devices)
        self._calls = calls
        self._origin = Origin(state)
        self._outcomes: list[Outcome] = []
        self._migrating = self._unsettled = self._settling = False
        self._ended = trio.Event()
        self._parts: Parts | None = None
        self._nursery: trio.Nursery | None = None
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
        return self._running.clock_khz

    async def wait(self) -> Outcome:
        """Wait until the guest has ended, and say how. May be called again, and by many."""
        await self._ended.wait()
        return self._outcomes[0]

    def stop(self, status: int = 0) -> None:
        """End the guest from outside, paused or not; `wait` tells when that is done."""
        self._end(Outcome(Cause.STOPPED, status))

    @property
    def is_paused(self) -> bool:
        """Does it stand still now?"""
        return self._coordinator is not None and self._coordinator.is_paused

    @property
    def is_unsettled(self) -> bool:
        """Was it handed over without an answer, and waits for `settle`?"""
        return self._unsettled

    def paused(self, deadline: float | None = None) -> AbstractAsyncContextManager[None]:
        """`async with vm.paused():` the machine stands still inside, drained and quiesced.

        Devices raise no interrupts inside. What your own code raises there (`message_interrupt`,
        or a line of a device that has no `quiesce`) changes the interrupt controllers at once:
        it is in a state that is saved later, and not in one that was saved before.

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
        on_progress: Callable[[SnapshotProgress], object] = _no_progress,
    ) -> float:
        """Write the whole machine to a file at `path`, from which `avmm.restore` makes one like
        it. Returns how long the guest has stood still for it, in seconds.

        The guest runs on, but for a moment at the end; that it must come to a standstill within
        `deadline` seconds. The file replaces one that is there when it is whole, or not at all.
        What disks hold is not in it: where they are written, hold the guest in `paused` and copy
        them there as well. Raises `SnapshotError` (a full disk, say), `PauseTimeout`, and
        `DeviceError` where a device cannot be saved. Cancelled, it leaves nothing behind.
        """
        from avmm import snapshot  # noqa: PLC0415 - xxhash and msgpack, for who needs them

        parts, coordinator = self._running, self._coordinator
        assert coordinator is not None
        if self._unsettled:
            raise AvmmError("this machine was handed over and waits for settle()")
        return await snapshot.write(
            parts, coordinator, path, deadline=deadline, on_progress=on_progress
        )

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
        machine has ended (`Cause.MOVED`). The line counts as dead when it gives nothing, or takes
        less than 256 KiB, for `stall_seconds`.

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
        assert self._nursery is not None
        sender = Sender(
            parts,
            coordinator,
            stream,
            options,
            self._nursery,
            lambda: bool(self._outcomes),
            on_progress,
        )
        try:
            return await sender.send()
        finally:
            self._migrating, self._unsettled = False, sender.is_unsettled
            if sender.is_done:
                self._end(Outcome(Cause.MOVED))

    async def settle(self, *, runs_here: bool) -> None:
        """After a `HandOverUnknownError`: say where the guest runs.

        `runs_here=True` lets it run on here: only where it certainly does not run at the
        destination and never will. False ends this machine (`Cause.MOVED`). Raises `ConfigError`
        where somebody else holds its disks or interfaces, and `AvmmError` where somebody else is
        settling it; then, or cancelled, it is as before.
        """
        coordinator = self._coordinator
        if not self._unsettled or coordinator is None:
            raise AvmmError("there is nothing to settle: no hand-over of this machine is unknown")
        if self._settling:
            raise AvmmError("this machine is being settled already")
        if not runs_here:
            self._unsettled = False
            coordinator.forsake()
            self._end(Outcome(Cause.MOVED))
            return
        self._settling = True
        try:
            await self._running.acquire()
            self._unsettled = False
        finally:
            self._settling = False
        await coordinator.relinquish()

    def clone(
        self,
        *,
        devices: Sequence[Placement | Unplaced] = (),
        calls: CallHandler | None = None,
        keep_output: bool = False,
        deadline: float | None = None,
        **settings: Unpack[HostSettings],
    ) -> AbstractAsyncContextManager[Machine]:
        """`async with vm.clone() as twin:` a second machine, which goes on from where this one is.

        RAM is shared until one of them writes to it. While this machine stands still, what its
        guest has written since it was cloned before, or restored, is copied once, in a thread: a
        clone takes as long as that, and some milliseconds.

        `settings` are those of the host's side. What cannot be shared is the caller's choice, and
        is asked for where it is missing: `disks`, `net` and `vsock` say what the twin's are, as
        many as the guest has, with a CID and MAC addresses (the same ones, to keep them; of others
        its driver knows when it looks). Others are this machine's unless they are given.
        `devices` and `calls` are as for `Machine`. What this machine's consoles have put out that
        nobody has received is received here only, or, with `keep_output`, from both.

        Entering it raises `ConfigError` for settings that cannot be or are missing, and as
        `paused` and `Machine` do.
        """
        return _clone(self, devices, calls, settings, keep_output, deadline)

    def message_interrupt(self, address: int, data: int) -> InterruptLine:
        """A message-signalled interrupt to the guest: `pulse()` sends it, from any thread, at
        once even where the machine is paused."""
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
        parts = await self.prepare()
        try:
            self._coordinator = Coordinator(parts.group, parts.quiescable, parts.deliver_coalesced)
            if self._outcomes:  # stopped before it was entered
                self.stop()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
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
            await dismantle(parts)

    async def prepare(self) -> Parts:
        """For `avmm`'s own: put the parts together before the machine is entered, or look at them.

        They are closed when the machine has been left; who prepares one and does not enter it
        closes them.
        """
        if self._parts is None:
            origin, self._origin = self._origin, Origin()
            self._parts = await build(self.config, self._devices, self._end, self._calls, origin)
        return self._parts

    async def _run_vcpus(self, parts: Parts) -> None:
        cause: BaseException | None = None
        failures: list[Exception] = []
        try:
            await parts.group.run()
        except BaseException as error:  # raised below: what comes now may fail as well
            cause = error
        try:
            for step in (parts.deliver_coalesced, *(device.finish for device in parts.devices)):
                try:
                    step()
                except Exception as error:  # whatever it is, the others hear of the end
                    failures.append(error)
        finally:
            if not self._outcomes:
                self._outcomes.append(Outcome(Cause.STOPPED, detail="the machine was left"))
            self._ended.set()
        if isinstance(cause, Exception):
            # Why the guest has ended is what is to be known, and often they say the same again.
            for failure in failures:
                logger.error("after the guest had failed:", exc_info=failure)
                (_only(cause) or cause).add_note(f"and at the guest's end: {failure!r}")
            raise cause
        # A cancellation among them goes to where it belongs, as out of any nursery.
        errors = [*failures] if cause is None else [cause, *failures]
        if len(errors) > 1:
            raise BaseExceptionGroup(_NURSERY_GROUP, errors)
        if errors:
            raise errors[0]
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
    settings: HostSettings,
    keep_output: bool,
    deadline: float | None,
) -> AsyncIterator[Machine]:
    parts = machine._running
    if machine._unsettled or (machine._outcomes and machine._outcomes[0].cause is Cause.MOVED):
        raise AvmmError("the guest was handed over to another machine: there it can be cloned")
    described = description.read(parts.describe(), settings, own_addresses=True)
    with ExitStack() as stack:
        async with machine.paused(deadline):
            state = parts.save(with_memory=False)
            memory = await _forked(parts.memory)
            stack.callback(memory.close)
        origin = Origin(state, lambda layout: memory, described)
        twin = Machine.from_origin(origin, described.config, devices, calls)
        if not keep_output:
            await twin.prepare()
            for stream in (twin.console, *twin.ports.values()):
                stream.discard_output()
        async with twin:
            yield twin


async def _forked(memory: GuestMemory) -> GuestMemory:
    """In a thread, where it is much that the guest has written. An error's frames know views of
    RAM, so none of them leaves that: trio would keep it in a circle, and RAM mapped."""

    def fork(own: Bitmap | None) -> tuple[GuestMemory | None, str]:
        try:
            return memory.fork(own), ""
        except OSError as error:
            return None, f"the host has no room for its RAM: {error.strerror or error!r}"
        except ValueError:  # RAM's views are released
            return None, "it has ended"

    own = memory.own()
    if own is not None and len(own) <= _COPIED_AT_ONCE:
        forked, why = fork(own)
    else:
        forked, why = await trio.to_thread.run_sync(fork, None)
    if forked is None:
        raise AvmmError(f"the machine cannot be cloned: {why}")
    return forked


def _only(group: BaseException) -> BaseException | None:
    """The one exception in nurseries' groups, None where there are several.

    A group that somebody raised on purpose is an exception like others.
    """
    error = group
    while isinstance(error, BaseExceptionGroup) and error.message == _NURSERY_GROUP:
        if len(error.exceptions) != 1:
            return None
        error = error.exceptions[0]
    return error


_NURSERY_GROUP: Final = "Exceptions from Trio nursery"
_COPIED_AT_ONCE: Final = 256
"""Pages of RAM: a thread costs more than these."""
