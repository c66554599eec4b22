"""The PCI configuration ports of a machine without PCI."""

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


def test_linux_gives_up_at_once(cpu):
    linux = Linux(cpu(PciConfig()))
    assert linux.check_type1() == (False, False)
    assert not linux.check_type2()
    assert linux.accesses == 9


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ports_read_all_ones_whatever_is_written(cpu, size):
    port = cpu(PciConfig())
    for offset in range(0, 8, size):
        port.out(offset, 0x80123456 & (1 << 8 * size) - 1, size)
    for offset in range(0, 8, size):
        assert port.inp(offset, size) == (1 << 8 * size) - 1


def test_there_is_no_state():
    device = PciConfig()
    device.write(0, 4, 0x80001234)
    assert device.save() == {"version": 1}
    device.load({"version": 1})
    for wrong in ({}, {"version": 1, "address": 0}, None, [], 0):
        with pytest.raises(DeviceError, match="PciConfig"):
            device.load(wrong)
