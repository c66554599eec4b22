"""What a device is: the one contract that every device model is written against.

A device answers reads and writes of its registers, and may run a task of its own. It knows no
KVM, no ioctl and no thread; all it gets is its `Host`: guest memory, an interrupt line, a
nursery, a lock and wake-ups.

**Who touches a device when.** `read` and `write` are called in the thread of the vCPU whose
access it is, one call at a time: the caller holds `host.lock`. A call returns either the
answer, and the guest goes on at once, or an awaitable, which is then awaited in the machine's
nursery, *without* the lock, while that vCPU and no other waits. So:

- a plain `def` handler needs no locking of its own, must not block, and may not call trio;
- an `async def` handler runs wholly in trio and may await whatever it likes;
- code on the trio side (an awaitable's body, `run`) that shares state with plain handlers
  takes `with self.host.lock:` around the few lines which touch it, never across an `await`.

**Sizes.** `size` is 1, 2, 4 or 8. The bus splits what the guest does in odd shapes (string
I/O, accesses that cross the device's edge, the 3 + 5 bytes of a page-crossing access, accesses
wider than `max_width`) into such accesses, in ascending address order, little endian. A value
read is cut to `size` bytes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias

from avmm.errors import DeviceError

if TYPE_CHECKING:
    import trio

    from avmm.memory.ram import GuestMemory

ReadAnswer: TypeAlias = int | Awaitable[int]
WriteAnswer: TypeAlias = Awaitable[None] | None


class InterruptLine(Protocol):
    """An interrupt input of the guest, as the device that drives it sees it."""

    def set(self, asserted: bool) -> None:
        """Drive the line; the guest is interrupted at each change from low to high.

        May be called from any thread, does not block.
        """

    def pulse(self) -> None:
        """Interrupt the guest once: the line goes high and low again."""


class Wakeup(Protocol):
    """Lets a handler wake a task of its device: any thread may set it, one task waits."""

    def set(self) -> None:
        """Wake the waiter, or, where there is none yet, the next one. Any thread; cheap."""

    async def wait(self) -> None:
        """Return once `set` was called since the last return. Cancelling loses no wake-up."""


class Doorbell(Protocol):
    """Tells a task of the device that the guest wrote a certain value to a certain register."""

    def ring(self) -> None:
        """Wake the waiter, or the next one, as the guest's write does. Any thread."""

    async def wait(self) -> None:
        """Return once it was rung since the last return; one task waits. Cancelling loses no
        ring."""


class Host(Protocol):
    """What a device gets from the machine it is part of."""

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM."""

    @property
    def interrupt(self) -> InterruptLine | None:
        """The line the device was placed with, or None where it was placed without."""

    @property
    def nursery(self) -> trio.Nursery:
        """Runs as long as the machine; what is started there is cancelled with it."""

    @property
    def has_tasks(self) -> bool:
        """Has the device taken its nursery? Then it must override `quiesce`, as one that overrides
        `run`."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while `read` or `write` of this device runs; see the top of this file."""

    def wakeup(self) -> Wakeup:
        """A new wake-up, not set."""

    def doorbell(self, offset: int, size: int, value: int, *, by_exit: bool = False) -> Doorbell:
        """A doorbell that the guest rings by writing `value` (`size` bytes) at `offset`.

        Where KVM can, such writes leave no exit and never reach `write`; where it cannot, and with
        `by_exit`, they do, and `write` is to ring it. It lives as long as the machine; ask
        for it in `attach`.
        """


class Device:
    """A device model. Subclass it, override what the device does; the rest refuses by name."""

    max_width: ClassVar[int] = 8
    """The widest access that the device decodes, in bytes; wider ones reach it in parts."""

    acpi_hid: ClassVar[str] = ""
    """The hardware id by which ACPI tells the guest of the device, such as "PNP0501", with its
    ports, memory and interrupt; empty: ACPI does not name it."""

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

        `async def` works as well. An exception ends the machine and is raised to its user.
        """
        raise DeviceError(f"{self.name} cannot be read ({size} bytes at {offset:#x})")

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        """Take `value` (`size` bytes, little endian) at `offset`; `async def` works as well."""
        raise DeviceError(f"{self.name} cannot be written ({size} bytes at {offset:#x})")

    async def run(self) -> None:
        """The device's background task, in the machine's nursery, cancelled when it ends."""

    def finish(self) -> None:
        """The guest has ended, however: nothing reads or writes the device any more."""

    async def quiesce(self) -> None:
        """Finish what is in flight, then touch no guest memory and raise no interrupt.

        Called with every vCPU parked; may be called again while quiesced, and then does
        nothing. Cancelling it leaves the device as `resume` can set it going again.
        """
        if self.host.has_tasks or type(self).run is not Device.run:
            raise DeviceError(
                f"{self.name} runs a task and cannot be quiesced: it lacks quiesce()"
            )

    async def resume(self) -> None:
        """Go on after `quiesce`; does nothing where the device is not quiesced.

        It has `avmm.migration.RESUME_SECONDS` for it; then it is cancelled, and the guest runs
        on without. Called again after the next pause.
        """

    async def release(self) -> None:
        """Let go of what only one machine may hold: a lock, an interface, the path of a socket,
        and output that has no reader yet, which is saved for the other.

        Called quiesced and before `save`, so that another machine, in which this one goes on, can
        `acquire` it. Does nothing where it is not held.
        """

    async def acquire(self) -> None:
        """Take hold of it, before the device goes on; does nothing where it is held.

        Raises `ConfigError` where somebody else has it.
        """

    @property
    def saves_in_thread(self) -> bool:
        """Do `save` and `load` take long, because they read or write files? Then they are called
        in a worker thread, and must not touch what belongs to trio; else in trio's thread."""
        return False

    def save(self) -> Mapping[str, Any]:
        """The device's state as plain data (numbers, bytes, text, lists, dicts of these), with a
        version of its own; see `avmm.devices.state.DeviceState`."""
        raise DeviceError(f"{self.name} cannot be saved: it lacks save()")

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `save` gave, here or in another process: hostile input.

        Raises `DeviceError` where it is not one of this device's, and is then as it was. Declare
        what it is made of as a `DeviceState`, which checks that, and a version with it.
        """
        raise DeviceError(f"{self.name} cannot be loaded: it lacks load()")
