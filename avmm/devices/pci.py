"""The PCI configuration ports (0xcf8-0xcff) of a machine without PCI.

Configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2): the double word at
0xcf8 selects a register, 0xcfc-0xcff read and write it. Behind it is no device here: a master
abort, which reads all ones (3.2.2.3.4).

A guest that looks for the mechanism writes 0x80000000 to 0xcf8 and reads it back. There are two
honest answers, and `latch` chooses:

- True: the mechanism is there, the bus is empty. What guests that insist on a host bridge's
  ports expect; but a guest has to find out device by device. Linux (arch/x86/pci/direct.c,
  `pci_check_type1`, `pci_sanity_check`) makes over a thousand accesses, each an exit, before
  it believes that nothing is there.
- False: there is no such mechanism; reads give all ones. Linux sees it after four accesses, tries
  mechanism #2, for which 0xff is the wrong answer as well, and says the same as before: "PCI:
  Fatal: No config space access function found", which is harmless.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from avmm.devices.base import Device
from avmm.errors import DeviceError

PORTS: Final = 8
_ADDRESS: Final = 0  # offset of 0xcf8
_DATA: Final = 4  # and of 0xcfc


class PciConfig(Device):
    """An address latch (or none) and an empty configuration space."""

    max_width: ClassVar[int] = 4

    def __init__(self, *, latch: bool = True) -> None:
        self._latch = latch
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        """The latch, or a part of it; all ones from the data ports."""
        if offset >= _DATA or not self._latch:
            return 0xFFFFFFFF
        return self._address >> 8 * offset

    def write(self, offset: int, size: int, value: int) -> None:
        """Only a double word sets the latch: narrower writes belong to other devices (Linux
        writes a byte to 0xcfb to end mechanism #2; 0xcf9 is a chipset's reset register)."""
        if offset == _ADDRESS and size == 4:
            self._address = value

    def save(self) -> Mapping[str, Any]:
        return {"address": self._address}

    def load(self, state: Mapping[str, Any]) -> None:
        match state:
            case {"address": int(address)} if len(state) == 1 and 0 <= address < 1 << 32:
                self._address = int(address)
            case _:
                raise DeviceError(f"{self.name}: expected a state of one 32-bit address")
