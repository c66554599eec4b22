"""The rows that measurements report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class BenchRow:
    """One case: microseconds for avmm and for the baseline, and their ratio. The last two are None
    if the baseline is QEMU and QEMU is not installed.
    """

    case: str
    us: float
    raw_us: float | None
    ratio: float | None


@dataclass(frozen=True)
class EngineRow(BenchRow):
    """The row of a case on the software engine, compared with `baseline`. The engine should reach
    a ratio of at most `wanted`; None if there is no such aim. `why` is what the baseline failed
    of; None if it did not.
    """

    baseline: str
    wanted: float | None
    why: str | None


@dataclass(frozen=True)
class RateRow(BenchRow):
    """The row of a kind of request, where `raw_us` is QEMU's time. It also says how many requests
    and megabytes avmm does per second.
    """

    per_second: float
    mb_per_second: float


@dataclass(frozen=True)
class ManyRow:
    """One case: exits per second of all guests together, of the baseline's, and the ratio of the
    two.
    """

    case: str
    per_second: float
    raw_per_second: float
    ratio: float


@dataclass(frozen=True)
class FigureRow:
    """One case: a figure of avmm's in `unit`, that of its baseline, and the ratio of the two. The
    last two are None if there is no baseline.
    """

    case: str
    unit: str
    ours: float
    baseline: float | None
    ratio: float | None


@dataclass(frozen=True)
class SpeedRow:
    """One case: MiB per second of avmm and of its baseline, and the ratio of the two. The last two
    are None if QEMU is not installed.
    """

    case: str
    mib_per_second: float
    raw_mib_per_second: float | None
    ratio: float | None


@dataclass(frozen=True)
class SizeRow:
    """One case: KiB of avmm and of its baseline, and the ratio of the two."""

    case: str
    kib: float
    raw_kib: float
    ratio: float


@dataclass(frozen=True)
class StallRow:
    """One case: how many milliseconds trio's thread kept a task waiting, as the median and the
    maximum over the rounds. `blocked_ms` is the median without the time in which the thread waited
    for a core; it is None if Linux does not count that. `beside_ms` is the median of the baseline:
    how late another process was that only sleeps. `idle_ms` is the 99th percentile while nothing
    is done; it has been subtracted from `ms` and `most_ms`.
    """

    case: str
    ms: float
    most_ms: float
    blocked_ms: float | None
    beside_ms: float
    idle_ms: float


def medians(
    pairs: Sequence[tuple[float, float | None]],
) -> tuple[float, float | None, float | None]:
    """The medians of a list of (ours, baseline), one for each round: of ours, of the baseline, and
    of the rounds' own ratios.
    """
    ours = median(ours for ours, _ in pairs)
    bases = [base for _, base in pairs if base is not None]
    if not bases:
        return ours, None, None
    return ours, median(bases), median(ours / base for ours, base in pairs if base is not None)
