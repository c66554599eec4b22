"""A host for a device without a machine, with the registers in front of the device that a machine
puts there."""

from __future__ import annotations

from typing import Any

from avmm.bus.host import DeviceHost
from avmm.bus.registers import DeviceRegisters
from avmm.bus.space import mmio
from avmm.devices.base import Device


class FrontHost(DeviceHost):
    """The device is at address 0. Accesses go to `registers`, with `lock` held."""

    def __init__(self, device: Device, memory: Any, interrupt: Any) -> None:
        super().__init__(memory, interrupt, self.doorbell)
        places = [mmio(device, 0, 1 << 16)]
        self.registers = DeviceRegisters(device, self.lock, self.wakeup, places)

    def doorbell(self, offset: int, size: int, value: int, *, by_exit: bool = False) -> Any:
        raise AssertionError("no device tested here needs a doorbell")
