"""The MP table, read back by a parser that goes by the specification and checks all sums."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.mptable import mp_table
from avmm.errors import ConfigError

pytestmark = pytest.mark.timeout(60)


@dataclass
class Parsed:
    """What a guest makes of the table."""

    cpus: list[tuple[int, int]] = field(default_factory=list)
    buses: dict[int, bytes] = field(default_factory=dict)
    ioapics: list[tuple[int, int, int]] = field(default_factory=list)
    interrupts: list[tuple[int, ...]] = field(default_factory=list)
    locals: list[tuple[int, ...]] = field(default_factory=list)
    lapic: int = 0


def parse(area: bytes, base: int) -> Parsed:
    """Intel MP specification 1.4, chapter 4; `area` is guest memory from `base` on."""
    at = next(i for i in range(0, len(area), 16) if area[i : i + 4] == b"_MP_")
    pointer = area[at : at + 16]
    address, length, revision = struct.unpack_from("<IBB", pointer, 4)
    assert (length, revision) == (1, 4)
    assert sum(pointer) % 256 == 0
    assert pointer[11:] == bytes(5), "a table is there, virtual wire mode"
    table = area[address - base :]
    signature, size, revision = struct.unpack_from("<4sHB", table)
    assert (signature, revision) == (b"PCMP", 4)
    assert sum(table[:size]) % 256 == 0
    assert table[8:16] == b"AVMM    "
    assert table[16:28] == b"avmm        "
    oem, oem_size, count, lapic, extended, extended_sum = struct.unpack_from("<IHHIHB", table, 28)
    assert (oem, oem_size, extended, extended_sum) == (0, 0, 0, 0)
    found = Parsed(lapic=lapic)
    kinds = []
    at = 44
    for _ in range(count):
        kind = table[at]
        kinds.append(kind)
        entry = table[at : at + (20 if kind == 0 else 8)]
        at += len(entry)
        if kind == 0:
            assert entry[12:20] == bytes(8)
            assert entry[2] >= 0x10, "an integrated APIC"
            found.cpus.append((entry[1], entry[3]))
        elif kind == 1:
            found.buses[entry[1]] = entry[2:]
        elif kind == 2:
            (address,) = struct.unpack_from("<I", entry, 4)
            found.ioapics.append((entry[1], entry[3], address))
        elif kind == 3:
            found.interrupts.append(struct.unpack("<BHBBBB", entry[1:]))
        else:
            assert kind == 4
            found.locals.append(struct.unpack("<BHBBBB", entry[1:]))
    assert at == size
    assert kinds == sorted(kinds)
    return found


@pytest.mark.parametrize("cpus", [1, 2, 3, 64, 253, 254])
def test_table(cpus: int) -> None:
    data = mp_table(cpus)
    assert len(data) <= layout.BIOS_END - layout.BIOS
    found = parse(data, layout.MP_FLOATING_POINTER)
    assert found.lapic == layout.LAPIC
    assert found.cpus == [(i, 3 if i == 0 else 1) for i in range(cpus)]
    assert found.buses == {0: b"ISA   "}
    [(ioapic, flags, address)] = found.ioapics
    assert (flags, address) == (1, layout.IOAPIC)
    assert ioapic not in {cpu for cpu, _ in found.cpus}
    assert ioapic <= 254
    assert found.interrupts == [(0, 0, 0, pin, ioapic, pin) for pin in range(24)]
    assert found.locals == [(3, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0xFF, 1)]


def test_another_base() -> None:
    data = bytes(0x20) + mp_table(2, 0xF_0020)
    assert len(parse(data, 0xF_0000).cpus) == 2


@pytest.mark.parametrize("cpus", [-1, 0, 255, 1 << 40])
def test_number_of_cpus(cpus: int) -> None:
    with pytest.raises(ConfigError, match=rf"{cpus} CPUs: expected 1 to 254"):
        mp_table(cpus)


def test_level_triggered_interrupts_are_told() -> None:
    flags = interrupts(mp_table(1, levels={10, 11}))
    assert [irq for irq, flag in flags if flag == 0b1101] == [10, 11]
    assert {flag for irq, flag in flags if irq not in (10, 11)} == {0}


def interrupts(table: bytes) -> list[tuple[int, int]]:
    """(the bus's interrupt, its flags) of each entry for the IOAPIC."""
    at, found = 16 + 44, []
    while at < len(table):
        if table[at] == 3:
            found.append((table[at + 5], table[at + 2] | table[at + 3] << 8))
        at += 20 if table[at] == 0 else 8
    return found
