"""avmm: an async, event-driven micro-VMM. Small KVM guests inside a trio program."""

from avmm.boot import FlatOptions, Mode
from avmm.bus import Placement, mmio, pio
from avmm.config import MachineConfig
from avmm.devices.base import Device, Host, InterruptLine, Wakeup
from avmm.devices.console import ConsoleStream
from avmm.errors import (
    AvmmError,
    ConfigError,
    DeviceError,
    GuestMemoryError,
    ImageError,
    VcpuError,
)
from avmm.kvm import KvmError, KvmUnavailable
from avmm.machine import Machine
from avmm.memory import GuestMemory
from avmm.outcome import Cause, Outcome

__all__ = [
    "AvmmError",
    "Cause",
    "ConfigError",
    "ConsoleStream",
    "Device",
    "DeviceError",
    "FlatOptions",
    "GuestMemory",
    "GuestMemoryError",
    "Host",
    "ImageError",
    "InterruptLine",
    "KvmError",
    "KvmUnavailable",
    "Machine",
    "MachineConfig",
    "Mode",
    "Outcome",
    "Placement",
    "VcpuError",
    "Wakeup",
    "mmio",
    "pio",
]
