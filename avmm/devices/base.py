"""What a device is: the one contract that every device model is written against.

A device answers reads and writes of its registers, and may run a task of its own. It knows nothing
of KVM, ioctls or threads. All it gets is its `Host`: guest memory, an interrupt line, a nursery, a
lock and wake-ups.

**Who touches a device when.** `read` and `write` are called in the thread of the vCPU whose access
it is, or if they are coroutine functions, mostly in trio; one call at a time: the caller holds
`host.lock`. So a plain handler that blocks also stops trio, if another handler of the device is a
coroutine function. A call returns either the answer, and the
guest goes on at once, or an awaitable, which is then awaited in the machine's nursery, *without*
the lock, while that vCPU, and no other, waits. So:

- a plain `def` handler needs no locking of its own, must not block, and may not call trio;
- an `async def` handler runs wholly in trio and may await whatever it likes;
- code on the trio side (an awaitable's body, `run`) that shares state with plain handlers
  takes `with self.host.lock:` around the few lines which touch it, never across an `await`.

**Sizes.** `size` is 1, 2, 4 or 8. The bus splits every other access (string I/O, an access that
crosses the device's edge, the 3 + 5 bytes of a page-crossing access, or an access wider than
`max_width`) into such accesses, in ascending order of address, little endian. It cuts the value
that `read` returns to `size` bytes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from avmm.errors import DeviceError

if TYPE_CHECKING:
    import trio

    from avmm.devices.registers import Registers
    from avmm.memory.ram import GuestMemory

ReadAnswer: TypeAlias = int | Awaitable[int]
WriteAnswer: TypeAlias = Awaitable[None] | None


class InterruptLine(Protocol):
    """An interrupt input of the guest, as the device that drives it sees it."""

    def set(self, asserted: bool) -> None:
        """Drive the line; the guest is interrupted at each change from low to high. If the device
        was placed with `level`, the guest is interrupted again and again while the line is high.

        May be called from any thread, and does not block.
        """

    def pulse(self) -> None:
        """Interrupt the guest once: the line goes high and low again."""


class Wakeup(Protocol):
    """Lets a handler wake a task of its device: any thread may set it, one task waits."""

    def set(self) -> None:
        """Wake the waiting task, or the next task to wait if none waits yet. May be called from
        any thread, and is cheap."""

    async def wait(self) -> None:
        """Return as soon as `set` has been called since the last return. Cancelling loses no
        wake-up."""


class Doorbell(Protocol):
    """Tells a task of the device that the guest wrote a certain value to a certain register."""

    def ring(self) -> None:
        """Wake the waiting task, or the next task to wait, as the guest's write does. May be
        called from any thread."""

    async def wait(self) -> None:
        """Return as soon as it has been rung since the last return. One task may wait at a time.
        Cancelling loses no ring."""


class Host(Protocol):
    """What a device gets from the machine it is part of."""

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""

    @property
    def interrupt(self) -> InterruptLine | None:
        """The line that the device was placed with, or None if it was placed without one."""

    @property
    def nursery(self) -> trio.Nursery:
        """Runs as long as the machine. Tasks that are started in it are cancelled when the machine
        ends."""

    @property
    def has_tasks(self) -> bool:
        """Has the device used its nursery? If so it must override `quiesce`, as a device that
        overrides `run` must."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while `read` or `write` of this device runs; see the top of this file."""

    def wakeup(self) -> Wakeup:
        """A new wake-up, not set."""

    def doorbell(self, offset: int, size: int, value: int, *, by_exit: bool = False) -> Doorbell:
        """A doorbell that the guest rings by writing `value` (`size` bytes) at `offset`.

        If KVM supports it, such writes cause no exit and never reach `write`. If it does not, or
        with `by_exit`, they reach `write`, which then has to ring the doorbell. It lives as long
        as the machine; ask for it in `attach`.
        """

    @property
    def registers(self) -> Registers:
        """Registers of the device that need no handler. Declare them in `attach`."""


class Device:
    """A device model. Subclass it and override what the device supports. `read`, `write`, `save`
    and `load` raise an error that names the device unless they are overridden."""

    max_width: ClassVar[int] = 8
    """The widest access that the device decodes, in bytes. Wider accesses reach it in parts."""

    acpi_hid: ClassVar[str] = ""
    """The hardware id by which ACPI tells the guest of the device, such as "PNP0501", with its
    ports, memory and interrupt. If it is empty, ACPI does not describe the device."""

    host: Host
    """Set by `attach`, before anything else is called."""

    @property
    def name(self) -> str:
        """What messages call this device."""
        return type(self).__name__

    def attach(self, host: Host) -> None:
        """Called once, when the machine is put together and before the guest runs."""
        self.host = host

    def read(self, offset: int, size: int) -> ReadAnswer:
        """The `size` bytes at `offset` of the device's region, as a little-endian number.

        `async def` works as well. An exception ends the machine and is raised to the machine's
        user.
        """
        raise DeviceError(f"{self.name} cannot be read ({size} bytes at {offset:#x})")

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        """Take `value` (`size` bytes, little endian) at `offset`; `async def` works as well."""
        raise DeviceError(f"{self.name} cannot be written ({size} bytes at {offset:#x})")

    async def run(self) -> None:
        """The device's background task. It runs in the machine's nursery and is cancelled when the
        machine ends."""

    def finish(self) -> None:
        """Called when the guest has ended, for whatever reason. Nothing reads or writes the device
        after that."""

    async def quiesce(self) -> None:
        """Finish what is in flight, then touch no guest memory and raise no interrupt.

        Called while every vCPU is parked. It may be called again while the device is quiesced, and
        then does nothing. If it is cancelled, `resume` can still set the device going again.
        """
        if self.host.has_tasks or type(self).run is not Device.run:
            raise DeviceError(
                f"{self.name} runs a task and cannot be quiesced: it lacks quiesce()"
            )

    async def resume(self) -> None:
        """Go on after `quiesce`. Does nothing if the device is not quiesced.

        It has `avmm.migration.RESUME_SECONDS` to finish. After that it is cancelled, and the guest
        runs on without the device. Called again after the next pause.
        """

    async def release(self) -> None:
        """Let go of what only one machine may hold: a lock, an interface, a socket's path. Output
        that has no reader yet stays in the saved state, for the other machine.

        Called on a quiesced device, before `save`, so that the machine in which the guest goes on
        can `acquire` it. Does nothing if it is not held.
        """

    async def acquire(self) -> None:
        """Take hold of it again, before the device goes on. Does nothing if it is already held.

        Raises `ConfigError` if somebody else holds it.
        """

    @property
    def saves_in_thread(self) -> bool:
        """Do `save` and `load` take long, because they read or write files? If so, they are called
        in a worker thread, and must not touch anything that belongs to trio. Its registers are
        saved later, so it must leave them alone while it is quiesced. Otherwise `save` and `load`
        are called in trio's thread."""
        return False

    def save(self) -> Mapping[str, Any]:
        """The device's state as plain data (numbers, bytes, text, lists, dicts of these), with a
        version of its own; see `avmm.devices.state.DeviceState`."""
        raise DeviceError(f"{self.name} cannot be saved: it lacks save()")

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state that `save` returned, in this process or in another. Treat it as hostile
        input.

        Raises `DeviceError` if it is not a state of this device; the device is then unchanged.
        Declare the state's fields as a `DeviceState`, which checks them and the version.
        """
        raise DeviceError(f"{self.name} cannot be loaded: it lacks load()")
