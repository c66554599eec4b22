"""The registers that a device leaves to C: where they are, and what they do.

A device declares them by its host (`avmm.devices.registers`). Mostly the vCPUs' threads serve them
without the GIL (avmm/kvm/claims.h). `DeviceRegisters` stands in front of the device for all other
accesses: those of a machine with coalesced writes or of a deterministic one, and those that a
register leaves to its device. Both ways end in the same C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from avmm.errors import ConfigError, StateError
from avmm.kvm.claims import Way
from avmm.kvm.registers import CollectingRegister, ServedRegister, Writes
from avmm.memory.pages import PAGE

if TYPE_CHECKING:
    from avmm.bus.space import Placement
    from avmm.devices.base import Device, ReadAnswer, Wakeup, WriteAnswer

_WIDTHS: Final = (1, 2, 4, 8)
_MOST_BYTES: Final = 1 << 24


class Window(NamedTuple):
    """Offsets of the device at which a register serves reads or writes. It begins at offset
    `first`."""

    first: int
    end: int
    register: ServedRegister
    how: int = Writes.TO_DEVICE

    def holds(self, offset: int, size: int) -> bool:
        """Is all of this access in it?"""
        return self.first <= offset and offset + size <= self.end


class Page(NamedTuple):
    """A page of guest-physical addresses that a read-only memory slot backs."""

    gpa: int
    register: ServedRegister


class ServedWrites:
    """See `avmm.devices.registers.CollectedWrites`."""

    def __init__(
        self, ring: CollectingRegister, lock: AbstractContextManager[Any], wakeup: Wakeup
    ) -> None:
        self._ring = ring
        self._lock = lock
        self._wakeup = wakeup
        self._limit = ring.capacity
        self._waits = False

    @property
    def limit(self) -> int:
        """See there."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = min(max(0, limit), self._ring.capacity)
        self._ring.limit(0 if self._waits else self._limit)

    def __len__(self) -> int:
        return self._ring.count

    def take(self, most: int | None = None) -> bytes:
        """See there."""
        return self._ring.take(most)

    async def wait(self) -> None:
        """See there."""
        if self._waits:
            raise trio.BusyResourceError("another task waits for these writes already")
        try:
            while True:
                with self._lock:
                    if not self._ring.count:
                        # From here on a write comes to Python (`arrived`), so none is missed.
                        self._waits = True
                        self._ring.limit(0)
                    there = self._ring.count > 0
                if there:
                    await trio.lowlevel.checkpoint()
                    return
                await self._wakeup.wait()
        finally:
            with self._lock:
                self._awake()

    def loaded(self) -> None:
        """Whoever waits is to look what a load has brought. Any thread."""
        with self._lock:
            self._awake()
        self._wakeup.set()

    def arrived(self, value: int) -> bool:
        """A write that C has left to Python. Returns False if the device has to take it. Call it
        with the device's lock held."""
        if not self._waits or self._ring.count >= self._limit or not self._ring.push(value):
            return False
        self._awake()
        self._wakeup.set()
        return True

    def _awake(self) -> None:
        self._waits = False
        self._ring.limit(self._limit)


class DeviceRegisters:
    """The registers of one device, and the device behind them."""

    def __init__(
        self,
        device: Device,
        lock: AbstractContextManager[Any],
        wakeup: Callable[[], Wakeup],
        places: Sequence[Placement],
    ) -> None:
        """`lock` is the device's, and `wakeup` makes a wake-up for it."""
        self.device = device
        self.pages: list[Page] = []
        """What has to be told to KVM."""
        self._lock = lock
        self._wakeup = wakeup
        self._places = places
        self._reads: list[Window] = []
        self._writes: list[Window] = []
        self._collected: dict[int, ServedWrites] = {}
        """By the first offset of their windows."""
        self._saved: list[ServedRegister] = []
        self._is_complete = False

    def __bool__(self) -> bool:
        return bool(self._reads or self._writes)

    def complete(self) -> None:
        """The device has been attached: it declares no more registers."""
        self._is_complete = True

    # -- declaring ------------------------------------------------------------------------------

    def storage(self, offset: int, size: int, *, saved: bool = True) -> ServedRegister:
        """See `avmm.devices.registers.Registers.storage`."""
        register = ServedRegister(self._size(offset, size, _MOST_BYTES))
        self._add(self._reads, Window(offset, offset + size, register))
        self._add(self._writes, Window(offset, offset + size, register, Writes.STORES))
        self._declared(register, saved)
        return register

    def constant(
        self,
        offset: int,
        size: int,
        value: int | None = 0,
        *,
        ignores_writes: bool = False,
        saved: bool = True,
    ) -> ServedRegister:
        """See `avmm.devices.registers.Registers.constant`."""
        register = ServedRegister(self._number(offset, size), whole=True)
        try:
            register.answer(value)
        except ValueError as error:
            raise ConfigError(f"{self._name(offset)}: {error}") from None
        self._add(self._reads, Window(offset, offset + size, register))
        if ignores_writes:
            self._add(self._writes, Window(offset, offset + size, register, Writes.IGNORES))
        self._declared(register, saved)
        return register

    def clearable(
        self, offset: int, size: int, *, clear_at: int | None = None, saved: bool = True
    ) -> ServedRegister:
        """See `avmm.devices.registers.Registers.clearable`."""
        register = ServedRegister(self._number(offset, size), whole=True)
        at = offset if clear_at is None else clear_at
        self._add(self._reads, Window(offset, offset + size, register))
        self._add(self._writes, Window(at, at + size, register, Writes.CLEARS))
        self._declared(register, saved)
        return register

    def collected(
        self, offset: int, size: int, capacity: int, *, saved: bool = True
    ) -> ServedWrites:
        """See `avmm.devices.registers.Registers.collected`."""
        most = _MOST_BYTES // self._number(offset, size)
        if type(capacity) is not int or not 1 <= capacity <= most:
            raise ConfigError(
                f"{self._name(offset)}: capacity {capacity!r}, expected 1 to {most} writes"
            )
        ring = CollectingRegister(size, capacity)
        self._add(self._writes, Window(offset, offset + size, ring, Writes.COLLECTS))
        self._collected[offset] = collected = ServedWrites(ring, self._lock, self._wakeup())
        self._declared(ring, saved)
        return collected

    def page(self, offset: int, *, saved: bool = True) -> ServedRegister:
        """See `avmm.devices.registers.Registers.page`."""
        register = ServedRegister(PAGE, align=PAGE)
        self._add(self._reads, Window(offset, offset + PAGE, register))
        for place in self._places:
            gpa = place.base + offset - place.offset
            if place.space == "mmio" and place.base <= gpa <= place.base + place.size - PAGE:
                if gpa % PAGE:
                    raise ConfigError(
                        f"{self._name(offset)}: a page at address {gpa:#x}, expected a multiple "
                        f"of {PAGE:#x}"
                    )
                self.pages.append(Page(gpa, register))
        if not any(page.register is register for page in self.pages):
            raise ConfigError(
                f"{self._name(offset)}: expected a page within memory at which the device is "
                "placed"
            )
        self._declared(register, saved)
        return register

    def _declared(self, register: ServedRegister, saved: bool) -> None:
        if saved:
            self._saved.append(register)

    def _name(self, offset: int) -> str:
        return f"{self.device.name}: the register at offset {offset:#x}"

    def _size(self, offset: int, size: int, most: int) -> int:
        if type(size) is not int or not 1 <= size <= most:
            raise ConfigError(f"{self._name(offset)}: {size!r} bytes, expected 1 to {most}")
        return size

    def _number(self, offset: int, size: int) -> int:
        """The size of a register that is accessed only as a whole."""
        most = self.device.max_width
        if type(size) is not int or size not in _WIDTHS or size > most:
            expected = ", ".join(str(width) for width in _WIDTHS if width <= most)
            raise ConfigError(
                f"{self._name(offset)}: {size!r} bytes, expected one of {expected}, as the device "
                f"decodes accesses of up to {most}"
            )
        return size

    def _add(self, windows: list[Window], window: Window) -> None:
        if self._is_complete:
            raise ConfigError(
                f"{self._name(window.first)}: expected it to be declared in attach()"
            )
        for other in windows:
            if window.first < other.end and other.first < window.end:
                ways = "reads" if windows is self._reads else "writes"
                raise ConfigError(
                    f"{self._name(window.first)} overlaps the one at {other.first:#x}, which "
                    f"serves {ways} there as well"
                )
        if any(place.space == "msr" for place in self._places):
            raise ConfigError(
                f"{self._name(window.first)}: expected a device that answers no MSRs"
            )
        if not any(
            place.offset <= window.first and window.end <= place.offset + place.size
            for place in self._places
        ):
            raise ConfigError(
                f"{self._name(window.first)}: it has {window.end - window.first} bytes; expected "
                "one within the ports or the memory at which the device is placed"
            )
        windows.append(window)

    # -- the guest's accesses, with the device's lock held ---------------------------------------

    def read(self, offset: int, size: int) -> ReadAnswer:
        """The register's answer, or else the device's."""
        window = _window(self._reads, offset, size)
        if window is not None:
            answer = window.register.read(offset - window.first, size)
            if answer is not None:
                return answer
        return self.device.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        """Let the register take it, or else the device."""
        window = _window(self._writes, offset, size)
        if window is not None:
            if window.register.write(window.how, offset - window.first, size, value):
                return None
            is_whole = size == window.end - window.first
            collected = self._collected.get(window.first) if is_whole else None
            if collected is not None and collected.arrived(value):
                return None
        return self.device.write(offset, size, value)

    # -- for the vCPUs' threads ------------------------------------------------------------------

    def edges(self) -> Iterator[int]:
        """The offsets at which who answers may change."""
        for window in (*self._reads, *self._writes):
            yield window.first
            yield window.end

    def ways(self, offset: int) -> tuple[Way, Way]:
        """Who answers reads and writes from this offset on, until the next edge."""
        read = _window(self._reads, offset, 1)
        write = _window(self._writes, offset, 1)
        return _way(read, offset), _way(write, offset)

    # -- state -----------------------------------------------------------------------------------

    def save(self) -> list[bytes]:
        """What the registers hold that are saved with the machine."""
        return [register.save() for register in self._saved]

    def load(self, saved: Sequence[bytes]) -> None:
        """Hold what `save` returned. Raises `StateError` if these are not the registers of such a
        device."""
        if len(saved) != len(self._saved):
            raise StateError(
                f"{self.device.name}: the state has {len(saved)} registers; expected "
                f"{len(self._saved)}"
            )
        for number, (register, data) in enumerate(zip(self._saved, saved, strict=True)):
            try:
                register.load(data)
            except ValueError as error:
                raise StateError(f"{self.device.name}: register {number} has {error}") from None
        for collected in self._collected.values():
            collected.loaded()


def _window(windows: Sequence[Window], offset: int, size: int) -> Window | None:
    for window in windows:
        if window.holds(offset, size):
            return window
    return None


def _way(window: Window | None, offset: int) -> Way:
    if window is None:
        return Way()
    return Way(register=window.register, at=offset - window.first, how=window.how)
