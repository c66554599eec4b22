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
