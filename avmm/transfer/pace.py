"""Decides how fast a guest's RAM goes over, and when to stop the guest. Does no I/O.

Each round sends again what the guest has written during the round before. The guest is stopped
after a round if the rest can go over within the target downtime, at the rate that was measured,
and if another round would not make the rest much smaller. While the rest shrinks, another round is
worth while: it is short, and saves the guest most of the remaining standstill. If the rest does
not shrink, the guest writes as fast as the line carries. Then it is throttled, more with each such
round, until the rest shrinks (QEMU calls that auto-converge).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from avmm.errors import MigrationError
from avmm.memory.pages import PAGE

_SHRINKS: Final = 0.7
"""A round makes no progress if it leaves more than this share of what the one before left."""
_SHORT: Final = 0.05
"""If the rest takes less than this share of the target downtime, another round is not worth
while."""
_FIRST_THROTTLE: Final = 0.2
_MORE_THROTTLE: Final = 0.15
_MOST_THROTTLE: Final = 0.95
_HOPELESS_ROUNDS: Final = 8
"""After this many rounds without progress at the most throttle, the migration fails."""


@dataclass
class Pace:
    """The pace of one migration. `target_downtime` is in seconds, `limit` in bytes a second. If
    `limit` is None there is no limit."""

    target_downtime: float = 0.1
    limit: float | None = None
    throttle: float = 0.0
    """The share of its time that the guest is to stand still, 0 to 1."""
    rate: float = 0.0
    dirty_rate: float = 0.0
    _left: int | None = field(default=None, repr=False)
    _hopeless: int = field(default=0, repr=False)

    def delay(self, sent: int, elapsed: float) -> float:
        """How many seconds to wait after `sent` bytes in `elapsed` seconds, to keep to the
        limit."""
        return 0.0 if self.limit is None else max(0.0, sent / self.limit - elapsed)

    def expected_downtime(self, pages: int) -> float:
        """How many seconds these pages take, at the rate of the last round."""
        return pages * PAGE / self.rate if self.rate else float("inf")

    def round_ended(self, sent: int, elapsed: float, pages_left: int) -> bool:
        """Call it after a round of `sent` bytes that took `elapsed` seconds. Returns whether it is
        time to stop the guest.

        Raises `MigrationError` if the guest writes faster than the line carries, even when it is
        throttled as much as possible.
        """
        elapsed = max(elapsed, 1e-6)
        if sent >= PAGE:  # the rate of an almost empty round would mean nothing
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
                    f"the guest writes {self.dirty_rate / 1e6:.0f} MB/s, even when throttled as "
                    f"much as possible, and the line carries {self.rate / 1e6:.0f} MB/s: expected "
                    f"a faster line, or a target downtime of more than {self.target_downtime} s"
                )
        more = _MORE_THROTTLE if self.throttle else _FIRST_THROTTLE
        self.throttle = min(_MOST_THROTTLE, self.throttle + more)
