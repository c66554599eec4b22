"""All measurements in one table: what several rounds say of a case, and the picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from avmm.bench.row import BenchRow, FigureRow, ManyRow, SizeRow, SpeedRow
from avmm.bench.whole import Row, WholeRow, summary
from avmm.cli import picture
from avmm.cli.plot import draw
from avmm.errors import ConfigError


def rounds(*ratios: float) -> list[Row]:
    return [BenchRow("a case", 10 * ratio, 10.0, ratio) for ratio in ratios]


def test_a_case_has_the_median_and_the_spread_of_its_rounds() -> None:
    assert summary("exits", rounds(1.2, 1.0, 1.1)) == WholeRow(
        "exits", "a case", "µs", 11.0, 10.0, 1.1, 1.0, 1.2, is_noisy=False
    )


def test_rounds_that_differ_by_more_than_a_quarter_tell_nothing() -> None:
    assert not summary("exits", rounds(1.0, 1.0, 1.24)).is_noisy
    assert summary("exits", rounds(1.0, 1.0, 1.26)).is_noisy
    assert not summary("exits", rounds(0.001, 0.001, 0.002)).is_noisy


def test_what_has_no_baseline_has_no_ratio() -> None:
    row = summary("density", [FigureRow("CPU", "% of a core", 2.0, None, None)] * 2)
    assert row == WholeRow(
        "density", "CPU", "% of a core", 2.0, None, None, None, None, is_noisy=False
    )


@pytest.mark.parametrize(
    ("row", "unit"),
    [
        (ManyRow("a", 2.0, 4.0, 0.5), "exits/s"),
        (FigureRow("a", "KiB", 2.0, 4.0, 0.5), "KiB"),
        (SizeRow("a", 2.0, 4.0, 0.5), "KiB"),
        (SpeedRow("a", 2.0, 4.0, 0.5), "MiB/s"),
        (BenchRow("a", 2.0, 4.0, 0.5), "µs"),
    ],
)
def test_each_kind_of_row_is_understood(row: Row, unit: str) -> None:
    assert summary("b", [row]) == WholeRow("b", "a", unit, 2.0, 4.0, 0.5, 0.5, 0.5, is_noisy=False)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "all.png"
    picture.demand(path, "--plot")
    assert not path.exists()
    draw(path, [summary("exits", rounds(0.5, 2.0)), summary("start", rounds(0.0))])
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "words"), [("all.jpg", "expected a name that ends in .png"), ("no/a.png", "No such")]
)
def test_a_picture_that_cannot_be_written_is_refused_before(
    tmp_path: Path, name: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        picture.demand(tmp_path / name, "--plot")
