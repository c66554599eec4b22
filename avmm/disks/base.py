"""What a disk is: the contract between `avmm.devices.virtio.block` and any disk.

    class Remote(avmm.Disk):
        name, size, contents_stay = "remote", 1 << 30, True

        async def read(self, offset, buffers):
            for buffer in buffers:
                buffer[:] = await fetch(offset, len(buffer))
                offset += len(buffer)

A disk without `write` is read-only; say so by `read_only = True`.

**What it is called with.** Offsets and lengths are multiples of 512 and within `size`; they were
checked. `buffers` are views of guest memory itself: fill them or send from them in place, and do
not keep them. Several calls run at the same time, in any order, each in a task of its own; a slow
call delays no other.

**What it raises.** An `OSError` belongs to this one request: the guest gets an I/O error for it,
and a line is logged. Anything else is a bug and ends the machine.

**Cancelling.** Calls are cancelled at a pause or a reset. After a pause they are made again from
their beginning, possibly in another process. A call that was cancelled must no longer touch
`buffers`. A call that cannot stop (say, because a thread is at work) shields itself until it has
finished, and the pause waits for it.

**Saving.** A disk whose contents outlive its process says so by `contents_stay = True`. They are
not part of a machine's state: whoever loads the state provides a disk with the same contents. A
disk whose contents would be lost returns them from `save`. One that does neither cannot be saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from avmm.errors import DeviceError
from avmm.plain import Fields

SECTOR: Final = 512
"""Bytes; the unit of every offset and length (VIRTIO 1.2, 5.2.4)."""
Done: TypeAlias = Callable[[Exception | None], None]
"""Called with the exception that the request raised, or with None."""
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
    """Whether `discard` does anything."""
    contents_stay: bool = False
    """Do the contents outlive this process, so that nothing of them has to be saved? Whoever loads
    the state provides a disk with the same contents."""
    saves_in_thread: bool = False
    """Do `save` and `load` take long? If so, they are called in a worker thread, and must not
    touch anything that belongs to trio. Otherwise they are called in trio's thread."""

    async def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes at `offset`."""
        raise DeviceError(f"{self.name} cannot be read: it lacks read()")

    async def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the bytes of `buffers`, one after the other, at `offset`."""
        raise DeviceError(f"{self.name} cannot be written: it lacks write()")

    async def flush(self) -> None:
        """Return when everything written before is safe from a loss of power."""
        if not self.read_only:
            raise DeviceError(f"{self.name} cannot be flushed: it lacks flush()")

    async def discard(self, offset: int, length: int) -> None:
        """The guest no longer needs these bytes. Reading them may return anything."""

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make these bytes zero. With `unmap` the disk may free their space."""
        while length:
            count = min(length, len(_ZEROES))
            await self.write(offset, [_ZEROES[:count]])
            offset += count
            length -= count

    def read_now(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Do what `read` does, if that needs no waiting, and return True. If this returns False,
        `read` has to be called.

        Small requests try this first. If the disk has the data at hand, they need no task.
        """
        return False

    def write_now(self, offset: int, buffers: Sequence[memoryview]) -> bool:
        """Do what `write` does, if that needs no waiting, and return True. If this returns False,
        `write` has to be called."""
        return False

    def begin_write(self, offset: int, buffers: Sequence[memoryview], done: Done) -> bool:
        """Begin what `write` does, and return True. If this returns False, it has done nothing,
        and `write` has to be called.

        `done` is called exactly once when the write has ended, whatever happens, in any thread.
        The write cannot be cancelled, so a pause waits for it. A disk whose writes end in its own
        threads saves each write the detour through trio. If this method raises an `OSError`,
        `done` is not called.
        """
        return False

    async def release(self) -> None:
        """Let another machine write to the same disk from now on. No other call comes before
        `acquire`.

        Data that was written must be where the other machine sees it. Does nothing if the disk is
        not held.
        """

    async def acquire(self) -> None:
        """Become the only writer. Does nothing if it already is. Raises `ConfigError` if somebody
        else writes to the disk."""

    def save(self) -> Mapping[str, Any]:
        """The contents that would be lost with this process, as plain data. Raises `DeviceError`
        unless it is overridden or `contents_stay` is set."""
        if not self.contents_stay:
            raise DeviceError(
                f"{self.name} cannot be saved: it lacks save(), or contents_stay = True if its "
                "contents outlive this process"
            )
        return _Nothing.plain()

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `save` returned. The input is hostile: raises `DeviceError` if it is not
        such a state."""
        if not self.contents_stay:
            raise DeviceError(f"{self.name} cannot be loaded: it lacks load()")
        _Nothing.read(f"{self.name}'s state", state)
