"""What a measurement reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One case: microseconds by avmm and by its baseline in C, and the ratio of the two."""

    case: str
    us: float
    raw_us: float
    ratio: float


@dataclass(frozen=True)
class RateRow(Row):
    """`Row` of a request, `raw_us` is QEMU's; and how many, and megabytes, avmm does a second."""

    per_second: float
    mb_per_second: float


@dataclass(frozen=True)
class SizeRow:
    """One case: KiB of avmm and of its baseline, and the ratio of the two."""

    case: str
    kib: float
    raw_kib: float
    ratio: float
