"""What can go wrong, one type a concern; the text of each is what the user reads."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum


class AvmmError(Exception):
    """The base of every error that avmm raises on purpose."""


class ConfigError(AvmmError, ValueError):
    """What the user asked for cannot be: names the input and what was expected."""


class ImageError(ConfigError):
    """A kernel, initrd or module file cannot be loaded: names the file and the reason."""


class GuestMemoryError(AvmmError, IndexError):
    """A guest-physical range that is not RAM (or not writable) was touched from the host."""


class DeviceError(AvmmError):
    """A device model broke its contract: names the device and the access."""


class RunstateError(AvmmError):
    """A machine cannot do this in the state that it is in. The text says what was asked for, what
    the machine is and what was expected."""

    def __init__(
        self,
        text: str,
        *,
        operation: str = "",
        actual: Enum | None = None,
        needed: Iterable[Enum] = (),
    ) -> None:
        super().__init__(text)
        self.operation = operation
        """What was asked for: "snapshot", "memory", ..."""
        self.actual = actual
        """What the machine was at: an `avmm.Runstate`, or for `save` where the machine does not
        stand still an `avmm.migration.Stand`. None: a control socket has told, by the text alone.
        """
        self.needed = frozenset(needed)
        """The states in which it can be done."""


class VcpuError(AvmmError):
    """A vCPU cannot go on: names the exit, the registers and the instruction's bytes."""


class PauseTimeout(AvmmError, TimeoutError):
    """A machine did not come to a standstill in time: names what it waited for."""


class MsrFault(AvmmError):
    """Raised by a device that stands for MSRs: the guest gets a general protection fault."""


class SnapshotError(AvmmError):
    """A snapshot cannot be written, or is none that can be read: names the file and why."""


class MigrationError(AvmmError):
    """A migration failed: says why, and the guest runs on at its source, or never arrived."""


class ProtocolError(MigrationError):
    """The other side, or the line, said what cannot be."""


class PeerAbortedError(MigrationError):
    """The other side gave up, and said why."""


class HandOverUnknownError(MigrationError):
    """The guest was handed over and no answer came: it stays stopped here until its operator has
    decided (`Machine.settle`)."""


class StateError(AvmmError, ValueError):
    """A saved state cannot be loaded: it is none, or this host lacks what it needs."""
