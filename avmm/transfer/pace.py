"""How fast a guest's RAM goes over, and when it is time to stop the guest: decisions, no I/O.

Round after round what was written meanwhile is sent again. A round is the last that the guest runs
through when what is then left can go over within the target downtime, at the rate that was seen,
and another round would not make that much shorter: rounds that shrink are short, and each saves
the guest most of the standstill that is left. Where the left-over does not shrink, the guest
writes as fast as the line carries: then it is throttled, more with each such round (QEMU calls
that auto-converge), until it does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from avmm.errors import MigrationError
from avmm.memory.pages import PAGE

_SHRINKS: Final = 0.7
"""A round that leaves more than this share of what the one before left gets nowhere."""
_SHORT: Final = 0.05
"""So little of the target downtime is not worth another round."""
_FIRST_THROTTLE: Final = 0.2
_MORE_THROTTLE: Final = 0.15
_MOST_THROTTLE: Final = 0.95
_HOPELESS_ROUNDS: Final = 8
"""So many rounds at the most throttle, and it will never be."""


@dataclass
class Pace:
    """One migration's. `target_downtime` in seconds, `limit` in bytes a second or None."""

    target_downtime: float = 0.1
    limit: float | None = None
    throttle: float = 0.0
    """The share of its time that the guest is to stand still, 0 to 1."""
    rate: float = 0.0
    dirty_rate: float = 0.0
    _left: int | None = field(default=None, repr=False)
    _hopeless: int = field(default=0, repr=False)

    def delay(self, sent: int, elapsed: float) -> float:
        """Seconds to wait after `sent` bytes in `elapsed` seconds, to keep to the limit."""
        return 0.0 if self.limit is None else max(0.0, sent / self.limit - elapsed)

    def expected_downtime(self, pages: int) -> float:
        """Seconds that so many pages take, at the rate of the last round."""
        return pages * PAGE / self.rate if self.rate else float("inf")

    def round_ended(self, sent: int, elapsed: float, pages_left: int) -> bool:
        """A round of `sent` bytes has taken so many seconds: is it time to stop the guest?

        Raises `MigrationError` where the guest writes faster than the line carries, throttled as
        much as it can be.
        """
        elapsed = max(elapsed, 1e-6)
        if sent >= PAGE:  # a round of next to nothing tells no rate
            self.rate = sent / elapsed
        self.dirty_rate = pages_left * PAGE / elapsed
        before, self._left = self._left, pages_left
        shrinks = before is None or pages_left <= _SHRINKS * before
        expected = self.expected_downtime(pages_left) if pages_left else 0.0
        if expected <= self.target_downtime * (_SHORT if shrinks else 1):
            return True
        if not shrinks:
            self._slow_down()
        return False

    def _slow_down(self) -> None:
        if self.throttle >= _MOST_THROTTLE:
            self._hopeless += 1
            if self._hopeless == _HOPELESS_ROUNDS:
                raise MigrationError(
                    f"the guest writes {self.dirty_rate / 1e6:.0f} MB/s, throttled as much as it "
                    f"can be, and the line carries {self.rate / 1e6:.0f} MB/s: expected a faster "
                    f"line or a target downtime of more than {self.target_downtime} s"
                )
        more = _MORE_THROTTLE if self.throttle else _FIRST_THROTTLE
        self.throttle = min(_MOST_THROTTLE, self.throttle + more)
