"""ACPI tables, read back by a parser that goes by the specification and checks all sums."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import guestview
from support.images import Elf, Segment, pvh_elf

import avmm
from avmm.arch.x86_64 import acpi, aml, layout
from avmm.arch.x86_64.acpi import AcpiDevice
from avmm.arch.x86_64.boot.load import load
from avmm.boot import Protocol
from avmm.devices.pc.power import Power
from avmm.errors import ConfigError
from avmm.memory.ram import GuestMemory

Write = Callable[..., Path]
UART = AcpiDevice("PNP0501", ports=[(0x3F8, 8)], gsi=4)
VIRTIO = AcpiDevice("LNRO0005", windows=[(0xD000_0000, 0x200)], gsi=20)


class Tables:
    """What a guest finds from the RSDP on; `read(address, size)` is its memory."""

    def __init__(self, read: Callable[[int, int], bytes], rsdp: int) -> None:
        self.read = read
        head = read(rsdp, 36)
        assert (head[:8], head[15]) == (b"RSD PTR ", 2)
        assert rsdp % 16 == 0
        assert sum(head[:20]) % 256 == sum(head) % 256 == 0
        length, xsdt = struct.unpack_from("<IQ", head, 20)
        assert length == 36
        body = self.table(xsdt, b"XSDT")
        pointers = struct.unpack(f"<{len(body) // 8}Q", body)
        found = {read(at, 4): at for at in pointers}
        assert set(found) == {b"FACP", b"APIC"}
        self.fadt = bytes(36) + self.table(found[b"FACP"], b"FACP")
        self.madt = self.table(found[b"APIC"], b"APIC")
        self.dsdt = self.table(struct.unpack_from("<Q", self.fadt, 140)[0], b"DSDT")

    def table(self, at: int, signature: bytes) -> bytes:
        found, length = struct.unpack("<4sI", self.read(at, 8))
        assert found == signature
        data = self.read(at, length)
        assert sum(data) % 256 == 0
        assert data[10:16] == b"AVMM  "
        return data[36:]

    def cpus(self) -> list[int]:
        ids = []
        at = 8
        while at < len(self.madt):
            kind, length = self.madt[at : at + 2]
            if kind == 0:
                uid, apic_id, flags = struct.unpack_from("<BBI", self.madt, at + 2)
                assert (uid, flags) == (apic_id, 1)
                ids.append(apic_id)
            at += length
        assert at == len(self.madt)
        return ids


def number(data: bytes, at: int) -> tuple[int, int]:
    """An AML integer: (its value, where it ends)."""
    if data[at] < 2:
        return data[at], at + 1
    size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[data[at]]
    return int.from_bytes(data[at + 1 : at + 1 + size], "little"), at + 1 + size


def end_of_package(data: bytes, at: int) -> tuple[int, int]:
    """(where a package's content begins, where it ends)"""
    extra = data[at] >> 6
    length = data[at] & (0x0F if extra else 0x3F)
    for index in range(extra):
        length |= data[at + 1 + index] << 4 + 8 * index
    return at + 1 + extra, at + length


def terms(data: bytes) -> dict[str, Any]:
    """The names in AML: numbers, text, bytes of buffers, lists, devices as dicts, and methods as
    their flags and body."""
    found: dict[str, Any] = {}
    at = 0
    while at < len(data):
        if data[at] == 0x08:
            name, (value, at) = data[at + 1 : at + 5].decode(), value_at(data, at + 5)
            found[name] = value
            continue
        if data[at] == 0x14:
            start, at = end_of_package(data, at + 1)
            found[data[start : start + 4].decode()] = (data[start + 4], data[start + 5 : at])
            continue
        if data[at] == 0x10:
            start, at = end_of_package(data, at + 1)
            assert data[start : start + 1] == b"\\"
            start += 1
        else:
            assert data[at : at + 2] == b"\x5b\x82", data[at : at + 8]
            start, at = end_of_package(data, at + 2)
        name = data[start : start + 4].decode()
        assert name not in found
        found[name] = terms(data[start + 4 : at])
    return found


def value_at(data: bytes, at: int) -> tuple[Any, int]:
    if data[at] == 0x0D:
        end = data.index(0, at)
        return data[at + 1 : end].decode(), end + 1
    if data[at] == 0x11:
        start, end = end_of_package(data, at + 1)
        size, start = number(data, start)
        assert start + size == end
        return data[start:end], end
    if data[at] == 0x12:
        start, end = end_of_package(data, at + 1)
        count, at = data[start], start + 1
        values = []
        while at < end:
            value, at = number(data, at)
            values.append(value)
        assert len(values) == count
        return values, end
    return number(data, at)


def eisa(value: int) -> str:
    high, low = struct.unpack(">HH", struct.pack("<I", value))
    return "".join(chr((high >> shift & 31) + 0x40) for shift in (10, 5, 0)) + f"{low:04X}"


def made(cpus: int, devices: list[AcpiDevice]) -> Tables:
    area = acpi.tables(cpus, devices, 0x600, layout.ACPI)
    return Tables(lambda at, n: area[at - layout.ACPI : at - layout.ACPI + n], layout.ACPI)


@pytest.mark.parametrize("cpus", [1, 2, 16, 254])
def test_every_cpu_is_named(cpus: int) -> None:
    tables = made(cpus, [])
    assert tables.cpus() == list(range(cpus))
    scope = terms(tables.dsdt)["_SB_"]
    assert [(d["_HID"], d.get("_UID")) for d in scope.values() if d["_HID"] == "ACPI0007"] == [
        ("ACPI0007", cpu) for cpu in range(cpus)
    ]


def test_the_generation_id_is_named_and_its_changes_are_told() -> None:
    """As Linux's vmgenid and the ACPI specification's generic event device want it."""
    scope = terms(made(1, []).dsdt)["_SB_"]
    generation, events = scope["VGEN"], scope["GED_"]
    assert generation["_CID"] == "VM_Gen_Counter"
    low, high = generation["ADDR"]
    assert (low | high << 32) == layout.GENERATION + 16
    assert low % 8 == 0
    assert layout.ACPI + layout.ACPI_SIZE <= low < layout.RESET_VECTOR - 16
    assert events["_HID"] == "ACPI0013"
    assert events["_CRS"] == bytes.fromhex("89060003 01 0d000000 7900")
    arguments, body = events["_EVT"]
    assert arguments & 7 == 1
    assert body == b"\x86\\\x2e_SB_VGEN\x0a\x80"


def test_the_power_button_is_named_and_told() -> None:
    scope = terms(made(1, []).dsdt)["_SB_"]
    power, events = scope["PWRB"], scope["GEDB"]
    assert eisa(power["_HID"]) == "PNP0C0C"
    assert (events["_HID"], events["_UID"]) == ("ACPI0013", 1)
    assert events["_CRS"] == bytes.fromhex("89060003 01 08000000 7900")
    assert events["_EVT"][1] == b"\x86\\\x2e_SB_PWRB\x0a\x80"
    (flags,) = struct.unpack_from("<I", made(1, []).fadt, 112)
    assert flags & 1 << 4, "the button is a device, not a fixed register"


def test_the_power_switch_is_where_the_fadt_says() -> None:
    tables = made(1, [])
    (flags,) = struct.unpack_from("<I", tables.fadt, 112)
    assert flags & 1 << 20, "hardware-reduced"
    assert flags & 1 << 10, "the reset register is there"
    registers = [struct.unpack_from("<BBBBQ", tables.fadt, at) for at in (244, 256, 116)]
    assert registers == [(1, 8, 0, 1, 0x600 + n) for n in range(3)]
    assert tables.fadt[128] == acpi.RESET_VALUE
    assert terms(tables.dsdt)["_S5_"][0] == acpi.SLEEP_TYPE_OFF


def test_devices_have_their_ids_and_resources() -> None:
    high = AcpiDevice("LNRO0005", windows=[(0x1_0000_0000, 0x1000)])
    scope = terms(made(1, [UART, VIRTIO, high]).dsdt)["_SB_"]
    uart, virtio, far = scope["D000"], scope["D001"], scope["D002"]
    assert eisa(uart["_HID"]) == "PNP0501"
    assert uart["_CRS"] == bytes.fromhex("4701f803f8030108 89060003 01 04000000 7900")
    assert (virtio["_HID"], virtio["_UID"]) == ("LNRO0005", 1)
    assert virtio["_CRS"] == bytes.fromhex(
        "86090001 000000d0 00020000 89060003 01 14000000 7900"
    ).replace(b"", b"")
    assert struct.unpack_from("<5Q", far["_CRS"], 6) == (
        0,
        0x1_0000_0000,
        0x1_0000_0FFF,
        0,
        0x1000,
    )


def test_a_level_triggered_interrupt_is_told_as_shared() -> None:
    device = AcpiDevice("LNRO0005", windows=[(0xD000_0000, 0x200)], gsi=10, level=True)
    found = terms(made(1, [device]).dsdt)["_SB_"]["D000"]["_CRS"]
    assert found.endswith(bytes.fromhex("89060009 01 0a000000 7900"))


def test_hundreds_of_devices_are_told_or_refused(write: Write) -> None:
    many = [VIRTIO] * 200
    assert len(terms(made(4, many).dsdt)["_SB_"]) == 208
    memory = GuestMemory("4M")
    with pytest.raises(ConfigError, match=r"ACPI tables of 2000 devices are .* acpi = false"):
        load(memory, write(Elf()), acpi=[VIRTIO] * 2000)
    memory.close()


@pytest.mark.parametrize("hid", ["", "pnp0501", "PNP05", "PNP0501X0", "LNRO000G", "P\0P0501"])
def test_what_is_no_hardware_id_is_refused(hid: str) -> None:
    with pytest.raises(ConfigError, match="expected a hardware id like"):
        AcpiDevice(hid)


def test_ports_that_acpi_cannot_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="256 ports at 0x300; ACPI names at most 255"):
        AcpiDevice("PNP0501", ports=[(0x300, 256)])


@pytest.mark.parametrize("value", [0, 1, 2, 255, 256, 65535, 65536, 1 << 32, (1 << 64) - 1])
def test_numbers(value: int) -> None:
    data = aml.integer(value)
    assert number(data, 0) == (value, len(data))


@pytest.mark.parametrize("size", [0, 50, 62, 63, 64, 4000, 4090, 4096, 100_000, 1 << 20])
def test_lengths_of_every_size(size: int) -> None:
    found = terms(aml.scope("_SB", aml.name("A", aml.string("x" * size)) if size else b""))
    assert found["_SB_"] == ({"A___": "x" * size} if size else {})


def test_a_guest_is_told_where_they_are(memory: GuestMemory, write: Write) -> None:
    entry = load(memory, write(pvh_elf()), cpus=2, acpi=[UART])
    info = guestview.start_info(memory, entry.registers["rbx"])
    assert info.rsdp == layout.ACPI
    assert Tables(memory.read, info.rsdp).cpus() == [0, 1]
    other = GuestMemory("16M")
    load(other, write(Elf([Segment(b"x", paddr=0x200000)], entry=0x200000)), acpi=[])
    (rsdp,) = struct.unpack("<Q", other.read(layout.ZERO_PAGE + 0x70, 8))
    assert Tables(other.read, rsdp).cpus() == [0]
    other.close()


def test_without_acpi_nothing_is_told(memory: GuestMemory, write: Write) -> None:
    load(memory, write(pvh_elf()), protocol=Protocol.LINUX64)
    assert memory.read(layout.ZERO_PAGE + 0x70, 8) == bytes(8)
    assert memory.read(layout.ACPI, 64) == bytes(64)


def test_a_placement_is_described_with_all_its_regions() -> None:
    class Disk(avmm.Device):
        acpi_hid = "AVMM0001"

    class Silent(avmm.Device):
        pass

    disk = Disk()
    places = [
        avmm.mmio(disk, 0xD000_0000, 0x1000, irq=5),
        avmm.pio(Silent(), 0x300, 4),
        avmm.pio(disk, 0x310, 4),
    ]
    assert acpi.devices(places) == [
        AcpiDevice("AVMM0001", ports=[(0x310, 4)], windows=[(0xD000_0000, 0x1000)], gsi=5)
    ]


def test_the_power_switch() -> None:
    calls: list[str] = []
    power = Power(
        lambda: calls.append("off"), lambda: calls.append("reset"), off_type=5, reset_value=0xF
    )
    assert [power.read(at, 1) for at in range(3)] == [0, 0, 0]
    for offset, value in ((0, 5 << 2), (0, 1 << 5), (0, 0x20 | 4 << 2), (1, 0x34), (2, 0xE)):
        power.write(offset, 1, value)
    assert calls == []
    power.write(0, 1, 0x20 | 5 << 2)
    power.write(2, 1, 0xF)
    assert calls == ["off", "reset"]
