"""The PCI configuration ports."""

from __future__ import annotations

import pytest

from avmm.devices.pc.pci import PciConfig
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


def test_linux_finds_the_bridge_at_once(cpu):
    linux = Linux(cpu(PciConfig()))
    assert linux.check_type1() == (True, True)
    assert linux.accesses == 7


def test_there_is_one_device(cpu):
    linux = Linux(cpu(PciConfig()))
    found = [devfn for devfn in range(0x100) if linux.read(devfn, 0) != 0xFFFF]
    assert found == [0]
    assert (linux.read(0, 0), linux.read(0, 2)) == (0x1B36, 0x0008)
    assert [linux.read(0, at) for at in range(4, 0x100, 2) if at != 0x0A] == [0] * 125
    linux.out(0xCF8, 0x80010000, 4)
    assert linux.inp(0xCFC, 4) == 0xFFFFFFFF, "the second bus"


@pytest.mark.parametrize(("size", "classes"), [(1, [0, 0, 0, 6]), (2, [0, 0x600]), (4, [6 << 24])])
def test_registers_are_read_in_all_sizes(cpu, size, classes):
    port = cpu(PciConfig())
    port.out(0, 0x80000008, 4)
    assert [port.inp(4 + at, size) for at in range(0, 4, size)] == classes
    port.out(4, 0, size)
    assert [port.inp(4 + at, size) for at in range(0, 4, size)] == classes, "it is read-only"


def test_without_its_enable_bit_an_address_finds_nothing(cpu):
    port = cpu(PciConfig())
    port.out(0, 0x00000008, 4)
    assert port.inp(0, 4) == 8
    assert port.inp(4, 4) == 0xFFFFFFFF


@pytest.mark.parametrize("size", [1, 2])
def test_a_part_of_the_address_is_no_address(cpu, size):
    port = cpu(PciConfig())
    port.out(0, 0x80000000, 4)
    for offset in range(0, 4, size):
        port.out(offset, 0x12, size)
        assert port.inp(offset, size) == (1 << 8 * size) - 1
    assert port.inp(0, 4) == 0x80000000


def test_the_address_is_saved():
    device, other = PciConfig(), PciConfig()
    device.write(0, 4, 0x80000008)
    assert device.save() == {"version": 2, "address": 0x80000008}
    other.load(device.save())
    assert other.read(4, 4) == 0x06000000
    for wrong in ({}, {"version": 1}, {"version": 2, "address": 1 << 32}, None, [], 0):
        with pytest.raises(DeviceError, match="PciConfig"):
            other.load(wrong)
    assert other.read(0, 4) == 0x80000008
