"""Machine: turns a configuration into a running guest.

`avmm.parts` puts the machine together, and `avmm.running` runs its guest until its block is left;
meanwhile it can be paused, saved, cloned and handed over. `avmm.runstate` has its states, and what
may be done in each.
"""

from __future__ import annotations

from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
)
from dataclasses import replace
from functools import partial
from importlib import import_module
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import trio

from avmm import chance, halts, lockstep
from avmm.bus.space import Placement
from avmm.clones import Fork, clones, together
from avmm.config import HostSettings, MachineConfig, Settings
from avmm.ctrl_c import context, protected
from avmm.devices.base import InterruptLine
from avmm.devices.console import ConsoleStream
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.device import VirtioDevice
from avmm.devices.virtio.mmio import VirtioMmio
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.port import Port
from avmm.devices.virtio.vsock import Vsock
from avmm.errors import AvmmError, ConfigError
from avmm.memory.ram import GuestMemory
from avmm.migration import Stand
from avmm.outcome import Cause, Outcome
from avmm.parts import Origin, Parts, build, dismantle
from avmm.parts.placing import Unplaced
from avmm.running import Inside, running
from avmm.runstate import Life, Runstate, refusal
from avmm.sides import anywhere, in_trio
from avmm.threads import in_thread
from avmm.vcpu.calls import CallHandler

if TYPE_CHECKING:
    from avmm.progress import MigrationProgress, Report, SnapshotProgress

_Model = TypeVar("_Model", bound=VirtioDevice)


def _no_progress(progress: object) -> None:
    pass


class Machine:
    """A guest that runs as long as its `async with` block does.

        async with avmm.Machine(kernel="vmlinux", memory="64M", cpus=2) as vm:
            await vm.console.send_all(b"hello\\n")
            print(await vm.wait())

    Settings are those of `MachineConfig`; without `kernel` it runs the bundled shell.
    `devices` are the user's own, placed by `avmm.pio`, `avmm.mmio` and `avmm.msr`, and virtio
    devices, given by `avmm.virtio`; `calls` answers the guest's hypercalls (Xen's, with the
    setting `xen`). With a `state` that `save` returned for a machine like this one, it continues
    from there instead of booting.

    Entering it raises `ConfigError` for impossible settings, and `KvmError` if KVM fails. A
    device's exception, or a vCPU that cannot go on (`VcpuError`), cancels the block and is raised
    from it. Leaving it in any way ends the guest and leaves no thread, descriptor or mapping
    behind.
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
        if "console" in settings:
            raise ConfigError(
                "console: this setting is the avmm command's; expected none here: use vm.console, "
                "or the functions of avmm.ends"
            )
        if not isinstance(devices, Iterable) or isinstance(devices, str | Mapping):
            raise ConfigError(f"devices {devices!r}: expected a list, like [avmm.virtio(...)]")
        config = config or MachineConfig.make(**settings)
        life = Life()
        build_it = partial(build, config, tuple(devices), life.end, calls, Origin(state))
        self._set_up(life, build_it, config)

    def _set_up(
        self,
        life: Life,
        build_it: Callable[[], Awaitable[Parts]],
        config: MachineConfig | None,
    ) -> None:
        self._life = life
        self._build = build_it
        self._config = config
        """None if the machine comes from a file that is not read yet. Then its parts have it."""
        self._inside: Inside
        """Set when the machine has been entered."""
        self._manager: AbstractAsyncContextManager[None]

    # -- what its user sees ---------------------------------------------------------------

    @property
    def state(self) -> Runstate:
        """The machine's state; `avmm.runstate` says what may be done in it. Any thread."""
        return self._life.state

    @property
    def config(self) -> MachineConfig:
        """Its settings. The settings of a machine that comes from a file are known when it has
        been entered; before that, this raises `RunstateError`."""
        if self._config is None:
            return self._use("config").config
        return self._config

    @property
    def engine(self) -> str:
        """What runs the guest: "kvm", or "soft" (`avmm.engine`). Raises `RunstateError` before
        that is known."""
        return self._use("engine").config.engine

    # The following can be used while the block is run. Before and after, they raise
    # `RunstateError`.

    def _use(self, operation: str) -> Parts:
        self._life.demand(operation)
        return self._inside.parts

    @property
    def console(self) -> ConsoleStream:
        """The guest's serial console as a trio stream."""
        return self._use("console").serial.stream

    @property
    def ports(self) -> dict[str, Port]:
        """The ports of the virtio consoles among the devices, by their names."""
        return _ports(self._use("ports"))

    @property
    def vsock(self) -> Vsock:
        """The guest's socket device. Raises `AvmmError` if it has none."""
        return self._only_model("vsock", Vsock, "socket device (the setting vsock)")

    @property
    def balloon(self) -> Balloon:
        """The guest's memory balloon. Raises `AvmmError` if it has none."""
        return self._only_model("balloon", Balloon, "balloon (the setting balloon)")

    @property
    def nets(self) -> tuple[Net, ...]:
        """The guest's network devices, in the order in which they were configured."""
        devices = self._use("nets").devices
        models = (device.model for device in devices if isinstance(device, VirtioMmio))
        return tuple(model for model in models if isinstance(model, Net))

    def _only_model(self, operation: str, kind: type[_Model], what: str) -> _Model:
        for device in self._use(operation).devices:
            if isinstance(device, VirtioMmio) and isinstance(device.model, kind):
                return device.model
        raise AvmmError(f"this machine has no {what}")

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM, with its current contents."""
        return self._use("memory").memory

    @property
    def tsc_khz(self) -> int:
        """The frequency of the guest's time stamp counter, in kHz."""
        return self._use("tsc_khz").clock_khz

    @in_trio
    async def wait(self) -> Outcome:
        """Wait until the guest has ended, and return how. Several tasks may call it, also more
        than once, and after the block. Before the machine is entered it raises `RunstateError`."""
        self._life.demand("wait")
        return await self._life.over()

    @in_trio
    def powerdown(self) -> None:
        """Ask the guest to shut down: press its power button (ACPI) or, if it has no driver for
        that, Ctrl-Alt-Del on its keyboard, by which most guests reboot.

        Returns at once. `wait` tells when the guest has ended, if it does; give it a time limit:
        a guest may listen to the button and do nothing. A paused guest notices when it runs on.
        Raises `AvmmError` if the guest listens to neither, and `RunstateError` if it has ended.
        """
        if not self._use("powerdown").press_power():
            raise AvmmError(
                "the guest listens to no power button: it has no driver for ACPI's button or for "
                "a keyboard"
            )

    @in_trio
    async def halted(self) -> None:
        """Wait until the guest can never run again, because all of its CPUs are halted with
        interrupts off. A Linux without ACPI powers off like this. It is noticed after a second or
        two, by a short pause of the vCPUs, which are not looked at while one of them runs.

        The guest has not ended: `wait` goes on waiting until you call `stop`. If it ends, or is
        left, this waits until it is cancelled. If somebody has asked for a `message_interrupt`,
        which can wake any guest, it also does.
        """
        parts = self._use("halted")
        await halts.halted(parts.group, self._inside.coordinator, parts.are_halted)

    @anywhere
    def stop(self, status: int = 0) -> None:
        """End the guest from outside, paused or not; `wait` returns when it has ended.

        May be called in any state and from any thread. Before the machine is entered, the request
        is kept, and the guest ends as soon as it runs. After the guest's end it does nothing.
        While the guest is being handed over, the request is kept for some seconds, until that is
        decided; a guest that has moved is not stopped.
        """
        self._life.end(Outcome(Cause.STOPPED, status))

    @property
    def is_paused(self) -> bool:
        """Does the guest stand still now?"""
        return self._life.is_inside and self._inside.coordinator.is_paused

    @property
    def is_unsettled(self) -> bool:
        """Was the guest handed over without an answer, so that `settle` must be called?"""
        return self.state in (Runstate.UNSETTLED, Runstate.SETTLING)

    def paused(self, deadline: float | None = None) -> AbstractAsyncContextManager[None]:
        """`async with vm.paused():` inside the block the machine stands still, drained and
        quiesced.

        Devices raise no interrupts inside. An interrupt that your own code raises there (by
        `message_interrupt`, or by a line of a device that has no `quiesce`) changes the interrupt
        controllers at once: a state that is saved later contains it, and one that was saved
        before does not.

        `deadline` is in seconds; see `avmm.migration.Coordinator.paused`. A guest that has ended
        can be paused as well. Before the machine is entered, and after it was left, this raises
        `RunstateError`.
        """
        self._life.demand("paused")
        self._inside.demand_other_task("paused")
        return self._inside.coordinator.paused(deadline)

    @protected
    def save(self) -> dict[str, Any]:
        """Return the whole state, as plain data, with a copy of RAM.

        Call it only inside `paused`, and only if the guest has not ended; otherwise it raises
        `RunstateError`. Raises `DeviceError` if a device cannot be saved.
        """
        parts = self._use("save")
        if not self.is_paused:
            raise refusal(
                "save",
                self._inside.coordinator.stand,
                {Stand.STILL},
                "one that stands still: save it inside `vm.paused()`",
            )
        return parts.save()

    @protected
    async def snapshot(
        self,
        path: str | PathLike[str],
        *,
        deadline: float | None = None,
        on_progress: Callable[[SnapshotProgress], object] = _no_progress,
    ) -> float:
        """Write the whole machine to a file at `path`, from which `avmm.restore` makes one like
        it. Returns for how many seconds the guest stood still.

        The guest keeps running except for a moment at the end. It must come to that standstill
        within `deadline` seconds. The file replaces an existing one when it is complete, or not
        at all. It does not contain what disks hold: if the guest writes to them, call this inside
        `paused` and copy the disks there as well.

        Raises `SnapshotError` (if the disk is full, for example), `PauseTimeout`, `DeviceError`
        if a device cannot be saved, and `RunstateError` if the guest has ended before or ends
        meanwhile. If it is cancelled, it leaves nothing behind.
        """
        await in_thread(import_module, "avmm.snapshot")  # reads files
        from avmm import snapshot  # noqa: PLC0415 - imports xxhash and msgpack, which few need

        parts = self._use("snapshot")
        with self._inside.operation("snapshot", self._life):
            return await snapshot.write(
                parts,
                self._inside.coordinator,
                path,
                deadline=deadline,
                demand=partial(self._life.demand_meanwhile, "snapshot"),
                on_progress=on_progress,
            )

    @protected
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
        seconds, at most `bandwidth` bytes a second. A guest that writes faster than the line
        carries is throttled. Then the guest is stopped (within `deadline` seconds) and handed
        over, and this machine has ended (`Cause.MOVED`). The line counts as dead if nothing comes
        for `stall_seconds` while something is expected, or if it takes less than 256 KiB in that
        time.

        If that fails, it raises `MigrationError`, `PauseTimeout` or `DeviceError`, and the guest
        runs on here as before; it does so too if this is cancelled. Raises `RunstateError` if the
        guest has ended before or ends meanwhile. From the moment of the hand-over itself this
        cannot be cancelled. If no answer comes then within `answer_seconds`, it raises
        `HandOverUnknownError`, the guest stays stopped, and you must call `settle`.
        """
        await in_thread(import_module, "avmm.transfer.source")  # reads files
        from avmm.transfer.source import Options, Sender  # noqa: PLC0415 - xxhash and msgpack
        from avmm.transfer.states import SourceState  # noqa: PLC0415

        options = Options(target_downtime, bandwidth, deadline, stall_seconds, answer_seconds)
        parts, inside, life = self._use("migrate"), self._inside, self._life
        sender = Sender(
            parts, inside.coordinator, stream, options, inside.nursery, life, on_progress
        )
        with inside.operation("migrate", life):
            life.move(Runstate.MIGRATING)
            try:
                return await sender.send()
            finally:
                life.move(
                    {
                        SourceState.ABORTED: Runstate.RUNNING,
                        SourceState.DONE: Runstate.MOVED,
                        SourceState.UNKNOWN: Runstate.UNSETTLED,
                    }[sender.state]
                )

    @in_trio
    @protected
    async def settle(self, *, runs_here: bool) -> None:
        """After a `HandOverUnknownError`: say where the guest runs.

        `runs_here=True` lets the guest run on here. Use it only if you are sure that the guest
        does not run at the destination and never will. False ends this machine (`Cause.MOVED`).

        Raises `ConfigError` if somebody else holds the guest's disks or interfaces, and
        `RunstateError` if there is nothing to settle or another task is settling it. After an
        error or a cancellation the machine is as it was before.
        """
        parts, inside, life = self._use("settle"), self._inside, self._life
        if not runs_here:
            inside.coordinator.forsake()
            life.move(Runstate.MOVED)
            return
        with inside.operation("settle", life):
            life.move(Runstate.SETTLING)
            to = Runstate.UNSETTLED
            try:
                await parts.acquire()
                to = Runstate.RUNNING
            finally:
                life.move(to)
            await inside.coordinator.relinquish()

    def clone(
        self,
        *,
        devices: Sequence[Placement | Unplaced] = (),
        calls: CallHandler | None = None,
        keep_output: bool = False,
        deadline: float | None = None,
        **settings: Unpack[HostSettings],
    ) -> AbstractAsyncContextManager[Machine]:
        """`async with vm.clone() as twin:` makes a second machine, which continues from where
        this one is.

        RAM is shared until one of them writes to it. While this machine stands still, the pages
        that its guest has written since it was last cloned, or restored, are copied once, in a
        thread. A clone takes that long plus some milliseconds.

        `settings` are the settings of the host's side. You must name what the two cannot share:
        `disks`, `net` and `vsock` say what the twin gets, as many as the guest has, with a CID
        and MAC addresses. Give the same addresses to keep them; the guest's driver notices others
        only when it looks. All other settings are this machine's unless you give them. `devices`
        and `calls` are as for `Machine`. Console output of this machine that nobody has received
        yet can be received only from this machine, or with `keep_output` from both.

        Entering it raises `ConfigError` for impossible or missing settings, `RunstateError` if the
        guest has ended, even if that happens on the way to the standstill, and what `paused` and
        `Machine` raise.
        """
        return _clone(self, Fork(devices, calls, settings), keep_output, deadline)

    def fork_many(
        self,
        count: int,
        each: Callable[[int], Fork] = lambda index: Fork(),
        *,
        keep_output: bool = False,
        deadline: float | None = None,
        **settings: Unpack[HostSettings],
    ) -> AbstractAsyncContextManager[list[Machine]]:
        """`async with vm.fork_many(50) as twins:` makes `count` clones at once. This machine
        stands still only once, for as long as for one `clone`, and the clones are built side by
        side in threads. When the block is left, all of them are left at the same time.

        `each(index)`, with `index` from 0 on, says what a clone has for itself: devices, `calls`
        and settings. `settings` are those of all clones; see `clone`.

        If a clone fails, the block and the other clones are cancelled. Entering it raises what
        `clone` raises, and several errors in a group. After an error or a cancellation no clone
        is left.
        """
        return _fork_many(self, count, each, settings, keep_output, deadline)

    def message_interrupt(self, address: int, data: int) -> InterruptLine:
        """A message-signalled interrupt for the guest. `pulse()` sends it at once, from any
        thread, even while the machine is paused."""
        return self._use("message_interrupt").interrupts.message(address, data)

    # -- its life -------------------------------------------------------------------------

    @protected
    async def __aenter__(self) -> Self:
        self._life.demand("enter")
        self._life.move(Runstate.STARTING)
        self._manager = self._lived()
        await self._manager.__aenter__()
        return self

    @protected
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._manager.__aexit__(kind, error, traceback)

    @asynccontextmanager
    async def _lived(self) -> AsyncIterator[None]:
        seed = None if self._config is None else self._config.deterministic
        with ExitStack() as stack:
            if seed is not None:
                stack.enter_context(chance.fixed(seed))
                stack.enter_context(lockstep.ordered_tasks())
            async with self._run():
                yield

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[None]:
        try:
            parts = await self._build()
        except BaseException:
            self._life.leave()
            raise
        try:
            async with running(parts, self._life) as self._inside:
                yield
        finally:
            self._life.leave()
            await dismantle(parts)


def machine_from(
    life: Life, build_it: Callable[[], Awaitable[Parts]], config: MachineConfig | None = None
) -> Machine:
    """For use inside `avmm`: a machine that awaits `build_it` for its parts when it is entered,
    and dismantles them when it is left. `build_it` must give the parts `life.end`, which they call
    at the guest's end."""
    machine = Machine.__new__(Machine)
    machine._set_up(life, build_it, config)
    return machine


def machine_of(parts: Parts, life: Life) -> Machine:
    """For use inside `avmm`: a machine of parts that exist already. The caller must enter it, or
    the parts are never dismantled."""

    async def there_already() -> Parts:
        return parts

    return machine_from(life, there_already, parts.config)


def _ports(parts: Parts) -> dict[str, Port]:
    return {
        name: port
        for device in parts.devices
        if isinstance(device, VirtioMmio) and isinstance(device.model, Console)
        for name, port in device.model.ports.items()
    }


@context
async def _clone(
    machine: Machine, fork: Fork, keep_output: bool, deadline: float | None
) -> AsyncIterator[Machine]:
    (twin,) = await _twins(machine, "clone", [fork], keep_output, deadline)
    async with twin:
        yield twin


@context
async def _fork_many(
    machine: Machine,
    count: int,
    each: Callable[[int], Fork],
    settings: HostSettings,
    keep_output: bool,
    deadline: float | None,
) -> AsyncIterator[list[Machine]]:
    if count < 1:
        raise ConfigError(f"fork_many: {count!r} clones; expected at least 1")
    forks = []
    for index in range(count):
        fork = each(index)
        if not isinstance(fork, Fork):
            raise ConfigError(f"fork_many: each({index}) returned {fork!r}; expected an avmm.Fork")
        forks.append(replace(fork, settings={**settings, **fork.settings}))
    twins = await _twins(machine, "fork_many", forks, keep_output, deadline)
    async with together(twins):
        yield twins


async def _twins(
    machine: Machine, name: str, forks: Sequence[Fork], keep_output: bool, deadline: float | None
) -> list[Machine]:
    """The clones, which the caller must enter."""
    machine._use(name)
    built = await clones(machine._inside, machine._life, name, forks, deadline)
    if not keep_output:
        for parts, _ in built:
            for stream in (parts.serial.stream, *_ports(parts).values()):
                stream.discard_output()
    return [machine_of(parts, life) for parts, life in built]
