"""What a disk is to `avmm.devices.virtio.block`, whoever wrote it.

    class Remote(avmm.Disk):
        name, size = "remote", 1 << 30

        async def read(self, offset, buffers):
            for buffer in buffers:
                buffer[:] = await fetch(offset, len(buffer))
                offset += len(buffer)

A disk without `write` is read-only; say so by `read_only = True`.

**What it is called with.** Offsets and lengths are multiples of 512 and within `size`; they were
checked. `buffers` are views of guest memory itself: fill them or send them where they are, and
keep none of them. Several calls run at the same time, in any order, each in a task of its own; a
call that takes long keeps nobody else waiting.

**What it raises.** An `OSError` is this one request's: the guest gets an I/O error for it, and a
line is logged. Anything else is a bug and ends the machine.

**Cancelling.** At a pause or reset calls are cancelled, and after a pause made again from their
beginning, maybe in another process. A call that was cancelled must not touch `buffers` any more:
one that cannot stop (a thread, say) shields itself until it has finished, and the pause waits.

**Saving.** What a disk holds is not part of a machine's state: who loads that brings a disk with
the same contents. One whose contents die with its process puts them into `save`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from avmm.errors import DeviceError
from avmm.plain import Fields

SECTOR: Final = 512
"""Bytes; the unit of every offset and length (VIRTIO 1.2, 5.2.4)."""
Done: TypeAlias = Callable[[Exception | None], None]
"""Called with what the request raised, or None."""
_ZEROES: Final = memoryview(bytes(64 * 1024))


class _Nothing(Fields, version=1, error=DeviceError):
    """The state of a disk whose contents outlive its process."""


class Disk:
    """A disk. Subclass it, override what it can do; see the top of this file."""

    name: str = "disk"
    """What messages call it."""
    size: int = 0
    """In bytes, a multiple of 512; does not change."""
    read_only: bool = False
    can_discard: bool = False
    """Whether `discard` is worth being called."""
    saves_in_thread: bool = False
    """Do `save` and `load` take long? Then they are called in a worker thread, and must not touch
    what belongs to trio; else in trio's thread."""

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with what is at `offset`."""
        raise DeviceError(f"{self.name} cannot be read: it lacks read()")

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Put what is in `buffers`, one after the other, at `offset`."""
        raise DeviceError(f"{self.name} cannot be written: it lacks write()")

    async def flush(self) -> None:
        """Return when all that was written before is where no loss of power takes it away."""
        if not self.read_only:
            raise DeviceError(f"{self.name} cannot be flushed: it lacks flush()")

    async def discard(self, offset: int, length: int) -> None:
        """The guest does not need these bytes any more; reading them may give anything."""

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Let these bytes be zero; with `unmap` their room may be given back."""
        while length:
            count = min(length, len(_ZEROES))
            await self.write(offset, [_ZEROES[:count]])
            offset += count
            length -= count

    def read_now(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Do what `read` does, if it can be done without waiting; False: call `read`.

        Small requests ask this first: a disk that has the data at hand saves them a task.
        """
        return False

    def write_now(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Do what `write` does, if it can be done without waiting; False: call `write`."""
        return False

    def begin_write(self, offset: int, buffers: Sequence[memoryview], done: Done) -> bool:
        """Begin what `write` does and return True, or do nothing and return False: call `write`.

        `done` is called when it has ended, once and whatever happens, in whichever thread: it
        cannot be cancelled, so a pause waits for it. A disk whose writes end in threads of its
        own saves each the way back to trio. Where an `OSError` is raised `done` is not called.
        """
        return False

    async def release(self) -> None:
        """Let another machine write the same disk from now on: no call comes before `acquire`.

        What was written must be where the other sees it. Does nothing where it is not held.
        """

    async def acquire(self) -> None:
        """Be the one that writes it; does nothing where it is. Raises `ConfigError` where somebody
        else does."""

    def save(self) -> Mapping[str, Any]:
        """What of its contents would be lost with this process, as plain data."""
        return _Nothing.plain()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `save` gave: hostile input. Raises `DeviceError` where it is none."""
        _Nothing.read(f"{self.name}'s state", state)
