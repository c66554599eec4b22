"""avmm: an async, event-driven micro-VMM. Small KVM guests inside a trio program."""

from avmm import plain
from avmm.arrivals import receive, restore
from avmm.boot import FlatOptions, Mode
from avmm.bus.space import Placement, mmio, msr, pio
from avmm.config import MachineConfig
from avmm.devices.base import Device, Host, InterruptLine, Wakeup
from avmm.devices.console import ConsoleStream
from avmm.devices.state import DeviceState
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.device import GuestQueue, VirtioDevice
from avmm.devices.virtio.frame import Backend, Frame
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.port import Port
from avmm.devices.virtio.queue import Chain
from avmm.devices.virtio.rng import Rng
from avmm.devices.virtio.vsock import Vsock
from avmm.disks import DiskOptions, OverlayDisk, RawDisk
from avmm.disks.base import Disk
from avmm.errors import (
    AvmmError,
    ConfigError,
    DeviceError,
    GuestMemoryError,
    HandOverUnknownError,
    ImageError,
    MigrationError,
    MsrFault,
    PauseTimeout,
    SnapshotError,
    StateError,
    VcpuError,
)
from avmm.kvm import KvmError, KvmUnavailable
from avmm.machine import Machine
from avmm.memory.ram import GuestMemory
from avmm.outcome import Cause, Outcome
from avmm.parts.placing import virtio
from avmm.vcpu.calls import Answer, Call

__all__ = [
    "Answer",
    "AvmmError",
    "Backend",
    "Balloon",
    "Call",
    "Cause",
    "Chain",
    "ConfigError",
    "Console",
    "ConsoleStream",
    "Device",
    "DeviceError",
    "DeviceState",
    "Disk",
    "DiskOptions",
    "FlatOptions",
    "Frame",
    "GuestMemory",
    "GuestMemoryError",
    "GuestQueue",
    "HandOverUnknownError",
    "Host",
    "ImageError",
    "InterruptLine",
    "KvmError",
    "KvmUnavailable",
    "Machine",
    "MachineConfig",
    "MigrationError",
    "Mode",
    "MsrFault",
    "Net",
    "Outcome",
    "OverlayDisk",
    "PauseTimeout",
    "Placement",
    "Port",
    "RawDisk",
    "Rng",
    "SnapshotError",
    "StateError",
    "VcpuError",
    "VirtioBlock",
    "VirtioDevice",
    "Vsock",
    "Wakeup",
    "mmio",
    "msr",
    "pio",
    "plain",
    "receive",
    "restore",
    "virtio",
]
