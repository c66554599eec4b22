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


class Register(Protocol):
    """A few bytes that the guest reads, and perhaps writes, without a call of the device's
    handlers; see `Host.storage`. Any thread may use it. Each call is made as a whole: the guest's
    accesses come before or after it."""

    value: int
    """What is in it, as a little-endian number. This, the two methods that change its bits, and
    `answer` raise `ValueError` for a register of more than 8 bytes, and for a number that does not
    fit."""

    def set_bits(self, bits: int) -> None:
        """Set these bits, and leave the others as they are."""

    def clear_bits(self, bits: int) -> None:
        """Clear these bits, and leave the others as they are."""

    def answer(self, value: int | None) -> None:
        """Give the guest's reads this number from now on. With None, `Device.read` answers them
        until the next number."""

    def get(self, at: int = 0, size: int | None = None) -> bytes:
        """A copy of the `size` bytes that begin at byte `at`; without `size`, of all from there
        on. Raises `ValueError` if there are not that many."""

    def put(self, data: bytes | bytearray | memoryview, at: int = 0) -> None:
        """Copy `data` into it, from byte `at` on. Raises `ValueError` if it does not fit."""


class CollectedWrites(Protocol):
    """The guest's writes to one register, in order; see `Host.collected`."""

    limit: int
    """How many are collected before `Device.write` gets the next. It is the capacity at first,
    also after a load, and cannot be more. With 0, `Device.write` gets all of them. Set it in trio
    or with the device's lock held."""

    def __len__(self) -> int:
        """How many there are now. Any thread."""

    def take(self, most: int | None = None) -> bytes:
        """Take up to `most` of them out, or all, the oldest first. Each has as many bytes as the
        register is wide, in little-endian order. Any thread."""

    async def wait(self) -> None:
        """Return when there is at least one. One task may wait at a time, and the guest's next
        write wakes it; those that follow wake nobody. Cancelling loses nothing."""


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

    # Registers that need no handler. The guest's accesses are served in C, in the vCPU's thread,
    # which does not wait for the GIL or for the device's lock. Storage and pages may be accessed
    # in parts, all others only as a whole. Any other access is the device's. Registers are for
    # devices at ports and in memory, and are declared in `attach`. Each raises `ConfigError` if it
    # does not fit. With `saved`, the machine saves and loads what is in it beside the device's own
    # state, which is saved before and loaded after it.

    def storage(self, offset: int, size: int, *, saved: bool = True) -> Register:
        """`size` bytes, zero at first, that the guest reads and writes like memory."""

    def constant(
        self,
        offset: int,
        size: int,
        value: int | None = 0,
        *,
        ignores_writes: bool = False,
        saved: bool = True,
    ) -> Register:
        """A number of `size` bytes that the guest only reads, until the device changes it. With
        None, `Device.read` answers until the device gives a number (`Register.answer`). The
        guest's writes reach `Device.write`, unless they are ignored."""

    def clearable(
        self, offset: int, size: int, *, clear_at: int | None = None, saved: bool = True
    ) -> Register:
        """Bits that the device sets, and that the guest clears: each bit that is set in what it
        writes. It writes to the same register, or at `clear_at`."""

    def collected(
        self, offset: int, size: int, capacity: int, *, saved: bool = True
    ) -> CollectedWrites:
        """Collect the guest's writes of `size` bytes at `offset`: `capacity` of them, until the
        device takes them. `Device.write` gets those for which there is no room."""

    def page(self, offset: int, *, saved: bool = True) -> Register:
        """A page of 4096 bytes that the guest reads as memory, without an exit: KVM backs it with
        a read-only memory slot. The device fills it with `Register.put`. A guest that reads
        meanwhile may get some old and some new bytes. The guest's writes reach `Device.write`. The
        device must be placed in memory, so that the page's address is a multiple of 4096."""


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
