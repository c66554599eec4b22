"""All measurements, one after the other, again and again: which figures can be trusted?

Each measurement is made with one round at a time, and all of them once before any is made again.
So a host that is busy for a while disturbs one figure of each case, not all figures of one. The
report has the median of each case's ratios, the smallest and the largest of them, and says where
these are too far apart to tell anything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final, NamedTuple, TypeAlias

import trio

from avmm.bench import density, exits, fork, many, migration, pause, snapshot, start, virtio
from avmm.bench.row import BenchRow, FigureRow, ManyRow, SizeRow, SpeedRow

Row: TypeAlias = BenchRow | FigureRow | ManyRow | SizeRow | SpeedRow

TOO_NOISY: Final = 0.25
"""If the ratios differ by more than this share of their median, they tell nothing ..."""
CLOSE: Final = 0.02
"""... unless they differ by no more than this."""


@dataclass(frozen=True)
class WholeRow:
    """One case of one measurement: the medians of avmm's figure and of the baseline's, in `unit`,
    and of their ratio; the smallest and the largest ratio. All but `ours` are None if there is no
    baseline. `is_noisy`: the ratios are too far apart to tell anything.
    """

    bench: str
    case: str
    unit: str
    ours: float
    baseline: float | None
    ratio: float | None
    least: float | None
    most: float | None
    is_noisy: bool


class Sizes(NamedTuple):
    """How much is measured at a time."""

    exits: int
    guests: int
    idle: int
    clones: int
    pauses: int
    requests: int
    memory: int


class _Part(NamedTuple):
    name: str
    measure: Callable[[Callable[[], None]], Sequence[Row]]
    """Takes what is to be called at each step. It blocks."""
    steps: int


def steps(rounds: int, sizes: Sizes) -> int:
    """How often `measure` calls `progress`."""
    return rounds * sum(part.steps for part in _parts(sizes))


def measure(rounds: int, sizes: Sizes, progress: Callable[[], None]) -> list[WholeRow]:
    """All cases, `rounds` times. Blocks for some minutes."""
    parts = _parts(sizes)
    found: dict[tuple[str, str], list[Row]] = {}
    for _ in range(rounds):
        for part in parts:
            for row in part.measure(progress):
                found.setdefault((part.name, row.case), []).append(row)
    return [summary(name, rows) for (name, _), rows in found.items()]


def summary(name: str, rows: Sequence[Row]) -> WholeRow:
    """What several rounds say of one case."""
    figures = [_figures(row) for row in rows]
    ours = median(ours for _, ours, _ in figures)
    baselines = [baseline for _, _, baseline in figures if baseline is not None]
    ratios = [row.ratio for row in rows if row.ratio is not None]
    if not ratios:
        return WholeRow(name, rows[0].case, figures[0][0], ours, None, None, None, None, False)
    ratio, least, most = median(ratios), min(ratios), max(ratios)
    return WholeRow(
        bench=name,
        case=rows[0].case,
        unit=figures[0][0],
        ours=ours,
        baseline=median(baselines),
        ratio=ratio,
        least=least,
        most=most,
        is_noisy=most - least > max(TOO_NOISY * ratio, CLOSE),
    )


def _figures(row: Row) -> tuple[str, float, float | None]:
    """The unit, avmm's figure and the baseline's."""
    match row:
        case ManyRow():
            return "exits/s", row.per_second, row.raw_per_second
        case FigureRow():
            return row.unit, row.ours, row.baseline
        case SizeRow():
            return "KiB", row.kib, row.raw_kib
        case SpeedRow():
            return "MiB/s", row.mib_per_second, row.raw_mib_per_second
        case BenchRow():
            return "µs", row.us, row.raw_us


def _parts(sizes: Sizes) -> list[_Part]:
    exit_count, idle, clones, memory = sizes.exits, sizes.idle, sizes.clones, sizes.memory
    return [
        _Part("exits", _in_trio(exits.measure, exit_count, 1), exits.steps(1)),
        _Part("many", _in_trio(many.measure, exit_count, sizes.guests, idle, 1), many.steps(1)),
        _Part("pause", _in_trio(pause.measure, sizes.pauses, 1), pause.steps(1)),
        _Part("fork", _in_trio(fork.measure, clones, 1), fork.steps(1)),
        _Part("density", _in_trio(density.measure, idle), density.steps(idle)),
        _Part("start", partial(start.measure, 1), start.steps(1)),
        _Part("virtio", partial(virtio.measure, sizes.requests, 1), virtio.steps(1)),
        _Part(
            "snapshot", _in_trio(snapshot.measure, memory, 1, clones), snapshot.steps(1, clones)
        ),
        _Part("migration", _in_trio(migration.measure, memory, 1), migration.steps(1)),
    ]


def _in_trio(
    measure: Callable[..., Awaitable[Sequence[Row]]], *sizes: int
) -> Callable[[Callable[[], None]], Sequence[Row]]:
    return lambda progress: trio.run(partial(measure, *sizes, progress))
