"""The PCI configuration ports of a machine without PCI."""

from __future__ import annotations

import pytest

from avmm.devices.pci import PciConfig
from avmm.errors import DeviceError


class Linux:
    """arch/x86/pci/direct.c, counting the accesses."""

    def __init__(self, port):
        self.port = port
        self.accesses = 0

    def inp(self, address, size):
        self.accesses += 1
        return self.port.inp(address - 0xCF8, size)

    def out(self, address, value, size):
        self.accesses += 1
        self.port.out(address - 0xCF8, value, size)

    def read(self, devfn, register):
        self.out(0xCF8, 0x80000000 | devfn << 8 | register & 0xFC, 4)
        return self.inp(0xCFC + (register & 2), 2)

    def sane(self):
        return any(
            self.read(devfn, 0x0A) in (0x0600, 0x0300) or self.read(devfn, 0) in (0x8086, 0x0E11)
            for devfn in range(0x100)
        )

    def check_type1(self):
        self.out(0xCFB, 0x01, 1)
        saved = self.inp(0xCF8, 4)
        self.out(0xCF8, 0x80000000, 4)
        works = self.inp(0xCF8, 4) == 0x80000000
        found = works and self.sane()
        self.out(0xCF8, saved, 4)
        return works, found

    def check_type2(self):
        self.out(0xCFB, 0, 1)
        self.out(0xCF8, 0, 1)
        self.out(0xCFA, 0, 1)
        return self.inp(0xCF8, 1) == 0 == self.inp(0xCFA, 1)


def test_linux_finds_the_mechanism_and_no_bus(cpu):
    linux = Linux(cpu(PciConfig()))
    assert linux.check_type1() == (True, False)
    assert linux.accesses > 1000


def test_without_latch_linux_gives_up_at_once(cpu):
    linux = Linux(cpu(PciConfig(latch=False)))
    assert linux.check_type1() == (False, False)
    assert not linux.check_type2()
    assert linux.accesses <= 10


def test_the_latch_reads_back_in_parts(cpu):
    port = cpu(PciConfig())
    port.out(0, 0x80123456, 4)
    assert port.inp(0, 4) == 0x80123456
    assert [port.inp(n) for n in range(4)] == [0x56, 0x34, 0x12, 0x80]
    assert port.inp(2, 2) == 0x8012


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (1, 1), (3, 1), (0, 2), (2, 2)])
def test_narrow_writes_do_not_set_it(cpu, offset, size):
    port = cpu(PciConfig())
    port.out(0, 0x80123456, 4)
    port.out(offset, 0, size)
    assert port.inp(0, 4) == 0x80123456


@pytest.mark.parametrize("latch", [True, False])
def test_configuration_space_is_empty(cpu, latch):
    port = cpu(PciConfig(latch=latch))
    for address in (0x80000000, 0x80FFFFFC, 0):
        port.out(0, address, 4)
        port.out(4, 0x12345678, 4)
        port.out(5, 0x12)
        assert port.inp(4, 4) == 0xFFFFFFFF
        assert port.inp(6, 2) == 0xFFFF
        assert port.inp(5) == 0xFF
        if latch:
            assert port.inp(0, 4) == address


def test_state():
    device = PciConfig()
    device.write(0, 4, 0x80001234)
    other = PciConfig()
    other.load(device.save())
    assert other.read(0, 4) == 0x80001234
    for wrong in (
        {},
        {"address": 1 << 32},
        {"address": -1},
        {"address": b""},
        None,
        {"address": 0, "x": 0},
    ):
        with pytest.raises(DeviceError, match="PciConfig"):
            other.load(wrong)
    assert other.read(0, 4) == 0x80001234
