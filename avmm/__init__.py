"""avmm: an async, event-driven micro-VMM. Small KVM guests inside a trio program."""

from avmm.boot import FlatOptions, Mode
from avmm.bus import Placement, mmio, msr, pio
from avmm.calls import Call
from avmm.config import MachineConfig
from avmm.devices.base import Device, Host, InterruptLine, Wakeup
from avmm.devices.console import ConsoleStream
from avmm.errors import (
    AvmmError,
    ConfigError,
    DeviceError,
    GuestMemoryError,
    ImageError,
    MsrFault,
    PauseTimeout,
    StateError,
    VcpuError,
)
from avmm.kvm import KvmError, KvmUnavailable
from avmm.machine import Machine
from avmm.memory import GuestMemory
from avmm.outcome import Cause, Outcome
from avmm.placing import virtio

__all__ = [
    "AvmmError",
    "Call",
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
    "MsrFault",
    "Outcome",
    "PauseTimeout",
    "Placement",
    "StateError",
    "VcpuError",
    "Wakeup",
    "mmio",
    "msr",
    "pio",
    "virtio",
]
