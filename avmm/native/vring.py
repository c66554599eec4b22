"""The compiled side's split virtqueues: the table of RAM, and one ring (avmm/native/vring.h).

Everything that touches a ring is C: a whole chain is checked and translated in one call, and the
barriers that both sides of a ring rely on are real ones. Nothing here holds the mapping of guest
memory: once the memory is closed, its table is empty and every call on a ring fails.
"""

from __future__ import annotations

from typing import Final

from avmm.native._native import ffi, lib

_WHY: Final[dict[int, str]] = {
    lib.AVMM_VRING_SHAPE: "its size is not a power of two up to 32768, or a part is not aligned",
    lib.AVMM_VRING_PLACE: "it does not lie in RAM",
    lib.AVMM_VRING_AHEAD: "the available index is further ahead than the queue is long",
    lib.AVMM_VRING_INDEX: "a descriptor's number is beyond its table",
    lib.AVMM_VRING_LOOP: "a chain of descriptors goes in a circle",
    lib.AVMM_VRING_OUTSIDE: "a descriptor points outside of RAM",
    lib.AVMM_VRING_ORDER: "a readable descriptor comes after a writable one",
    lib.AVMM_VRING_LENGTH: "a chain of descriptors is longer than 4 GiB",
    lib.AVMM_VRING_PARTS_MAX: "a chain has more than 1024 descriptors",
    lib.AVMM_VRING_INDIRECT: "an indirect descriptor is nested, chained or was not negotiated",
    lib.AVMM_VRING_TABLE: "an indirect table has an invalid length",
}


class QueueError(Exception):
    """The guest broke a rule of a virtqueue. This error never leaves avmm.devices.virtio."""


def _checked(answer: int) -> int:
    if answer < 0:
        raise QueueError(_WHY[-answer])
    return answer


class RamTable:
    """Where RAM is, for C. `GuestMemory` owns it."""

    def __init__(self) -> None:
        self.struct = ffi.new("struct avmm_ram *")

    def add(self, gpa: int, size: int, offset: int, view: memoryview) -> None:
        """Add the RAM at `gpa`, which is `view` and lies at `offset` of RAM as a whole."""
        region = self.struct.regions[self.struct.count]
        region.gpa, region.size, region.offset = gpa, size, offset
        region.host = ffi.cast("uint8_t *", ffi.from_buffer(view))
        self.struct.count += 1

    def log(self, bitmap: bytearray | None) -> None:
        """From now on, mark in `bitmap` the pages that rings and devices write; it has one bit for
        each page of RAM. None stops that."""
        self._bitmap = bitmap
        words = ffi.cast("uint64_t *", 0 if bitmap is None else ffi.from_buffer(bitmap))
        lib.avmm_ram_log(self.struct, words)

    def watch(self, watcher: int, watching: int) -> None:
        """Call the C function at the address `watcher` whenever the host has written to RAM, with
        `watching`, where, and how many bytes. 0 stops that."""
        lib.avmm_ram_watch(self.struct, watcher, watching)

    def wrote(self, offset: int, length: int) -> None:
        """The host has written these bytes of RAM as a whole. Any thread."""
        lib.avmm_ram_wrote(self.struct, offset, length)

    def clear(self) -> None:
        """Say that there is no RAM from now on."""
        self.struct.count = 0
        self.log(None)


class SplitRing:
    """One ring. Raises `QueueError` if the guest broke a rule."""

    def __init__(
        self,
        ram: RamTable,
        size: int,
        desc: int,
        driver: int,
        device: int,
        *,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        self._ram = ram
        self.struct = ffi.new(
            "struct avmm_vring *",
            {"ram": ram.struct, "desc": desc, "avail": driver, "used": device, "size": size},
        )
        self.struct.event_idx, self.struct.indirect = event_idx, indirect
        _checked(lib.avmm_vring_check(self.struct))
        self.parts = memoryview(ffi.buffer(self.struct.parts)).cast("B").cast("Q")
        """(offset in RAM as a whole, length) of each part of the chain walked last."""

    def pop(self) -> bool:
        """Walk the next chain. Returns False if there is none."""
        return _checked(lib.avmm_vring_pop(self.struct)) > 0

    def walk(self, head: int) -> None:
        """Walk the chain of descriptor `head` (once more)."""
        _checked(lib.avmm_vring_walk(self.struct, head))

    def mark(self, head: int) -> None:
        """The writable parts of this chain may have been written: mark them in the log, if there
        is one."""
        lib.avmm_vring_mark(self.struct, head)

    def push(self, head: int, written: int, more: bool = False) -> None:
        """Return the chain to the guest. With `more` the guest sees it only together with the next
        one."""
        _checked(lib.avmm_vring_push(self.struct, head, written, more))

    def wants_interrupt(self) -> bool:
        """Should the guest be interrupted for the chains that were pushed since the last call?"""
        return _checked(lib.avmm_vring_wants_interrupt(self.struct)) > 0

    def listen(self, wanted: bool) -> bool:
        """Ask the guest to notify, or not to. Returns whether there is already a chain."""
        return _checked(lib.avmm_vring_listen(self.struct, wanted)) > 0

    def send(self, fd: int, is_socket: bool, most: int) -> tuple[int, bool]:
        """Write the readable bytes of chains to `fd`, and give the chains back to the guest.
        Returns how many chains that were. Stops when there are no more chains or after about
        `most` bytes. The second result is True if it stopped because `fd` accepts no more at once;
        only `sent` bytes of the last chain were written then."""
        before = self.struct.next_used
        is_cut = _checked(lib.avmm_vring_send(self.struct, fd, is_socket, most)) > 0
        return self.struct.next_used - before & 0xFFFF, is_cut
