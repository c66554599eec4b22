"""An address space: which device answers at a port or an MMIO address.

A guest's access need not fit a device: it may be wider than the device decodes, cross its edge
into a neighbour or into nothing, or have an odd length (a page-crossing access of eight bytes
leaves the guest as 3 + 5). An access that fits is one call of the device's handler. Any other is
split into naturally aligned accesses of 1, 2, 4 or 8 bytes, in ascending order, as on a PC's bus.
Addresses that no device claims read as all ones and ignore writes. Each such address is reported
once.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Coroutine, Iterator, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import iscoroutinefunction
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from avmm.errors import ConfigError, DeviceError, VcpuError
from avmm.kvm.claims import DeviceClaim, Way

if TYPE_CHECKING:
    from avmm.bus.registers import DeviceRegisters
    from avmm.devices.base import Device, ReadAnswer, WriteAnswer
    from avmm.memory.layout import Region

logger = logging.getLogger(__name__)

MASKS: Final = tuple((1 << 8 * size) - 1 for size in range(9))
"""`MASKS[n]` is all ones in n bytes."""
_REPORTED_AT_MOST: Final = 256
_MSR_RANGE_MAX: Final = 0x600 * 8
"""KVM_MSR_FILTER_MAX_BITMAP_SIZE in bits (arch/x86/include/asm/kvm_host.h)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """A device and where the guest finds it; made by `pio` and `mmio`."""

    device: Device
    space: str
    base: int
    size: int
    irq: int | None = None
    offset: int = 0
    coalesced: bool = False
    level: bool = False
    """Is the interrupt level-triggered, so that several devices may share it?"""


def pio(
    device: Device,
    base: int,
    size: int,
    *,
    irq: int | None = None,
    level: bool = False,
    offset: int = 0,
    coalesced: bool = False,
) -> Placement:
    """Place `device` at `size` I/O ports from `base` on, with interrupt `irq` or none.

    An interrupt is an edge, and the device's alone, as on the ISA bus. With `level` it is a level,
    as on the PCI bus: the guest is interrupted again and again while the device asserts its line,
    until the guest has made it stop. Several devices may then share the interrupt. ACPI and the MP
    table tell the guest of it.

    The device sees offsets that begin at `offset`. By these it can tell its regions apart if it
    has several.

    With `coalesced`, writes cause no exit. KVM collects them in a ring, and the device gets them
    later, in order: at the next exit of any vCPU, before any other access to the device, at a
    pause, and when the guest has ended. Use it for registers that are written often and whose
    writes can wait. The device must answer these writes at once, without an awaitable. If KVM has
    no such ring, they are ordinary writes.
    """
    return Placement(device, "pio", base, size, irq, offset, coalesced, level)


def mmio(
    device: Device,
    base: int,
    size: int,
    *,
    irq: int | None = None,
    level: bool = False,
    offset: int = 0,
    coalesced: bool = False,
) -> Placement:
    """Place `device` at `size` bytes of guest-physical address space from `base` on.

    See `pio`; the addresses must not be RAM. avmm keeps 0xd0000000-0xdfffffff free for it.
    """
    return Placement(device, "mmio", base, size, irq, offset, coalesced, level)


def msr(device: Device, first: int, count: int = 1) -> Placement:
    """Let `device` answer accesses to `count` MSRs, starting at number `first`.

    Each has 8 bytes of the device's offsets, so MSR `first + n` is read as `read(8 * n, 8)`. A
    handler that raises `avmm.MsrFault` gives the guest a #GP. KVM does not hand over x2APIC's MSRs
    (0x800-0x8ff), and takes at most 16 ranges.
    """
    if count > _MSR_RANGE_MAX:
        raise ConfigError(f"{device.name}: {count} MSRs, KVM filters at most {_MSR_RANGE_MAX}")
    return Placement(device, "msr", first, count)


class PostedWrites:
    """The coalesced writes that a device must get before anything else.

    It stands in front of the device, and of its registers, in all of its regions. `read` and
    `write` are called with the device's lock held. A deque's ends are safe to use from different
    threads.
    """

    def __init__(
        self,
        device: Device,
        lock: AbstractContextManager[Any],
        registers: DeviceRegisters | None = None,
    ) -> None:
        self._device = device
        self._front = device if registers is None else registers
        self._lock = lock
        self._writes: deque[tuple[int, int, int]] = deque()

    @property
    def queue(self) -> Sized:
        """The writes that were posted and that the device has not had yet. Do not change it. Any
        thread."""
        return self._writes

    def late(self) -> str:
        """The first write that the device has not had, in words; empty if there is none. Any
        thread."""
        try:
            offset, size, _ = self._writes[0]
        except IndexError:
            return ""
        return f"{self._device.name} (a coalesced write of {size} bytes at offset {offset:#x})"

    def post(self, offset: int, size: int, value: int) -> None:
        """Queue a write that leaves the ring."""
        self._writes.append((offset, size, value))

    def deliver(self) -> None:
        """Hand over what has been posted. Takes the device's lock."""
        if self._writes:
            with self._lock:
                self._deliver()

    def read(self, offset: int, size: int) -> ReadAnswer:
        """The device's `read`, after the writes that came before it."""
        self._deliver()
        return self._front.read(offset, size)

    def write(self, offset: int, size: int, value: int) -> WriteAnswer:
        """The device's `write`, after the writes that came before it."""
        self._deliver()
        return self._front.write(offset, size, value)

    def _deliver(self) -> None:
        while self._writes:
            # The write stays in the queue until the device has had it, because whoever finds the
            # queue empty goes on.
            offset, size, value = self._writes[0]
            try:
                answer = self._front.write(offset, size, value)
            finally:
                self._writes.popleft()
            if answer is not None:
                if isinstance(answer, Coroutine):
                    answer.close()
                raise DeviceError(
                    f"{self._device.name} answered a coalesced write of {size} bytes at offset "
                    f"{offset:#x} with {answer!r}: expected None"
                )


class _Range:
    """One device's claim, with everything that the hot path needs."""

    __slots__ = (
        "base",
        "device",
        "end",
        "lock",
        "posted",
        "read",
        "registers",
        "shift",
        "width",
        "write",
    )

    def __init__(
        self,
        place: Placement,
        lock: AbstractContextManager[Any],
        unit: int,
        posted: PostedWrites | None,
        registers: DeviceRegisters | None,
    ) -> None:
        self.device = place.device
        self.base = place.base * unit
        self.end = self.base + place.size * unit
        self.shift = self.base - place.offset
        self.lock = lock
        self.posted = posted
        self.registers = registers
        front = posted or registers or place.device
        self.read = front.read
        self.write = front.write
        self.width = place.device.max_width


class Bus:
    """One address space of `limit` addresses. `unclaimed` is the `logging` level at which accesses
    that no device claims are reported; 0 means never.

    An address holds `unit` bytes; `read` and `write` count in bytes. `ram` are the guest's memory
    regions in this space. KVM hands an access to one of them over only if the host cannot provide
    the page, or if it is a write to a read-only region.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        unclaimed: int = logging.WARNING,
        unit: int = 1,
        ram: Sequence[Region] = (),
    ) -> None:
        self._unit = unit
        self._ram = ram
        self.name = name
        self._limit = limit
        self._unclaimed = unclaimed
        self._bases: list[int] = []
        self._ranges: list[_Range] = []
        self._reported: set[int] = set()

    def add(
        self,
        place: Placement,
        lock: AbstractContextManager[Any],
        posted: PostedWrites | None = None,
        registers: DeviceRegisters | None = None,
    ) -> None:
        """Let the device answer there. If it has registers, `registers` stands in front of it, and
        if a region of it is coalesced, `posted` in front of both.

        Raises `ConfigError` if another device already answers there.
        """
        end = place.base + place.size
        where = f"{place.device.name} at {self.name} {place.base:#x}-{end - 1:#x}"
        if place.base < 0 or place.size < 1 or end > self._limit:
            raise ConfigError(f"{where}: expected a range within 0-{self._limit - 1:#x}")
        claim = _Range(place, lock, self._unit, posted, registers)
        if claim.width not in (1, 2, 4, 8):
            raise ConfigError(f"{where}: max_width {claim.width!r}, expected 1, 2, 4 or 8")
        for other in self._ranges:
            if claim.base < other.end and other.base < claim.end:
                first, last = other.base // self._unit, other.end // self._unit - 1
                raise ConfigError(f"{where} overlaps {other.device.name} at {first:#x}-{last:#x}")
        index = bisect_right(self._bases, claim.base)
        self._bases.insert(index, claim.base)
        self._ranges.insert(index, claim)

    def read(self, address: int, size: int) -> ReadAnswer:
        """What the guest reads, or an awaitable of it; at most `MASKS[size]`."""
        index = bisect_right(self._bases, address) - 1
        if index >= 0:
            there = self._ranges[index]
            if address + size <= there.end and size <= there.width and not size & (size - 1):
                with there.lock:
                    answer = there.read(address - there.shift, size)
                if answer.__class__ is int:
                    return answer & MASKS[size]
                return _other_answer(there, address // self._unit, size, answer)
        return self._read_parts(address, size)

    def write(self, address: int, size: int, value: int) -> WriteAnswer:
        """Hand the guest's write to its device. If this returns an awaitable, the write is done
        when that has been awaited."""
        index = bisect_right(self._bases, address) - 1
        if index >= 0:
            there = self._ranges[index]
            if address + size <= there.end and size <= there.width and not size & (size - 1):
                with there.lock:
                    answer = there.write(address - there.shift, size, value)
                if answer is None or hasattr(answer, "__await__"):
                    return answer
                where = f"{there.device.name} answered a write at {address // self._unit:#x}"
                raise DeviceError(f"{where} with {answer!r}: expected None or an awaitable")
        return self._write_parts(address, size, value)

    def post(self, address: int, size: int, value: int) -> None:
        """Queue a coalesced write, split into the parts that its device will get."""
        for part, length, claimed in self._split(address, size):
            there = self._ranges[bisect_right(self._bases, part) - 1]
            if claimed and there.posted is not None:
                piece = value >> 8 * (part - address) & MASKS[length]
                there.posted.post(part - there.shift, length, piece)

    def claims(self) -> list[DeviceClaim]:
        """Who answers where, for the vCPUs' threads: each device's claim, cut where its registers
        begin and end."""
        return [claim for each in self._ranges for claim in _claims(each)]

    def owner(self, address: int, size: int = 1) -> str:
        """The names of the devices that answer these `size` bytes, for messages."""
        first = max(0, bisect_right(self._bases, address) - 1)
        names = [
            each.device.name
            for each in self._ranges[first : bisect_right(self._bases, address + size - 1)]
            if each.base < address + size and address < each.end
        ]
        return " or ".join(dict.fromkeys(names)) or "no device"

    def _read_parts(self, address: int, size: int) -> ReadAnswer:
        parts = self._split(address, size)
        value = 0
        for index, (part, length, claimed) in enumerate(parts):
            answer = self.read(part, length) if claimed else self._read_nobody(part, length)
            if not isinstance(answer, int):
                return self._read_rest(answer, value, address, parts[index:])
            value |= answer << 8 * (part - address)
        return value

    async def _read_rest(
        self, first: Awaitable[int], value: int, address: int, parts: list[tuple[int, int, bool]]
    ) -> int:
        value |= await first << 8 * (parts[0][0] - address)
        for part, length, claimed in parts[1:]:
            answer = self.read(part, length) if claimed else self._read_nobody(part, length)
            value |= (answer if isinstance(answer, int) else await answer) << 8 * (part - address)
        return value

    def _write_parts(self, address: int, size: int, value: int) -> WriteAnswer:
        parts = []
        for each in self._split(address, size):
            if each[2]:
                parts.append(each)
            else:
                self._demand_no_ram(each[0], is_write=True)
        for index, (part, length, _) in enumerate(parts):
            answer = self.write(part, length, value >> 8 * (part - address) & MASKS[length])
            if answer is not None:
                return self._write_rest(answer, address, value, parts[index + 1 :])
        return None

    async def _write_rest(
        self, first: Awaitable[None], address: int, value: int, parts: list[tuple[int, int, bool]]
    ) -> None:
        await first
        for part, length, _ in parts:
            answer = self.write(part, length, value >> 8 * (part - address) & MASKS[length])
            if answer is not None:
                await answer

    def _read_nobody(self, address: int, size: int) -> int:
        """What a read gives for which no device answers: all bits set, as on a PC's bus."""
        self._demand_no_ram(address, is_write=False)
        return MASKS[size]

    def _demand_no_ram(self, address: int, *, is_write: bool) -> None:
        """Raise `VcpuError` if the access is one to RAM that the host has failed to provide."""
        for region in self._ram:
            if region.gpa <= address < region.end and not (is_write and region.readonly):
                raise VcpuError(
                    f"the host cannot provide the guest's memory at {address:#x}: is the file "
                    "that it was restored from still there, and whole?"
                )

    def _split(self, address: int, size: int) -> list[tuple[int, int, bool]]:
        """The parts of an access: (address, size, whether a device claims it)."""
        parts = []
        end = address + size
        while address < end:
            index = bisect_right(self._bases, address) - 1
            there = self._ranges[index] if index >= 0 else None
            if there is not None and address < there.end:
                stop, width, claimed = min(end, there.end), there.width, True
            else:
                following = self._bases[index + 1] if index + 1 < len(self._bases) else end
                stop, width, claimed = min(end, following), 8, False
                self._report(address)
            length = min(width, 8)
            while address % length or address + length > stop:
                length //= 2
            parts.append((address, length, claimed))
            address += length
        return parts

    def _report(self, address: int) -> None:
        """Log once that no device answers here. The number of addresses is bounded, because the
        guest chooses them."""
        if not self._unclaimed or address in self._reported:
            return
        if len(self._reported) < _REPORTED_AT_MOST:
            self._reported.add(address)
            logger.log(self._unclaimed, "no device at %s %#x", self.name, address // self._unit)
            if len(self._reported) == _REPORTED_AT_MOST:
                logger.log(self._unclaimed, "no more such %s addresses are reported", self.name)


def _claims(there: _Range) -> Iterator[DeviceClaim]:
    by_tasks = [iscoroutinefunction(way) for way in (there.device.read, there.device.write)]
    edges = {there.base, there.end}
    if there.registers is not None:
        inside = (there.shift + edge for edge in there.registers.edges())
        edges |= {edge for edge in inside if there.base < edge < there.end}
    for first, end in pairwise(sorted(edges)):
        ways = (Way(), Way())
        if there.registers is not None:
            ways = there.registers.ways(first - there.shift)
        reads, writes = (
            way._replace(tasks=tasks) for way, tasks in zip(ways, by_tasks, strict=True)
        )
        yield DeviceClaim(first, end, there.width, reads, writes)


def _other_answer(there: _Range, address: int, size: int, answer: object) -> ReadAnswer:
    """Handle an answer whose class is not exactly `int`: an awaitable, a bool, an IntEnum, or a
    mistake."""
    if isinstance(answer, int):
        return int(answer) & MASKS[size]
    if not isinstance(answer, Awaitable):
        raise _not_a_number(there, address, size, answer)
    awaitable = answer

    async def value() -> int:
        result = await awaitable
        if not isinstance(result, int):
            raise _not_a_number(there, address, size, result)
        return int(result) & MASKS[size]

    return value()


def _not_a_number(there: _Range, address: int, size: int, answer: object) -> DeviceError:
    return DeviceError(
        f"{there.device.name} answered a read of {size} bytes at {address:#x} with {answer!r}: "
        "expected an int"
    )
