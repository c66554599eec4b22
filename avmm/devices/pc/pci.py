"""The PCI configuration ports (0xcf8-0xcff): a bus with a host bridge and nothing else.

PCI Local Bus Specification 3.0, 3.2.2.3.2: a guest writes the address of a register to 0xcf8 and
reads or writes the register at 0xcfc ("configuration mechanism #1"). The host bridge, device 0 of
bus 0, is there for Linux: it looks for one before it believes in the mechanism
(arch/x86/pci/direct.c, `pci_sanity_check`), and finds it with its first accesses. Without one it
looks at every device, a thousand exits, or without an address latch gives up. Either way it says
in every boot, as an error, "PCI: Fatal: No config space access function found".

The bridge has no registers that can be written. All other devices read as all ones, which means
that they do not exist (3.2.2.3.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from avmm.devices.base import Device
from avmm.devices.state import DeviceState
from avmm.plain import U32

PORTS: Final = 8

_DATA: Final = 4
"""The offset of port 0xcfc."""
_ENABLED: Final = 1 << 31
_REGISTER: Final = 0xFC
_BRIDGE: Final[Mapping[int, int]] = {
    0x00: 0x0008_1B36,  # the host bridge of QEMU's generic machines
    0x08: 0x0600_0000,  # class: bridge, host
}
"""The registers of the host bridge that are not 0."""
_NOTHING: Final = 0xFFFF_FFFF


class PciConfig(Device):
    """The eight ports."""

    class State(DeviceState, version=2):
        address = U32

    max_width: ClassVar[int] = 4

    def __init__(self) -> None:
        self._address = 0

    def read(self, offset: int, size: int) -> int:
        if offset < _DATA:
            # Only an access to all four bytes is one to the address (3.2.2.3.2).
            return self._address if size == _DATA else _NOTHING
        return self._register() >> 8 * (offset - _DATA)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == _DATA:
            self._address = value

    def _register(self) -> int:
        register = self._address & _REGISTER
        is_bridge = self._address & ~(_REGISTER | 3) == _ENABLED
        return _BRIDGE.get(register, 0) if is_bridge else _NOTHING

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(address=self._address)

    def load(self, state: Mapping[str, Any]) -> None:
        self._address = self.State.load(self.name, state).address
