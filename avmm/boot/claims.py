"""The claims: who gets which guest memory while a guest is put together.

A guest's image says where it wants to be; avmm's own tables have fixed places; initrd and
modules go wherever there is room. Each claims its range here before anything is written, so
that no two of them can meet unnoticed: the second claim fails and names both.

When all have claimed, the same book tells the guest what it may use: `memory_map`, in the
terms of the e820 interface that PVH, multiboot and Linux's zero page have all taken over.
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
    """What a range is, by its number in e820 (ACPI 6.5, 15.1), PVH and multiboot alike."""

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
    """What holds for all guests of a board; spans are (first GPA, first GPA after)."""

    reserved: tuple[_Span, ...] = ()
    """Told as reserved, whether anybody claims something there or not."""
    never_ram: _Span = (0, 0)
    """Never told as RAM, though RAM may back it."""
    lowest: int = 0
    """Nothing is placed below it (`Claims.place`)."""
    limit: int = 1 << 52
    """What is placed ends at or below it, unless its caller says a lower limit."""


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
    """What is left of `span` outside of `holes`, which must be as `_merged` gives them."""
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
        """Take `size` bytes at `gpa` for `what`; where `reserved`, the guest is told so.

        Raises `ImageError` where they are not all RAM or one is taken already: `what` should
        name the file. An empty range takes nothing and is never refused.
        """
        if size == 0:
            return
        claim = _Claim(gpa, gpa + size, what, reserved)
        if not any(lo <= gpa and claim.end <= hi for lo, hi in self._ram):
            ram = ", ".join(f"{lo:#x}-{hi:#x}" for lo, hi in self._ram)
            raise ImageError(f"{claim} lies outside of guest RAM ({ram})")
        at = bisect(self._claims, gpa, key=lambda other: other.gpa)
        for other in self._claims[max(at - 1, 0) : at + 1]:
            if gpa < other.end and other.gpa < claim.end:
                raise ImageError(f"{claim} overlaps {other}")
        self._claims.insert(at, claim)

    def place(self, size: int, what: str, *, limit: int | None = None) -> int:
        """Claim the highest page-aligned room for `size` bytes below `limit`; return its GPA.

        Raises `ImageError` where no room is big enough, telling the biggest there is.
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
            f"{what} is {size} bytes and finds no room in guest RAM below {limit:#x}: "
            f"the biggest free run is {biggest} bytes"
        )

    def memory_map(self) -> list[MapEntry]:
        """RAM and reserved ranges, by address, none overlapping, as few as can be."""
        reserved = _merged(
            [*self._rules.reserved, *((c.gpa, c.end) for c in self._claims if c.reserved)]
        )
        holes = _merged([*reserved, self._rules.never_ram])
        spans = [(span, MapKind.RESERVED) for span in reserved]
        spans += [(left, MapKind.RAM) for ram in self._ram for left in _without(ram, holes)]
        return [MapEntry(lo, hi - lo, kind) for (lo, hi), kind in sorted(spans)]
