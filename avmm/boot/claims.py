"""The claims: what gets which range of guest memory while a guest is put together.

A guest's image says where it wants to be; avmm's own tables have fixed places; initrd and modules
go wherever there is room. Each claims its range here before anything is written. If two ranges
overlap, the second claim fails and names both.

When all claims are made, the same record tells the guest what it may use: `memory_map` returns it
in terms of the e820 interface, which PVH, multiboot and Linux's zero page all use.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from avmm.errors import ImageError
from avmm.memory.layout import Region
from avmm.memory.pages import PAGE


class MapKind(IntEnum):
    """The kind of a range, with its number in e820 (ACPI 6.5, 15.1), which is the same in PVH and
    multiboot.
    """

    RAM = 1
    RESERVED = 2


@dataclass(frozen=True, slots=True)
class MapEntry:
    """One range of the guest's memory map."""

    gpa: int
    size: int
    kind: MapKind

    @property
    def end(self) -> int:
        return self.gpa + self.size


@dataclass(frozen=True, slots=True)
class _Claim:
    gpa: int
    end: int
    what: str
    reserved: bool

    def __str__(self) -> str:
        return f"{self.what} at {self.gpa:#x}-{self.end:#x}"


_Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rules:
    """Rules for all guests of a board. A span is (first GPA, first GPA after it)."""

    reserved: tuple[_Span, ...] = ()
    """Reported as reserved, even if nothing is claimed there."""
    never_ram: _Span = (0, 0)
    """Never reported as RAM, even if RAM backs it."""
    lowest: int = 0
    """Nothing is placed below it (`Claims.place`)."""
    limit: int = 1 << 52
    """Everything that is placed ends at or below it, unless the caller gives a lower limit."""


def _merged(spans: Iterable[_Span]) -> list[_Span]:
    """The same addresses as sorted spans that neither overlap nor touch."""
    merged: list[_Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _without(span: _Span, holes: Iterable[_Span]) -> list[_Span]:
    """What is left of `span` without `holes`, which must be in the form that `_merged` returns."""
    left: list[_Span] = []
    at, end = span
    for hole_start, hole_end in holes:
        if hole_end <= at or end <= hole_start:
            continue
        if at < hole_start:
            left.append((at, hole_start))
        at = hole_end
    if at < end:
        left.append((at, end))
    return left


class Claims:
    """The ranges of `ram` that are taken, each with the name of what lies there."""

    def __init__(self, ram: Sequence[Region], rules: Rules) -> None:
        self._rules = rules
        self._ram: list[_Span] = [(region.gpa, region.end) for region in ram]
        self._claims: list[_Claim] = []  # by address; no two overlap

    def claim(self, gpa: int, size: int, what: str, *, reserved: bool = False) -> None:
        """Take `size` bytes at `gpa` for `what`. If `reserved`, the guest is told that they are
        reserved.

        Raises `ImageError` if some of the bytes are not RAM or are taken already. Since the error
        contains `what`, that should name the file. An empty range claims nothing and is never
        refused.
        """
        if size == 0:
            return
        claim = _Claim(gpa, gpa + size, what, reserved)
        if not any(lo <= gpa and claim.end <= hi for lo, hi in self._ram):
            ram = ", ".join(f"{lo:#x}-{hi:#x}" for lo, hi in self._ram)
            raise ImageError(f"{claim} lies outside guest RAM ({ram})")
        at = bisect(self._claims, gpa, key=lambda other: other.gpa)
        for other in self._claims[max(at - 1, 0) : at + 1]:
            if gpa < other.end and other.gpa < claim.end:
                raise ImageError(f"{claim} overlaps {other}")
        self._claims.insert(at, claim)

    def is_free(self, gpa: int, size: int) -> bool:
        """Is this range RAM of which nobody has claimed any byte?"""
        end = gpa + size
        return any(lo <= gpa and end <= hi for lo, hi in self._ram) and not any(
            gpa < claim.end and claim.gpa < end for claim in self._claims
        )

    def place(self, size: int, what: str, *, limit: int | None = None) -> int:
        """Claim the highest page-aligned room for `size` bytes below `limit`; return its GPA.

        Raises `ImageError`, which gives the size of the biggest free range, if none is big enough.
        """
        limit = self._rules.limit if limit is None else min(limit, self._rules.limit)
        taken = [(0, self._rules.lowest), *((claim.gpa, claim.end) for claim in self._claims)]
        biggest = 0
        for lo, hi in reversed(self._ram):
            for start, end in reversed(_without((lo, min(hi, limit)), _merged(taken))):
                first = -(-start // PAGE) * PAGE
                biggest = max(biggest, end - first)
                gpa = (end - size) // PAGE * PAGE
                if first <= gpa:
                    self.claim(gpa, size, what)
                    return gpa
        raise ImageError(
            f"{what} has {size} bytes, for which there is no room in guest RAM below "
            f"{limit:#x}: the biggest free range has {biggest} bytes"
        )

    def memory_map(self) -> list[MapEntry]:
        """The ranges of RAM and the reserved ranges: in order of address, without overlaps, and as
        few as possible.
        """
        reserved = _merged(
            [*self._rules.reserved, *((c.gpa, c.end) for c in self._claims if c.reserved)]
        )
        holes = _merged([*reserved, self._rules.never_ram])
        spans = [(span, MapKind.RESERVED) for span in reserved]
        spans += [(left, MapKind.RAM) for ram in self._ram for left in _without(ram, holes)]
        return [MapEntry(lo, hi - lo, kind) for (lo, hi), kind in sorted(spans)]
