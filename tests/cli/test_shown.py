"""What is told of a migration: its progress in lines, and the picture of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from avmm.cli import progress
from avmm.cli.progress import shown
from avmm.cli.timeline import Timeline

MIB = 1 << 20


def event(number: int, seconds: float, sent: int, left: int, **more: Any) -> dict[str, Any]:
    """`sent` and `left` in pages; the line carries 100 MiB/s."""
    return {
        "round": number,
        "seconds": seconds,
        "pages_sent": sent,
        "pages_left": left,
        "bytes_sent": int(seconds * 100 * MIB),
        "rate": 100 * MIB,
        "dirty_rate": 0,
        "throttle": 0.0,
        **more,
    }


EVENTS = [
    event(1, 0.0, 0, 25_600),
    event(1, 0.5, 12_800, 12_800),
    event(2, 1.0, 0, 5_120, dirty_rate=20 * MIB),
    event(3, 1.2, 0, 1_024, dirty_rate=25 * MIB, throttle=0.4),
    event(3, 1.24, 1_024, 0, dirty_rate=25 * MIB, throttle=0.4),
]
RESULT = {"bytes_sent": 124 * MIB, "total": 1.25, "rounds": 3, "downtime": 0.05}


def test_lines_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as lines:
        for told in EVENTS:
            lines.show(told)
    assert capsys.readouterr().err.splitlines() == [
        "round 1: 0 of 25,600 pages, 100 MiB/s",
        # It takes 200 ms, in which the guest writes 4 MiB: 40 ms of the line's.
        "round 2: 0 of 5,120 pages, 100 MiB/s, dirty 20 MiB/s, downtime ~40 ms",
        "round 3: 0 of 1,024 pages, 100 MiB/s, dirty 25 MiB/s, downtime ~10 ms, "
        "guest throttled 40%",
    ]


def test_a_bar_of_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.os, "isatty", lambda fd: True)
    monkeypatch.setenv("COLUMNS", "120")
    with shown() as bar:
        for told in EVENTS:
            bar.show(told)
    said = capsys.readouterr().err
    assert "round 1  50% |" in said
    assert "| 12,800/25,600 pages, 100 MiB/s" in said
    assert "| 0/5,120 pages, 100 MiB/s, dirty 20 MiB/s, downtime ~40 ms" in said
    assert "| 1,024/1,024 pages, 100 MiB/s, dirty 25 MiB/s, downtime ~10 ms, guest thro" in said


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """What was drawn, as it was saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    yield figures


def test_the_picture_of_a_migration(tmp_path: Path, drawn: list[Figure]) -> None:
    timeline = Timeline("unix:/there")
    for told in EVENTS:
        timeline.add(told)
    timeline.draw(tmp_path / "report.png", RESULT)
    (figure,) = drawn
    pages, rates = figure.axes
    bars = [
        (patch.get_x(), round(patch.get_width(), 6), patch.get_height())
        for patch in pages.patches
        if patch.get_height() > 1
    ]
    assert bars == [(0.0, 1.0, 25_600), (1.0, 0.2, 5_120), (1.2, 0.05, 1_024)]
    assert [text.get_text() for text in pages.texts] == [
        "25,600",
        "5,120",
        "1,024",
        "downtime 50 ms",
    ]
    sent, *written = rates.lines
    assert list(sent.get_ydata()) == [pytest.approx(100.0)] * len(sent.get_ydata())
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in written] == [
        ([0.0, 1.0], [20.0, 20.0]),
        ([1.0, 1.2], [25.0, 25.0]),
    ]
    for axes in figure.axes:
        (left, right) = axes.patches[-1].get_extents().intervalx
        shown_at = axes.transData.inverted().transform([(left, 0), (right, 0)])[:, 0]
        assert list(shown_at) == pytest.approx([1.2, 1.25])
    assert [text.get_text() for text in rates.get_legend().get_texts()] == [
        "sent",
        "written by the guest",
    ]
    (title,) = figure.get_suptitle().splitlines()
    assert title == "Migration to unix:/there: 124 MiB in 1.2 s, 3 rounds, downtime 50 ms"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_one_that_failed(tmp_path: Path, drawn: list[Figure]) -> None:
    timeline = Timeline("unix:/there")
    timeline.draw(tmp_path / "none.png", None, "refused")
    assert not drawn, "there was no round"
    timeline.add(EVENTS[0])
    timeline.draw(tmp_path / "report.png", None, "the line is broken")
    assert drawn[0].get_suptitle() == "Migration to unix:/there: the line is broken"
