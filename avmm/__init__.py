"""avmm: an async, event-driven micro-VMM. Small KVM guests inside a trio program."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from avmm import plain
from avmm.arrivals import receive, restore
from avmm.boot import FlatOptions, Mode
from avmm.bus.space import Placement, mmio, msr, pio
from avmm.clones import Fork
from avmm.config import HostSettings, MachineConfig, Settings
from avmm.devices.base import Device, Doorbell, Host, InterruptLine, Wakeup
from avmm.devices.console import ConsoleStream
from avmm.devices.registers import CollectedWrites, Register, Registers
from avmm.devices.state import DeviceState
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.device import GuestQueue, VirtioDevice, VirtioLink
from avmm.devices.virtio.frame import Backend, Frame
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.port import Port
from avmm.devices.virtio.queue import Chain
from avmm.devices.virtio.rng import Rng
from avmm.devices.virtio.vsock import Vsock, VsockListener
from avmm.devices.virtio.vsock_stream import VsockStream
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
    PeerAbortedError,
    ProtocolError,
    RunstateError,
    SnapshotError,
    StateError,
    VcpuError,
)
from avmm.kvm import KvmError, KvmUnavailable
from avmm.machine import Machine
from avmm.memory.ram import GuestMemory
from avmm.options import NetOptions, VsockOptions
from avmm.outcome import Cause, Outcome
from avmm.parts.description import Described
from avmm.parts.placing import Unplaced, virtio
from avmm.runstate import Runstate
from avmm.vcpu.calls import Answer, Call, CallHandler

if TYPE_CHECKING:
    from avmm.progress import MigrationProgress, Report, SnapshotProgress
    from avmm.scrollback import Scrollback
    from avmm.transfer.tls import Tls
    from avmm.transfer.transports import Listener, connect, listen
else:  # type checkers would believe that it has an answer to every name

    def __getattr__(name: str) -> object:
        """Names that many programs never use: their modules are imported when they do."""
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(_LATER[name]), name)
        return value


_LATER = {
    "Listener": "avmm.transfer.transports",
    "MigrationProgress": "avmm.progress",
    "Report": "avmm.progress",
    "Scrollback": "avmm.scrollback",
    "SnapshotProgress": "avmm.progress",
    "Tls": "avmm.transfer.tls",
    "connect": "avmm.transfer.transports",
    "listen": "avmm.transfer.transports",
}

__all__ = [
    "Answer",
    "AvmmError",
    "Backend",
    "Balloon",
    "Call",
    "CallHandler",
    "Cause",
    "Chain",
    "CollectedWrites",
    "ConfigError",
    "Console",
    "ConsoleStream",
    "Described",
    "Device",
    "DeviceError",
    "DeviceState",
    "Disk",
    "DiskOptions",
    "Doorbell",
    "FlatOptions",
    "Fork",
    "Frame",
    "GuestMemory",
    "GuestMemoryError",
    "GuestQueue",
    "HandOverUnknownError",
    "Host",
    "HostSettings",
    "ImageError",
    "InterruptLine",
    "KvmError",
    "KvmUnavailable",
    "Listener",
    "Machine",
    "MachineConfig",
    "MigrationError",
    "MigrationProgress",
    "Mode",
    "MsrFault",
    "Net",
    "NetOptions",
    "Outcome",
    "OverlayDisk",
    "PauseTimeout",
    "PeerAbortedError",
    "Placement",
    "Port",
    "ProtocolError",
    "RawDisk",
    "Register",
    "Registers",
    "Report",
    "Rng",
    "Runstate",
    "RunstateError",
    "Scrollback",
    "Settings",
    "SnapshotError",
    "SnapshotProgress",
    "StateError",
    "Tls",
    "Unplaced",
    "VcpuError",
    "VirtioBlock",
    "VirtioDevice",
    "VirtioLink",
    "Vsock",
    "VsockListener",
    "VsockOptions",
    "VsockStream",
    "Wakeup",
    "connect",
    "listen",
    "mmio",
    "msr",
    "pio",
    "plain",
    "receive",
    "restore",
    "virtio",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
