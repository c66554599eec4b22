"""ACPI tables, which tell a guest about CPUs, devices and the power switch without a command line.

ACPI specification 6.5. The machine is "hardware-reduced" (4.1): it has none of ACPI's fixed
hardware, no SCI and no PM timer. The guest switches it off and resets it through the registers
that the FADT names (`avmm.devices.pc.power`). Such guests use neither PIC nor PIT. RSDP → XSDT →
FADT, MADT; the FADT names the DSDT, which describes each device that has a hardware id
(`Device.acpi_hid`).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from avmm.arch.x86_64 import aml, button, generation, layout
from avmm.bus.space import Placement
from avmm.errors import ConfigError

SLEEP_TYPE_OFF: Final = 5
"""The value in `\\_S5` that switches the machine off through the sleep control register."""
RESET_VALUE: Final = 0x0F

_OEM: Final = b"AVMM  "
_OEM_TABLE: Final = b"AVMM    "
_REVISION: Final = 1
_HEADER: Final = struct.Struct("<4sIBB6s8sI4sI")
_ALIGN: Final = 64

_HID: Final = re.compile(r"[A-Z]{3}[0-9A-F]{4}|[A-Z0-9]{4}[0-9A-F]{4}")
"""6.1.5: an EISA id or an ACPI id."""
_EISA_LENGTH: Final = 7
_MOST_PORTS: Final = 255

# 5.2.9, table 5.9.
_FADT_LENGTH: Final = 276
_FADT_REVISION, _FADT_MINOR = 6, 5
_WBINVD, _POWER_BUTTON, _SLEEP_BUTTON = 1 << 0, 1 << 4, 1 << 5
_RESET_REG_SUP, _HW_REDUCED = 1 << 10, 1 << 20
_VGA_NOT_PRESENT: Final = 1 << 2
_SYSTEM_IO, _BYTE_ACCESS = 1, 1

# 5.2.12.
_LOCAL_APIC, _IO_APIC, _LOCAL_APIC_NMI = 0, 1, 4
_ENABLED: Final = 1
_ALL_PROCESSORS: Final = 0xFF


@dataclass(frozen=True, slots=True)
class AcpiDevice:
    """A device for the DSDT: its hardware id and where the guest finds it."""

    hid: str
    ports: Sequence[tuple[int, int]] = ()
    """(first, count)"""
    windows: Sequence[tuple[int, int]] = ()
    """(address, size)"""
    gsi: int | None = None
    level: bool = False
    """Is its interrupt level-triggered?"""

    def __post_init__(self) -> None:
        if not _HID.fullmatch(self.hid):
            raise ConfigError(
                f"acpi_hid {self.hid!r}: expected a hardware id like 'PNP0501' or 'LNRO0005'"
            )
        for first, count in self.ports:
            if not (0 <= first < 1 << 16 and 0 < count <= _MOST_PORTS):
                raise ConfigError(
                    f"{self.hid}: {count} ports at {first:#x}; ACPI names at most {_MOST_PORTS} "
                    "at a time"
                )


def devices(places: Iterable[Placement]) -> list[AcpiDevice]:
    """The placed devices that have a hardware id (`Device.acpi_hid`)."""
    grouped: dict[int, list[Placement]] = {}
    for place in places:
        if place.device.acpi_hid:
            grouped.setdefault(id(place.device), []).append(place)
    return [
        AcpiDevice(
            mine[0].device.acpi_hid,
            ports=[(place.base, place.size) for place in mine if place.space == "pio"],
            windows=[(place.base, place.size) for place in mine if place.space == "mmio"],
            gsi=next((place.irq for place in mine if place.irq is not None), None),
            level=any(place.level for place in mine),
        )
        for mine in grouped.values()
    ]


def tables(cpus: int, named: Iterable[AcpiDevice], power: int, base: int) -> bytes:
    """The RSDP, to be placed at `base`, and all tables behind it. `power` is the first of the
    power device's three ports.

    There may be at most `avmm.arch.x86_64.mptable.MAX_CPUS` CPUs.
    """
    at = base + _ALIGN
    blocks: list[bytes] = []

    def place(table: bytes) -> int:
        nonlocal at
        here = at
        blocks.append(table + bytes(-len(table) % _ALIGN))
        at += len(blocks[-1])
        return here

    dsdt = place(_table(b"DSDT", 2, _dsdt(cpus, named)))
    fadt = place(_table(b"FACP", _FADT_REVISION, _fadt(dsdt, power)))
    madt = place(_table(b"APIC", 6, _madt(cpus)))
    xsdt = place(_table(b"XSDT", 1, struct.pack("<2Q", fadt, madt)))
    return _rsdp(xsdt).ljust(_ALIGN, b"\0") + b"".join(blocks)


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """5.2.6: a table with the header that all tables except the RSDP begin with."""
    length = _HEADER.size + len(body)
    oem = (_OEM, _OEM_TABLE, _REVISION, b"AVMM", _REVISION)
    data = bytearray(_HEADER.pack(signature, length, revision, 0, *oem) + body)
    data[9] = _checksum(data)
    return bytes(data)


def _rsdp(xsdt: int) -> bytes:
    """5.2.5.3. The first 20 bytes have a checksum of their own, because ACPI 1.0 had only
    these.
    """
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    data[8] = _checksum(data[:20])
    data[32] = _checksum(data)
    return bytes(data)


def _register(port: int) -> bytes:
    """5.2.3.2: a generic address structure for a port of one byte."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8, 0, _BYTE_ACCESS, port)


def _fadt(dsdt: int, power: int) -> bytes:
    """5.2.9. Offsets count from the table's beginning, header included."""
    fadt = bytearray(_FADT_LENGTH)
    flags = _WBINVD | _POWER_BUTTON | _SLEEP_BUTTON | _RESET_REG_SUP | _HW_REDUCED
    struct.pack_into("<H", fadt, 109, _VGA_NOT_PRESENT)
    struct.pack_into("<I", fadt, 112, flags)
    fadt[116:128] = _register(power + 2)
    fadt[128] = RESET_VALUE
    fadt[131] = _FADT_MINOR
    struct.pack_into("<Q", fadt, 140, dsdt)
    fadt[244:256] = _register(power)
    fadt[256:268] = _register(power + 1)
    fadt[268:276] = _OEM_TABLE
    return bytes(fadt[_HEADER.size :])


def _madt(cpus: int) -> bytes:
    """5.2.12. Interrupt numbers are the IOAPIC's pins, so no override is needed."""
    entries = [struct.pack("<II", layout.LAPIC, 0)]
    entries += [struct.pack("<BBBBI", _LOCAL_APIC, 8, cpu, cpu, _ENABLED) for cpu in range(cpus)]
    entries.append(struct.pack("<BBBxII", _IO_APIC, 12, cpus, layout.IOAPIC, 0))
    entries.append(struct.pack("<BBBHB", _LOCAL_APIC_NMI, 6, _ALL_PROCESSORS, 0, 1))
    return b"".join(entries)


def _dsdt(cpus: int, named: Iterable[AcpiDevice]) -> bytes:
    body = [_processor(cpu) for cpu in range(cpus)]
    body += [_device(number, described) for number, described in enumerate(named)]
    body += [generation.devices(), button.devices()]
    # 7.4.2: only the first element counts on hardware-reduced machines.
    off = aml.package(*[aml.integer(value) for value in (SLEEP_TYPE_OFF, 0, 0, 0)])
    return aml.scope("_SB", b"".join(body)) + aml.name("_S5", off)


def _processor(cpu: int) -> bytes:
    """8.4: the device for the CPU that has the same number in the MADT."""
    body = aml.name("_HID", aml.string("ACPI0007")) + aml.name("_UID", aml.integer(cpu))
    return aml.device(f"C{cpu:03X}", body)


def _device(number: int, described: AcpiDevice) -> bytes:
    hid = described.hid
    pnp = len(hid) == _EISA_LENGTH
    found = [aml.io_ports(base, count) for base, count in described.ports]
    found += [aml.memory(base, size) for base, size in described.windows]
    if described.gsi is not None:
        found.append(aml.interrupt(described.gsi, level=described.level))
    body = aml.name("_HID", aml.eisa_id(hid) if pnp else aml.string(hid))
    body += aml.name("_UID", aml.integer(number))
    body += aml.name("_CRS", aml.resources(*found))
    return aml.device(f"D{number:03X}", body)
