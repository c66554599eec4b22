"""The PCI configuration ports (0xcf8-0xcff) of a machine without PCI: nobody answers.

Reads give all ones, as on a bus without devices (PCI Local Bus Specification 3.0, 3.2.2.3.4);
writes are swallowed. There is no address latch either, though a PC without a card has one: a
guest that finds 0x80000000 at 0xcf8 after writing it there takes configuration mechanism #1 for
present and looks for a host bridge, device by device. Linux (arch/x86/pci/direct.c,
`pci_check_type1`, `pci_sanity_check`) makes over a thousand accesses, each an exit, before it
believes that the bus is empty. Without the latch it tries mechanism #2, for which all ones are
the wrong answer as well, and gives up after nine accesses. Both end in the same harmless "PCI:
Fatal: No config space access function found".
"""

from __future__ import annotations

from typing import ClassVar, Final

from avmm.devices.state import Stateless

PORTS: Final = 8


class PciConfig(Stateless):
    """The eight ports; that they are there at all keeps a guest's probe from being an error."""

    max_width: ClassVar[int] = 4

    def read(self, offset: int, size: int) -> int:
        return 0xFFFFFFFF

    def write(self, offset: int, size: int, value: int) -> None:
        pass
