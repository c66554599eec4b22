"""Registers that need no handler, as the device sees to which they belong.

The guest's accesses to them are served in C, in the vCPU's thread, which does not wait for the
GIL or for the device's lock. A device declares them by its host (`Host.registers`).
"""

from __future__ import annotations

from typing import Protocol


class Register(Protocol):
    """A few bytes that the guest reads, and perhaps writes, without a call of the device's
    handlers; see `Registers.storage`. Any thread may use it. Each call is made as a whole: the
    guest's accesses come before or after it."""

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
    """The guest's writes to one register, in order; see `Registers.collected`."""

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


class Registers(Protocol):
    """Declares a device's registers, in `attach`, for ports and memory at which it is placed.

    Storage and pages may be accessed in parts, all others only as a whole. Any other access is the
    device's. Each method raises `ConfigError` if the register does not fit. With `saved`, the
    machine saves and loads what is in it beside the device's own state, which is saved before and
    loaded after it.
    """

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
