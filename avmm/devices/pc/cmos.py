"""The real-time clock and CMOS memory of a PC: a Motorola MC146818 at 0x70 and 0x71.

The time is the host's (UTC) plus an offset. Setting the clock changes the offset. So a guest that
was saved and restored reads the right time at once. Registers are computed when they are read; no
timer runs. While the guest keeps the clock stopped (SET in register B, or the divider in reset),
the registers are plain bytes. They become a new offset when it lets the clock run.

**No interrupts.** The alarm registers are only stored. The interrupt enables in register B cannot
be set: they read back as 0, so a guest that checks can tell. Guests have better timers, and a
periodic timer in Python would be a poor one. The flags UF and PF of register C do come, for guests
that poll them; AF does not.

**Update in progress.** UIP is computed from the clock, so it cannot get stuck. The chip promises
244 us after UIP was read 0 before the time changes, which is too short if every access is an exit
that takes 10 us or more. So UIP is set for as long as the chip's whole update takes, 244 + 1984 us
(MC146818A data sheet, table 5), and all of that time lies before the change. A guest that reads 0
therefore has 2 ms.

The bytes from 0x10 on follow QEMU (hw/i386/pc.c, `pc_cmos_init`) and SeaBIOS (src/hw/rtc.h).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from avmm.devices.base import Device
from avmm.devices.state import DeviceState
from avmm.errors import ConfigError
from avmm.plain import Bytes, Int

PORTS: Final = 2
SIZE: Final = 128

SECONDS: Final = 0x00
MINUTES: Final = 0x02
HOURS: Final = 0x04
WEEKDAY: Final = 0x06
DAY: Final = 0x07
MONTH: Final = 0x08
YEAR: Final = 0x09
REG_A: Final = 0x0A
REG_B: Final = 0x0B
REG_C: Final = 0x0C
REG_D: Final = 0x0D
CENTURY: Final = 0x32
_CENTURY_PS2: Final = 0x37  # its place on a PS/2; QEMU answers there, too
_TIME: Final = frozenset({SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY})

A_UIP: Final = 0x80
B_SET: Final = 0x80
B_ENABLES: Final = 0x78  # PIE, AIE, UIE, SQWE
B_BINARY: Final = 0x04
B_24H: Final = 0x02
C_PF: Final = 0x40
C_UF: Final = 0x10
D_VALID: Final = 0x80
HOUR_PM: Final = 0x80

_SECOND: Final = 1_000_000_000
_UPDATE: Final = 244_000 + 1_984_000
_DAY: Final = 86_400
_OFFSET_LIMIT: Final = 1_000_000 * 365 * _DAY
"""Seconds; more than a guest can set."""

_KIB: Final = 1 << 10
_MIB: Final = 1 << 20


class Cmos(Device):
    """The clock, and the bytes in which firmware records what it finds out about the machine.

    `low_memory` and `high_memory` are the bytes of RAM below and above 4 GiB, `clock` returns the
    time in nanoseconds since 1970 (UTC).
    """

    class State(DeviceState, version=1):
        index = Int(0, SIZE - 1)
        # The offset has two parts: in nanoseconds alone it may have more than 64 bits, which no
        # file can hold.
        seconds = Int(-_OFFSET_LIMIT, _OFFSET_LIMIT)
        nanoseconds = Int(0, _SECOND - 1)
        data = Bytes(least=SIZE, most=SIZE)

    max_width: ClassVar[int] = 1
    acpi_hid: ClassVar[str] = "PNP0B00"

    def __init__(
        self,
        *,
        low_memory: int,
        high_memory: int = 0,
        cpus: int = 1,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        if not 0 <= low_memory <= 1 << 32 or not 0 <= high_memory < 1 << 40:
            raise ConfigError(
                f"Cmos: {low_memory} and {high_memory} bytes of RAM, expected at most 4 GiB below "
                "4 GiB and less than 1 TiB above"
            )
        if not 1 <= cpus <= 256:
            raise ConfigError(f"Cmos: {cpus} CPUs, expected 1 to 256")
        self._clock = clock
        self._index = 0
        self._offset = 0
        self._data = bytearray(SIZE)
        self._data[REG_A] = 0x26  # 32.768 kHz, periodic rate 1024 Hz
        self._data[REG_B] = B_24H
        self._data[REG_D] = D_VALID
        self._describe(low_memory, high_memory, cpus)
        self._flags_read = self._now()

    def _describe(self, low: int, high: int, cpus: int) -> None:
        """The sizes that BIOSes kept here, each cut to what its field can hold."""
        self._data[0x14] = 0x02  # equipment: a floating-point unit, no floppy, no mouse
        base = min(low // _KIB, 640)
        extended = min(max(0, low - _MIB) // _KIB, 0xFFFF)
        above_16m = min(max(0, low - 16 * _MIB) // (64 * _KIB), 0xFFFF)
        for index, value, size in (
            (0x15, base, 2),
            (0x17, extended, 2),
            (0x30, extended, 2),
            (0x34, above_16m, 2),
            (0x5B, high // (64 * _KIB), 3),
            (0x5F, cpus - 1, 1),
        ):
            self._data[index : index + size] = value.to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF  # the index cannot be read back, as in QEMU
        index = self._index
        if index == REG_A:
            return self._data[REG_A] | (A_UIP if self._updating() else 0)
        if index == REG_C:
            return self._flags()
        if index in _TIME:
            self._refresh()
        return self._data[index]

    def write(self, offset: int, size: int, value: int) -> None:
        index = self._index
        if offset == 0:
            value &= 0x7F  # bit 7 masks NMIs, of which there are none
            self._index = CENTURY if value == _CENTURY_PS2 else value
        elif index in (REG_A, REG_B):
            self._control(index, value)
        elif index in _TIME:
            self._refresh()
            self._data[index] = value
            self._set()
        elif index not in (REG_C, REG_D):
            self._data[index] = value

    def _control(self, index: int, value: int) -> None:
        """Write register A or B. That may stop the clock or start it again."""
        self._refresh()
        was_running = self._running()
        if index == REG_A:
            # Out of the divider's reset, the first update comes half a second later (data
            # sheet, "Register A"): the guest writes the time of the next second just then.
            self._data[REG_A] = value & ~A_UIP
            fraction = _SECOND // 2
        else:
            self._data[REG_B] = value & ~B_ENABLES
            fraction = self._now() % _SECOND
        if not was_running:
            self._set(fraction)

    # The time.

    def _now(self) -> int:
        return self._clock() + self._offset

    def _running(self) -> bool:
        # Divider codes above 2 (32.768 kHz) hold it in reset or ask for a test mode.
        return not self._data[REG_B] & B_SET and (self._data[REG_A] & 0x70) <= 0x20

    def _updating(self) -> bool:
        return self._running() and self._now() % _SECOND >= _SECOND - _UPDATE

    def _flags(self) -> int:
        """Read register C: whether a second or a period has ended since the last read."""
        since, now = self._flags_read, self._now()
        self._flags_read = now
        if not self._running():
            return 0
        flags = C_UF if now // _SECOND != since // _SECOND else 0
        rate = self._data[REG_A] & 0x0F
        if rate:
            # Table "periodic interrupt rate": codes 1 and 2 are 8 and 9 for a 32 kHz crystal.
            period = (_SECOND << (rate + 6 if rate < 3 else rate - 1)) >> 15
            flags |= C_PF if now // period != since // period else 0
        return flags

    def _refresh(self) -> None:
        """If the clock runs, write the time into the registers."""
        if not self._running():
            return
        now = time.gmtime(self._now() // _SECOND)
        hour = now.tm_hour
        if not self._data[REG_B] & B_24H:
            hour = hour % 12 or 12
        century, year = divmod(now.tm_year, 100)
        for index, value in (
            (SECONDS, min(now.tm_sec, 59)),
            (MINUTES, now.tm_min),
            (HOURS, hour),
            (WEEKDAY, (now.tm_wday + 1) % 7 + 1),  # Sunday is 1
            (DAY, now.tm_mday),
            (MONTH, now.tm_mon),
            (YEAR, year),
            (CENTURY, century % 100),
        ):
            self._data[index] = self._encode(value)
        if not self._data[REG_B] & B_24H and now.tm_hour >= 12:
            self._data[HOURS] |= HOUR_PM

    def _set(self, fraction: int | None = None) -> None:
        """If the clock runs, take the time from the registers. Keeps the fraction of a second
        unless another is given. An invalid date such as 32 January counts on into the next month,
        as in QEMU."""
        if not self._running():
            return
        if fraction is None:
            fraction = self._now() % _SECOND
        hour = self._decode(HOURS, 0x7F)
        if not self._data[REG_B] & B_24H:
            hour = hour % 12 + (12 if self._data[HOURS] & HOUR_PM else 0)
        days = _days(
            self._decode(CENTURY) * 100 + self._decode(YEAR),
            self._decode(MONTH),
            self._decode(DAY),
        )
        minutes = hour * 60 + self._decode(MINUTES)
        seconds = days * _DAY + minutes * 60 + self._decode(SECONDS)
        self._offset = seconds * _SECOND + fraction - self._clock()
        self._flags_read = self._now()

    def _encode(self, value: int) -> int:
        return value if self._data[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, index: int, mask: int = 0xFF) -> int:
        value = self._data[index] & mask
        return value if self._data[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 0x0F)

    # State.

    def save(self) -> Mapping[str, Any]:
        seconds, nanoseconds = divmod(self._offset, _SECOND)
        return self.State.plain(
            index=self._index, seconds=seconds, nanoseconds=nanoseconds, data=bytes(self._data)
        )

    def load(self, state: Mapping[str, Any]) -> None:
        saved = self.State.load(self.name, state)
        data = saved.data
        if data[REG_A] & A_UIP or data[REG_B] & B_ENABLES or data[REG_C]:
            raise saved.refusal(
                f"registers A, B, C are {data[REG_A]:#x}, {data[REG_B]:#x}, {data[REG_C]:#x}"
            )
        self._index, self._data = saved.index, bytearray(data)
        self._offset = saved.seconds * _SECOND + saved.nanoseconds
        self._flags_read = self._now()


def _days(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 to a date of the Gregorian calendar; month and day may overflow.

    Howard Hinnant, "chrono-compatible low-level date algorithms", `days_from_civil`. `datetime` is
    not used, because it refuses years above 9999, which a guest may well write.
    """
    year += (month - 1) // 12
    month = (month - 1) % 12 + 1
    year -= month <= 2
    era, of_era = divmod(year, 400)
    of_year = (153 * ((month + 9) % 12) + 2) // 5
    return era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year + day - 719_469
