"""Guest RAM: one memfd, mapped once, cut into memory slots.

RAM starts at guest-physical address (GPA) 0. On a PC the addresses just below 4 GiB belong
to devices (LAPIC, IOAPIC, firmware, MMIO), so RAM that would reach past `HOLE_START` goes on
at 4 GiB. Every region is a window into the same file, which is what lets a snapshot map it
back and another process share it.

The host's view of RAM is a `memoryview` of the mapping: no copies, and every range is checked
against the regions first, because addresses mostly come from the guest.
"""

from __future__ import annotations

import mmap
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from avmm.errors import ConfigError, GuestMemoryError
from avmm.vring import RamTable

PAGE: Final = 4096
HOLE_START: Final = 0xC000_0000
"""First GPA of the hole below 4 GiB in which RAM never lies."""
HOLE_END: Final = 0x1_0000_0000
"""First GPA after the hole: RAM that did not fit below goes on here."""

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d{1,20})\s*([KMGT]?)(?:I?B)?\s*", re.IGNORECASE | re.ASCII)


def parse_size(size: int | str) -> int:
    """Bytes meant by a size as people write it: `67108864`, `"64M"`, `"64MiB"`, `"1g"`.

    Units are powers of 1024. Raises `ConfigError` naming the text that is no size.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ConfigError(f"{size!r} is no size: expected a number with K, M, G or T, like '64M'")
    return int(match[1]) * _UNITS[match[2].upper()]


@dataclass(frozen=True, slots=True)
class Region:
    """A run of guest-physical addresses backed by the file from `offset` on."""

    gpa: int
    size: int
    offset: int
    readonly: bool = False

    @property
    def end(self) -> int:
        return self.gpa + self.size


class GuestMemory:
    """The RAM of one guest (and any read-only regions laid beside it).

    `size` is in bytes or as in `parse_size`; it must be a positive multiple of the page size
    and no more than the host's own memory, else `ConfigError`.
    """

    def __init__(self, size: int | str) -> None:
        size = parse_size(size)
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size <= 0 or size % PAGE:
            raise ConfigError(f"memory of {size} bytes: expected a positive multiple of {PAGE}")
        if size > host:
            raise ConfigError(f"memory of {size >> 20} MiB: this host has {host >> 20} MiB in all")
        self.size = size
        self.fd = os.memfd_create("avmm-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size)
            self._maps = [mmap.mmap(self.fd, size)]
        except BaseException:
            os.close(self.fd)
            raise
        low = min(size, HOLE_START)
        self._regions = [Region(0, low, 0)]
        if size > low:
            self._regions.append(Region(HOLE_END, size - low, low))
        whole = memoryview(self._maps[0])
        self._views = [whole[r.offset : r.offset + r.size] for r in self._regions]
        self.whole = whole
        """RAM without its hole, one region after the other; offsets are `Region.offset`."""
        self.table = RamTable()
        """Where RAM is, for rings (`avmm.vring`); empty once the memory is closed."""
        for region, view in zip(self._regions, self._views, strict=True):
            self.table.add(region.gpa, region.size, region.offset, view)
        self._closed = False

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions, RAM first; their index is their memory slot's number."""
        return tuple(self._regions)

    @property
    def ram(self) -> tuple[Region, ...]:
        """The regions that are RAM, by ascending GPA."""
        return tuple(r for r in self._regions if not r.readonly)

    def add_readonly(self, gpa: int, data: bytes) -> Region:
        """Lay `data` at `gpa` where the guest can read and run but not write it.

        A guest's write to it leaves the guest as an MMIO exit. The region is rounded up to
        whole pages. Raises `ConfigError` where it is not page-aligned or overlaps a region.
        Call it before the memory is given to a VM.
        """
        size = -(-len(data) // PAGE) * PAGE
        if self._closed or gpa < 0 or gpa % PAGE or not data:
            raise ConfigError(f"read-only region at {gpa:#x}: expected a page-aligned, filled one")
        for other in self._regions:
            if gpa < other.end and other.gpa < gpa + size:
                raise ConfigError(
                    f"read-only region {gpa:#x}-{gpa + size:#x} overlaps memory at "
                    f"{other.gpa:#x}-{other.end:#x}"
                )
        offset = os.fstat(self.fd).st_size
        os.ftruncate(self.fd, offset + size)
        mapping = mmap.mmap(self.fd, size, offset=offset)
        mapping[: len(data)] = data
        region = Region(gpa, size, offset, readonly=True)
        self._maps.append(mapping)
        self._regions.append(region)
        self._views.append(memoryview(mapping).toreadonly())
        return region

    def view(self, gpa: int, length: int) -> memoryview:
        """The `length` bytes at `gpa`, without a copy; writable where the guest may write.

        Raises `GuestMemoryError` unless the whole range lies in one region. A view that is
        kept after the machine has ended keeps the mapping (not the guest) alive.
        """
        if length >= 0:
            for region, view in zip(self._regions, self._views, strict=True):
                start = gpa - region.gpa
                if start >= 0 and start + length <= region.size:
                    return view[start : start + length]
        raise GuestMemoryError(f"{length} bytes at {gpa:#x} are not within guest memory")

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of the `length` bytes at `gpa`; raises as `view` does."""
        with self.view(gpa, length) as view:
            return bytes(view)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `gpa`; raises as `view` does, and where the region is read-only."""
        with self.view(gpa, len(data)) as view:
            if view.readonly:
                raise GuestMemoryError(f"{len(data)} bytes at {gpa:#x} are read-only")
            view[:] = data

    def discard(self, gpa: int, length: int) -> None:
        """Give the pages of RAM at `gpa` back to the host: they read as zeros then, to
        everybody. Raises `GuestMemoryError` where they are no whole pages of RAM."""
        if gpa % PAGE == 0 == length % PAGE and length > 0:
            for region in self.ram:
                if region.gpa <= gpa and gpa + length <= region.end:
                    # Of a shared mapping: it frees the file's pages, not the mapping's alone.
                    at = gpa - region.gpa + region.offset
                    self._maps[0].madvise(mmap.MADV_REMOVE, at, length)
                    return
        raise GuestMemoryError(f"{length} bytes at {gpa:#x} are no whole pages of RAM")

    def contents(self) -> Iterator[tuple[int, bytes]]:
        """What RAM holds, as (GPA, bytes) runs; what was never touched, and is zero, is left out.

        Only meaningful while nothing writes it.
        """
        for region in self.ram:
            at = region.offset
            while True:
                try:
                    start = os.lseek(self.fd, at, os.SEEK_DATA)
                except OSError:  # ENXIO: only a hole from here on
                    break
                if start >= region.offset + region.size:
                    break
                at = min(os.lseek(self.fd, start, os.SEEK_HOLE), region.offset + region.size)
                gpa = region.gpa + start - region.offset
                yield gpa, self.read(gpa, at - start)

    def addresses(self) -> list[tuple[Region, memoryview]]:
        """Each region with the mapping that backs it, for the VM's memory slots."""
        return list(zip(self._regions, self._views, strict=True))

    def close(self) -> None:
        """Unmap and close; idempotent. Views still held by others keep their mapping alive."""
        if self._closed:
            return
        self._closed = True
        self.table.clear()
        self.whole.release()
        for view in self._views:
            view.release()
        self._views = []
        self._regions = []
        os.close(self.fd)
        outlived = [mapping for mapping in self._maps if not _closed(mapping)]
        self._maps = []
        if outlived:
            warnings.warn(
                "a view of guest memory outlives its machine and keeps the memory mapped",
                ResourceWarning,
                stacklevel=2,
            )


def _closed(mapping: mmap.mmap) -> bool:
    """Unmap it, unless somebody still holds a view of it."""
    try:
        mapping.close()
    except BufferError:
        return False
    return True
