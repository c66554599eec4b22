"""All measurements as a picture: each case's ratio to its baseline, with its spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from avmm.bench.whole import CLOSE, WholeRow
from avmm.cli import picture

_CLEAR, _NOISY, _EVEN = "#2a6f97", "#b8b8b8", "#d1495b"
_INCHES: Final = 0.22
"""Of height, for each case."""


def _name(row: WholeRow) -> str:
    better = " (more is better)" if row.unit.endswith("/s") else ""
    return f"{row.bench}: {row.case}{better}"


def draw(path: Path, rows: Sequence[WholeRow]) -> None:
    """Write the picture. Raises `AvmmError` if it cannot be written."""
    # Ratios that are next to nothing are shown at the edge: 0 has no place on this scale.
    shown = [
        (row, max(row.least, CLOSE), max(row.ratio, CLOSE), max(row.most, CLOSE))
        for row in rows
        if row.least is not None and row.ratio is not None and row.most is not None
    ]
    names = [_name(row) for row, *_ in shown]
    figure, axes = picture.pyplot().subplots(
        figsize=(9, 1.2 + _INCHES * max(1, len(shown))), layout="constrained"
    )
    axes.set_xscale("log")
    for at, (row, least, ratio, most) in enumerate(shown):
        color = _NOISY if row.is_noisy else _CLEAR
        axes.plot([least, most], [at, at], color=color, linewidth=3, alpha=0.5)
        axes.plot([ratio], [at], "o", color=color, markersize=5)
    axes.axvline(1, color=_EVEN, linewidth=1)
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("avmm's figure divided by its baseline's, median and spread")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("avmm next to its baselines (grey: too noisy to tell)", fontsize=11)
    picture.save(figure, path, "--plot")
