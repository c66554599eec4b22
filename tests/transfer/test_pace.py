"""How fast, and when the guest is stopped: a guest and a line as numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.errors import MigrationError
from avmm.memory.pages import PAGE
from avmm.transfer.pace import Pace


def rounds(pace: Pace, pages: int, dirty_rate: float, line_rate: float) -> list[float]:
    """Copy a guest that writes so many pages a second, throttled as it is told: the throttle in
    each round, until it is stopped."""
    left, seen = pages, []
    for _ in range(100):
        elapsed = max(left * PAGE / line_rate, 1e-4)
        sent = left * PAGE
        left = min(pages, int(elapsed * dirty_rate * (1 - pace.throttle)))
        seen.append(pace.throttle)
        if pace.round_ended(sent, elapsed, left):
            assert left * PAGE / line_rate <= pace.target_downtime * 1.01
            return seen
    pytest.fail("it goes on for ever")


def test_an_idle_guest_is_stopped_after_one_round() -> None:
    assert rounds(Pace(), 10_000, 0, 1e9) == [0]


def test_a_guest_slower_than_the_line_is_not_throttled() -> None:
    assert set(rounds(Pace(), 100_000, 50_000, 4e8)) == {0}


@given(st.floats(1.0, 8.0))
def test_a_guest_faster_than_the_line_is_throttled_until_it_fits(times: float) -> None:
    line_rate = 1e8
    throttles = rounds(Pace(), 50_000, times * line_rate / PAGE, line_rate)
    assert throttles == sorted(throttles)
    assert throttles[-1] <= 0.95
    if times > 1.5:
        assert throttles[-1] > 0


def test_without_hope_it_says_so() -> None:
    pace = Pace(target_downtime=0.01)
    with pytest.raises(MigrationError, match=r"writes .* MB/s.* line carries 1 MB/s.* 0.01 s"):
        rounds(pace, 50_000, 1e9, 1e6)
    assert pace.throttle == 0.95


def test_the_limit_is_kept_to() -> None:
    pace = Pace(limit=1e6)
    assert pace.delay(500_000, 0.25) == pytest.approx(0.25)
    assert pace.delay(500_000, 0.75) == 0
    assert Pace().delay(1 << 40, 0) == 0


def test_a_round_of_nothing_tells_no_rate() -> None:
    pace = Pace()
    assert pace.expected_downtime(1) == float("inf")
    assert not pace.round_ended(0, 0.0, 5)
    assert pace.rate == 0
    assert pace.round_ended(10, 1.0, 0)
    pace.round_ended(PAGE * 1000, 1.0, 1000)
    assert pace.expected_downtime(1000) == pytest.approx(1)
    pace.round_ended(10, 1.0, 1000)
    assert pace.expected_downtime(1000) == pytest.approx(1)
