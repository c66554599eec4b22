"""A migration as a picture: pages in each round, what the guest wrote meanwhile, the downtime.

It is drawn from the events of the control socket (`avmm.cli.picture`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

from avmm.cli import picture
from avmm.cli.progress import seconds, size

_MIB: Final = 1 << 20
_LONGEST_WHY: Final = 70
_SENT, _LEFT, _DIRTY, _DOWN = "#2a6f97", "#a9d6e5", "#d1495b", "#edae49"
_SHORTEST: Final = 0.02
"""A round shorter than this many seconds has no rate: a single frame would decide it."""
_LABELLED: Final = 0.05
"""A round that took less than this share of the whole gets no number at its bar, except the last
round.
"""


@dataclass
class CopyRound:
    """One round of copying, in seconds since the migration began."""

    number: int
    begin: float
    pages: int
    times: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    """The bytes sent so far at each of these times."""


class Timeline:
    """Collects one migration's events."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._rounds: list[CopyRound] = []
        self._dirty: list[tuple[float, float]] = []
        """When each round ended, and the rate in bytes per second at which the guest wrote during
        it.
        """

    def add(self, event: Mapping[str, Any]) -> None:
        """Add a progress event."""
        now, rounds = event["seconds"], self._rounds
        if not rounds or rounds[-1].number != event["round"]:
            if rounds:
                self._note(rounds[-1], event)
                self._dirty.append((now, event["dirty_rate"]))
            pages = event["pages_sent"] + event["pages_left"]
            rounds.append(CopyRound(event["round"], now, pages))
        self._note(rounds[-1], event)

    @staticmethod
    def _note(of: CopyRound, event: Mapping[str, Any]) -> None:
        of.times.append(event["seconds"])
        of.sent.append(event["bytes_sent"])

    def draw(self, path: Path, result: Mapping[str, Any] | None, why: str = "") -> None:
        """Write the picture, if there was a round. `result` is the migration's answer; if it
        failed it is None, and `why` says what became of it. Raises `AvmmError` if it cannot be
        written.
        """
        if not self._rounds:
            return
        figure, (pages, rates) = picture.pyplot().subplots(
            2, sharex=True, figsize=(9, 6), layout="constrained", height_ratios=(3, 2)
        )
        # The guest stood still from the last round on.
        last = self._rounds[-1]
        end = last.times[-1]
        if result is not None:
            end = max(end, last.begin + result["downtime"])
        self._draw_pages(pages, end)
        self._draw_rates(rates, end)
        if result is not None:
            self._draw_downtime((pages, rates), last.begin, end, result["downtime"])
        rates.set_xlabel("seconds since the migration began")
        rates.set_xlim(0, end or 1)
        for axes in (pages, rates):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(self._title(result, why), fontsize=11)
        picture.save(figure, path, "--report")

    def _title(self, result: Mapping[str, Any] | None, why: str) -> str:
        if result is None:
            return f"Migration to {self._target}: {shorten(why, _LONGEST_WHY)}"
        return (
            f"Migration to {self._target}: {size(result['bytes_sent'])} in "
            f"{seconds(result['total'])}, {result['rounds']} rounds, downtime "
            f"{seconds(result['downtime'])}"
        )

    def _spans(self, end: float) -> list[tuple[CopyRound, float]]:
        """Each round, and when it ended."""
        begins = [round_.begin for round_ in self._rounds]
        return list(zip(self._rounds, [*begins[1:], end], strict=True))

    def _draw_pages(self, axes: Any, end: float) -> None:
        """Draw a bar for each round, as wide as the round was long."""
        for round_, stop in self._spans(end):
            width = stop - round_.begin
            axes.bar(round_.begin, round_.pages, width, align="edge", color=_LEFT, edgecolor=_SENT)
            is_last = round_ is self._rounds[-1]
            if width < _LABELLED * end and not is_last:
                continue  # it would overlap the number of its neighbour
            axes.annotate(
                f"{round_.pages:,}",
                (stop if is_last else round_.begin + width / 2, round_.pages),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right" if is_last else "center",
                fontsize=8,
            )
        axes.set_ylabel("pages in each round")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.margins(y=0.1)

    def _draw_rates(self, axes: Any, end: float) -> None:
        """Draw the rate at which bytes were sent, and the rate at which the guest wrote."""
        times, rates = [], []
        for round_, _ in self._spans(end):
            before, old = round_.times[0], round_.sent[0]
            for now, new in zip(round_.times, round_.sent, strict=True):
                if now - before >= _SHORTEST:
                    times += [before, now]
                    rates += [(new - old) / (now - before) / _MIB] * 2
                    before, old = now, new
        axes.plot(times, rates, color=_SENT, label="sent")
        begins = [round_.begin for round_, _ in self._spans(end)]
        for begin, (stop, rate) in zip(begins, self._dirty, strict=False):
            label = "written by the guest" if begin == begins[0] else None
            axes.plot([begin, stop], [rate / _MIB] * 2, color=_DIRTY, linewidth=2.5, label=label)
        axes.set_ylabel("MiB/s")
        axes.set_ylim(bottom=0)
        if times or self._dirty:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9
            )

    @staticmethod
    def _draw_downtime(both: Any, begin: float, end: float, downtime: float) -> None:
        for axes in both:
            axes.axvspan(begin, end, color=_DOWN, alpha=0.45, linewidth=0)
        both[0].annotate(
            f"downtime {seconds(downtime)}",
            (begin, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
        )
