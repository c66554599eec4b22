"""Guest RAM: one file, mapped once, cut into memory slots.

The architecture decides at which guest-physical addresses (GPAs) RAM lies (`RamLayout`). Each
region of RAM is a window into the same file.

The host's view of RAM is a `memoryview` of the mapping: no copies, and every range is checked
against the regions first, because addresses mostly come from the guest.

**Shared or copy-on-write.** Fresh RAM is a memfd that is mapped shared. RAM that begins with the
contents of a file (a snapshot, or another guest's RAM at the moment of a `fork`) is mapped
privately: a page is read from the file when it is first touched and copied when it is first
written, so neither costs anything before. The contents of the file must not change meanwhile. A
guest that is forked goes on with a private mapping of its own memfd, at the same addresses, so
KVM, rings and views know nothing of it. Pages that it has written since an earlier fork belong to
it alone. At the next fork they become a layer over the file (`avmm.memory.layers`), which both
map; scattered pages are copied instead.

**Dirty pages.** Between `log` and `unlog` the host's writes are noted page by page: those of
`write`, `discard` and of rings and their chains. KVM logs the guest's own (`avmm.memory.dirty`). A
write through a `view` that was kept is not noticed, so call `mark` after it.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

from avmm.errors import ConfigError, GuestMemoryError
from avmm.forks import closed_in_child
from avmm.memory.layers import Layers, write_pages
from avmm.memory.layout import RamLayout, Region
from avmm.memory.pages import COPY_ON_WRITE, PAGE, Bitmap, address, own_pages, remap_private
from avmm.native.vring import RamTable
from avmm.options import meant_by, parse_size

_SCATTERED: Final = 4
"""A fork copies at most one in this many pages, in scattered pieces, for itself alone ..."""
_FEW: Final = 256
"""... or up to this many pages."""
_MOST_READONLY: Final = 256
"""Regions; KVM has room for twice as many, and a hostile description may have any number."""


def memory_size(size: int | str, what: str = "memory") -> int:
    """The number of bytes that `size` means (`parse_size`), if RAM can have that size.

    Raises `ConfigError`, which begins with `what`, unless it is a positive multiple of the page
    size.
    """
    number = parse_size(size, what)
    if number <= 0 or number % PAGE:
        raise ConfigError(
            f"{what} {size!r}: expected a positive multiple of {PAGE} bytes"
            f"{meant_by(number, PAGE)}"
        )
    return number


def check_size(size: int | str) -> int:
    """The number of bytes that `size` means, if a guest on this host can have that much memory.

    Raises `ConfigError` as `memory_size` does, and for more than the host's own memory.
    """
    size = memory_size(size)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > host:
        raise ConfigError(f"memory of {size >> 20} MiB: this host has {host >> 20} MiB in all")
    return size


class GuestMemory:
    """The RAM of one guest (and any read-only regions laid beside it).

    `size` is in bytes or as in `parse_size`; it must be a positive multiple of the page size and
    no more than the host's own memory, else `ConfigError`. Without `base`, RAM is zero at first.
    With `base` (a descriptor, and a page-aligned offset in its file) it has the contents of that
    file, copy-on-write, overlaid with `layers`. The `GuestMemory` closes the layers. `layout` says
    at which addresses the guest finds RAM; by default it is one piece that begins at 0.
    """

    def __init__(
        self,
        size: int | str,
        *,
        base: tuple[int, int] | None = None,
        layers: Layers | None = None,
        layout: RamLayout | None = None,
    ) -> None:
        self.size = size = check_size(size)
        self.layout = layout = layout or RamLayout()
        self.is_private = base is not None
        """Is RAM mapped privately, so that pages are copied from a file when they are written?"""
        if base is None:
            fd, self._base = os.memfd_create("avmm-ram", os.MFD_CLOEXEC), 0
        else:
            fd, self._base = os.dup(base[0]), base[1]
        self.fd = fd
        try:
            if base is None:
                os.ftruncate(fd, size)
            flags = mmap.MAP_SHARED if base is None else COPY_ON_WRITE
            self._maps = [mmap.mmap(fd, size, flags=flags, offset=self._base)]
            self._layers = layers or Layers(size)
            with memoryview(self._maps[0]) as ram:
                self._layers.map_over(ram)
        except BaseException:
            os.close(fd)
            raise
        self._regions = layout.regions(size)
        whole = memoryview(self._maps[0])
        self._views = [whole[r.offset : r.offset + r.size] for r in self._regions]
        self.whole = whole
        """RAM without its hole, one region after the other; offsets are `Region.offset`."""
        self.table = RamTable()
        """Where RAM is, for rings (`avmm.native.vring`); empty once the memory is closed."""
        for region, view in zip(self._regions, self._views, strict=True):
            self.table.add(region.gpa, region.size, region.offset, view)
        self._dirty: Bitmap | None = None
        """Never removed once it exists, because threads may still be marking pages in it."""
        self._is_logged = False
        self._is_watched = False
        self._forking = threading.Lock()
        """Protects where pages are: their files, the layers, and which pages are private."""
        self._closed = False
        closed_in_child(self, GuestMemory._let_go)

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions, RAM first; their index is their memory slot's number."""
        return tuple(self._regions)

    @property
    def ram(self) -> tuple[Region, ...]:
        """The regions that are RAM, by ascending GPA."""
        return tuple(r for r in self._regions if not r.readonly)

    @property
    def missing(self) -> str:
        """In words: what of RAM the host can no longer provide. Empty if it is all there. Looks at
        the size of the file that RAM is mapped from."""
        if not self.is_private or self._closed:
            return ""
        there = os.fstat(self.fd).st_size
        if there >= self._base + self.size:
            return ""
        return (
            f"the file that it is mapped from has {there} bytes, expected "
            f"{self._base + self.size}: it was cut off after the guest was restored"
        )

    def add_readonly(self, gpa: int, data: bytes) -> Region:
        """Put `data` at `gpa`, where the guest can read and execute but not write it.

        A guest's write to it leaves the guest as an MMIO exit. The region is rounded up to whole
        pages. Raises `ConfigError` if it is not page-aligned, overlaps another region, lies where
        no guest has memory, or if there are too many regions. Call it before the memory is given
        to a VM.
        """
        size = -(-len(data) // PAGE) * PAGE
        if self._closed or gpa < 0 or gpa % PAGE or not data:
            raise ConfigError(
                f"read-only region at {gpa:#x}: expected a page-aligned address and some data"
            )
        if gpa + size > self.layout.limit:
            raise ConfigError(
                f"read-only region {gpa:#x}-{gpa + size:#x}: expected one below "
                f"{self.layout.limit:#x}"
            )
        if sum(other.readonly for other in self._regions) == _MOST_READONLY:
            raise ConfigError(
                f"read-only region at {gpa:#x}: there are already {_MOST_READONLY}, which is "
                "the most possible"
            )
        for other in self._regions:
            if gpa < other.end and other.gpa < gpa + size:
                raise ConfigError(
                    f"read-only region {gpa:#x}-{gpa + size:#x} overlaps memory at "
                    f"{other.gpa:#x}-{other.end:#x}"
                )
        mapping = mmap.mmap(-1, size)
        mapping[: len(data)] = data
        region = Region(gpa, size, 0, readonly=True)
        self._maps.append(mapping)
        self._regions.append(region)
        self._views.append(memoryview(mapping).toreadonly())
        return region

    def view(self, gpa: int, length: int) -> memoryview:
        """The `length` bytes at `gpa`, without a copy. It is writable if the guest may write
        there.

        Raises `GuestMemoryError` unless the whole range lies in one region. A view that is
        kept after the machine has ended keeps the mapping (not the guest) alive.
        """
        if length >= 0:
            for region, view in zip(self._regions, self._views, strict=True):
                start = gpa - region.gpa
                if start >= 0 and start + length <= region.size:
                    return view[start : start + length]
        if self._closed:
            raise GuestMemoryError("this guest memory is closed, because its machine was left")
        raise GuestMemoryError(f"{length} bytes at {gpa:#x} are not within guest memory")

    def read(self, gpa: int, length: int) -> bytes:
        """A copy of the `length` bytes at `gpa`; raises as `view` does."""
        with self.view(gpa, length) as view:
            return bytes(view)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `gpa`. Raises as `view` does, and if the region is read-only."""
        with self.view(gpa, len(data)) as view:
            if view.readonly:
                raise GuestMemoryError(f"{len(data)} bytes at {gpa:#x} are read-only")
            view[:] = data
        self.mark(gpa, len(data))

    def discard(self, gpa: int, length: int) -> None:
        """Give the pages of RAM at `gpa` back to the host. Their contents are lost.

        Afterwards they read as zeros. In copy-on-write RAM they read as something that the guest
        had there earlier. Raises `GuestMemoryError` unless they are whole pages of RAM.
        """
        at = self._offset(gpa, length)
        if at is None or gpa % PAGE or length % PAGE:
            raise GuestMemoryError(f"{length} bytes at {gpa:#x} are not whole pages of RAM")
        self._discard(at, length)

    def discard_view(self, view: memoryview) -> None:
        """`discard` of the whole pages in a view of RAM, if it has any."""
        at = address(view) - address(self.whole)
        start, end = -(-at // PAGE) * PAGE, (at + len(view)) // PAGE * PAGE
        if start < end:
            self._discard(start, end - start)

    def _discard(self, at: int, length: int) -> None:
        # For a shared mapping the pages of the file must be freed, not only those of the mapping.
        advice = mmap.MADV_DONTNEED if self.is_private else mmap.MADV_REMOVE
        self._maps[0].madvise(advice, at, length)
        self.table.wrote(at, length)

    def _offset(self, gpa: int, length: int) -> int | None:
        """The offset of these bytes in RAM without its hole. None if some of them are not RAM."""
        for region in self.ram:
            if length > 0 and region.gpa <= gpa and gpa + length <= region.end:
                return gpa - region.gpa + region.offset
        return None

    # -- dirty pages --------------------------------------------------------------------------

    @property
    def is_logged(self) -> bool:
        """Are pages being noted, that is, between `log` and `unlog`?"""
        return self._is_logged

    def log(self) -> None:
        """Note from now on which pages the host writes; forgets what was noted before."""
        if self._dirty is None:
            self._dirty = Bitmap(self.size // PAGE)
        self._dirty.move_into(Bitmap(self.size // PAGE))
        self._is_logged = True
        self.table.log(self._dirty.data)

    def unlog(self) -> None:
        """Stop noting the pages. Idempotent."""
        self.table.log(None)
        self._is_logged = False

    def mark(self, gpa: int, length: int) -> None:
        """The host has written these bytes of RAM, if it is RAM. Any thread."""
        noted = self._is_logged or self._is_watched
        if noted and (at := self._offset(gpa, length)) is not None:
            self.table.wrote(at, length)

    def watch(self, watcher: int, watching: int) -> None:
        """Call the C function at the address `watcher` whenever the host has written to RAM, with
        `watching`, where, and how many bytes (`RamTable.watch`). 0 stops that. The software engine
        needs it: it has to know when code has changed that the guest has run."""
        self.table.watch(watcher, watching)
        self._is_watched = watcher != 0

    def take_dirty(self, into: Bitmap) -> None:
        """Move what was noted since `log` or the last call into `into`."""
        if self._dirty is not None and self._is_logged:
            self._dirty.move_into(into)

    def populated(self) -> Bitmap:
        """The pages that may hold something other than zeros. For fresh RAM these are all pages
        that were ever touched. Waits for a `fork` in another thread."""
        with self._forking:
            return self._populated()

    def _populated(self) -> Bitmap:
        found = Bitmap(self.size // PAGE)
        at, end = self._base, self._base + self.size
        while at < end:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole from here on
                break
            if start >= end:
                break
            at = min(os.lseek(self.fd, start, os.SEEK_HOLE), end)
            found.mark(start - self._base, at - start)
        if self.is_private:
            self._layers.populate(found)
            own_pages(self.whole, found)
        return found

    # -- copies -------------------------------------------------------------------------------

    def fork(self) -> GuestMemory:
        """A copy-on-write copy of this RAM as it is now. From now on the two change independently.

        Call it only while nothing writes to this RAM, from any thread; concurrent calls run one
        after the other. Read-only regions are not copied. Blocks while it looks through the pages
        and copies what was written since the last `fork`. Raises `OSError` or `KvmError` if the
        host has no room.
        """
        with self._forking:
            left = self._settle()
            with ExitStack() as stack:
                layers = stack.enter_context(self._layers.copy())
                copy = GuestMemory(
                    self.size, base=(self.fd, self._base), layers=layers, layout=self.layout
                )
                stack.pop_all()
            for start, end in left:
                copy.whole[start * PAGE : end * PAGE] = self.whole[start * PAGE : end * PAGE]
        return copy

    def _settle(self) -> list[tuple[int, int]]:
        """Put pages where a fork finds them. Returns the runs that the fork has to copy itself."""
        if not self.is_private:
            remap_private(self.whole, self.fd, self._base)
            self.is_private = True
            return []
        own = Bitmap(self.size // PAGE)
        own_pages(self.whole, own)
        left = self._layers.add(self.whole, own)
        scattered = sum(end - start for start, end in left)
        if scattered > _FEW and scattered * _SCATTERED > len(self._populated()):
            self._flatten()
            return []
        return left

    def _flatten(self) -> None:
        """Start over with a new file that holds all of RAM, because too many pages are too
        scattered."""
        fd = os.memfd_create("avmm-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.size)
            write_pages(self.whole, self._populated(), fd)
            remap_private(self.whole, fd, 0)
        except BaseException:
            os.close(fd)
            raise
        os.close(self.fd)
        self.fd, self._base = fd, 0
        self._layers.close()

    def contents(self) -> Iterator[tuple[int, bytes]]:
        """The contents of RAM, as runs of (GPA, bytes). Pages that were never touched are zero and
        are left out.

        This is meaningful only while nothing writes to RAM.
        """
        runs = list(self.populated().runs())
        for region in self.ram:
            first, last = region.offset // PAGE, (region.offset + region.size) // PAGE
            for run in runs:
                start, end = max(run[0], first), min(run[1], last)
                if start < end:
                    gpa = region.gpa + (start - first) * PAGE
                    yield gpa, self.read(gpa, (end - start) * PAGE)

    def addresses(self) -> list[tuple[Region, memoryview]]:
        """Each region with the mapping that backs it, for the VM's memory slots."""
        return list(zip(self._regions, self._views, strict=True))

    def _let_go(self) -> None:
        """In a forked child: close it. A view that the child got from its parent stays valid."""
        with warnings.catch_warnings(action="ignore"):
            self.close()

    def close(self) -> None:
        """Unmap and close. Idempotent. A view that somebody still holds keeps its mapping
        alive."""
        if self._closed:
            return
        self._closed = True
        self.unlog()
        self.table.clear()
        self.whole.release()
        for view in self._views:
            view.release()
        self._views = []
        self._regions = []
        os.close(self.fd)
        self._layers.close()
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
