"""The PCI configuration ports (0xcf8-0xcff) of a machine without PCI: nobody answers.

Reads return all ones, as on a bus without devices (PCI Local Bus Specification 3.0, 3.2.2.3.4);
writes are ignored. There is no address latch either, although even a PC without cards has one. A
guest that writes 0x80000000 to 0xcf8 and reads it back concludes that configuration mechanism #1
exists, and looks for a host bridge, device by device. Linux (arch/x86/pci/direct.c,
`pci_check_type1`, `pci_sanity_check`) makes over a thousand accesses, each an exit, before it
believes that the bus is empty. Without the latch it tries mechanism #2, finds that all ones are
the wrong answer there as well, and gives up after nine accesses. Both end in the same harmless
"PCI: Fatal: No config space access function found".
"""

from __future__ import annotations

from typing import ClassVar, Final

from avmm.devices.state import Stateless

PORTS: Final = 8


class PciConfig(Stateless):
    """The eight ports. They exist so that a guest's probe is not reported as an access that nobody
    answers."""

    max_width: ClassVar[int] = 4

    def read(self, offset: int, size: int) -> int:
        return 0xFFFFFFFF

    def write(self, offset: int, size: int, value: int) -> None:
        pass
