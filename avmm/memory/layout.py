"""Where RAM lies in a guest's physical address space: data that an architecture gives."""

from __future__ import annotations

from typing import NamedTuple


class Region(NamedTuple):
    """A run of guest-physical addresses; `offset` is where it begins in RAM without its hole."""

    gpa: int
    size: int
    offset: int
    readonly: bool = False

    @property
    def end(self) -> int:
        return self.gpa + self.size


class RamLayout(NamedTuple):
    """RAM starts at GPA `start`. Where it would reach past `hole_start`, it goes on at
    `hole_end`: the addresses between belong to devices. `limit` is the first GPA at which no
    guest of this kind has memory. All are multiples of the page size."""

    start: int = 0
    hole_start: int = 1 << 52
    hole_end: int = 1 << 52
    limit: int = 1 << 52

    def regions(self, size: int) -> list[Region]:
        """The regions that `size` bytes of RAM take, by ascending address."""
        low = min(size, self.hole_start - self.start)
        regions = [Region(self.start, low, 0)]
        if size > low:
            regions.append(Region(self.hole_end, size - low, low))
        return regions

    def above_hole(self, size: int) -> int:
        """How many of `size` bytes of RAM lie behind the hole."""
        return size - min(size, self.hole_start - self.start)
