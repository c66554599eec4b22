"""All measurements as a picture: each case's ratio to its baseline, with its spread.

It is drawn with matplotlib (`pip install 'avmm[report]'`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from avmm.bench.whole import CLOSE, WholeRow
from avmm.errors import AvmmError, ConfigError

_CLEAR, _NOISY, _EVEN = "#2a6f97", "#b8b8b8", "#d1495b"
_INCHES: Final = 0.22
"""Of height, for each case."""


def demand(path: Path) -> None:
    """Raise `ConfigError` if no picture can be written at `path`. Call this before anything is
    measured.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'avmm[report]'"
        )
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot {path}: expected a name that ends in .png")
    try:
        with path.open("ab") as file:
            is_new = not file.tell()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}") from None


def _name(row: WholeRow) -> str:
    better = " (more is better)" if row.unit.endswith("/s") else ""
    return f"{row.bench}: {row.case}{better}"


def draw(path: Path, rows: Sequence[WholeRow]) -> None:
    """Write the picture. Raises `AvmmError` if it cannot be written."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and optional

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    # Ratios that are next to nothing are shown at the edge: 0 has no place on this scale.
    shown = [
        (row, max(row.least, CLOSE), max(row.ratio, CLOSE), max(row.most, CLOSE))
        for row in rows
        if row.least is not None and row.ratio is not None and row.most is not None
    ]
    names = [_name(row) for row, *_ in shown]
    figure, axes = plt.subplots(
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
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise AvmmError(f"--plot {path}: {error.strerror}") from None
    finally:
        plt.close(figure)
