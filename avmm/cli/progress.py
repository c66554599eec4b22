"""The progress of a snapshot or a migration: a bar on a terminal, otherwise a line from time to
time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Final, Protocol, Self

import click
from tqdm import tqdm

from avmm.memory.pages import PAGE

_LINE_SECONDS: Final = 1.0
_BAR: Final = "{desc} {percentage:3.0f}% |{bar}| {n:,}/{total:,} pages{postfix}"


class Shown(Protocol):
    """Shows progress. Made by `shown`."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def show(self, progress: Mapping[str, Any]) -> None:
        """Show `progress`, an event from the control socket."""


def shown() -> Shown:
    """Show progress on standard error: as a bar if that is a terminal, otherwise as lines."""
    return _Bar() if os.isatty(2) else _Lines()


def _done(progress: Mapping[str, Any]) -> tuple[int, int]:
    done = int(progress["pages_sent"])
    return done, done + int(progress["pages_left"])


class Rates:
    """The speed of the line: this round's so far, or the last round's if this one has only just
    begun.
    """

    def __init__(self) -> None:
        self._round = 0
        self._begin = 0.0
        self._sent = 0

    def rate(self, progress: Mapping[str, Any]) -> float:
        """Bytes a second."""
        if progress["round"] != self._round:
            self._round = progress["round"]
            self._begin, self._sent = progress["seconds"], progress["bytes_sent"]
        seconds = progress["seconds"] - self._begin
        if seconds > 0 and progress["bytes_sent"] > self._sent:
            return float((progress["bytes_sent"] - self._sent) / seconds)
        return float(progress["rate"])


def _speeds(progress: Mapping[str, Any], rate: float) -> list[str]:
    """What is shown of a migration in addition to its pages."""
    parts = [f"{size(rate)}/s"] if rate else []
    if progress["round"] > 1:
        # The downtime to expect if the guest is stopped at the end of this round. The pages that
        # it writes during the round are sent then.
        _, total = _done(progress)
        downtime = total * PAGE / rate * progress["dirty_rate"] / rate if rate else None
        parts += [f"dirty {size(progress['dirty_rate'])}/s", f"downtime ~{seconds(downtime)}"]
    if progress["throttle"]:
        parts.append(f"guest throttled {progress['throttle']:.0%}")
    return parts


def size(count: float) -> str:
    """Bytes, as people write them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def seconds(value: float | None) -> str:
    """A time, as people write it."""
    if value is None:
        return "?"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


class _Bar:
    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._round = 0
        self._rates = Rates()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Mapping[str, Any]) -> None:
        done, total = _done(progress)
        if self._bar is None:
            self._bar = tqdm(total=total, bar_format=_BAR, leave=False, dynamic_ncols=True)
        bar = self._bar
        if progress["round"] != self._round:
            self._round = progress["round"]
            bar.set_description_str(f"round {self._round}", refresh=False)
            bar.reset(total=max(total, 1))
        if "rate" in progress:
            parts = _speeds(progress, self._rates.rate(progress))
            bar.set_postfix_str(", ".join(parts), refresh=False)
        bar.n = done
        bar.refresh()


class _Lines:
    def __init__(self) -> None:
        self._round = 0
        self._told = 0.0
        self._rates = Rates()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, progress: Mapping[str, Any]) -> None:
        now = time.monotonic()
        is_new = progress["round"] != self._round
        if not is_new and now < self._told + _LINE_SECONDS:
            return
        self._round, self._told = progress["round"], now
        done, total = _done(progress)
        parts = [f"round {self._round}: {done:,} of {total:,} pages"]
        if "rate" in progress:
            parts += _speeds(progress, self._rates.rate(progress))
        click.echo(", ".join(parts), err=True)
