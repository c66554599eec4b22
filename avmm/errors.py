"""What can go wrong: one type of error for each concern. Users read the text of each error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum


class AvmmError(Exception):
    """The base of every error that avmm raises on purpose."""


class ConfigError(AvmmError, ValueError):
    """The user asked for something impossible. The text names the input and says what was
    expected.
    """


class EngineUnavailable(AvmmError):
    """The software engine cannot be used here. The text says why, and what to install."""


class ImageError(ConfigError):
    """A kernel, initrd or module file cannot be loaded: names the file and the reason."""


class GuestMemoryError(AvmmError, IndexError):
    """The host tried to access a guest-physical range that is not RAM, or to write to one that is
    read-only.
    """


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
    """Raised by a device that answers for MSRs. The guest gets a general protection fault."""


class SnapshotError(AvmmError):
    """A snapshot cannot be written, or a file cannot be read as a snapshot. The text names the
    file and the reason.
    """


class MigrationError(AvmmError):
    """A migration failed. The text says why. At the source, the guest runs on; at the destination,
    it has not arrived.
    """


class ProtocolError(MigrationError):
    """The other side of a migration sent something that the protocol does not allow, or the line
    damaged it.
    """


class PeerAbortedError(MigrationError):
    """The other side gave up, and said why."""


class HandOverUnknownError(MigrationError):
    """The guest was handed over and no answer came. It stays stopped here until its operator
    decides where it runs (`Machine.settle`).
    """


class StateError(AvmmError, ValueError):
    """A saved state cannot be loaded: it is not a valid state, or this host lacks something that
    it needs.
    """


@contextmanager
def host_errors(what: str) -> Iterator[None]:
    """Turn an `OSError` of the block into an `AvmmError` that begins with `what`: the host lacks
    descriptors, memory, threads or room, or does not permit something."""
    try:
        yield
    except AvmmError:
        raise
    except OSError as error:
        raise AvmmError(f"{what}: {error.strerror or error}{_named(error)}") from error


def _named(error: OSError) -> str:
    return f": {error.filename}" if error.filename else ""
