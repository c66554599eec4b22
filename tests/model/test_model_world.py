"""Several vCPUs, their threads, bridges and the coordinator, under drawn schedules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import Phase, assume, given, settings

import avmm.loop
from model.production import REAL
from model.properties import can_tell
from model.schedules import cases, played

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("quiet_log")]


def is_right(case: dict[str, Any]) -> None:
    assume(all(can_tell(case["host"], case["believes"], program) for program in case["several"]))
    played(REAL, **case)


@given(case=cases())
@settings(max_examples=400)
def test_whatever_happens_when_nothing_is_lost(case: dict[str, Any]) -> None:
    is_right(case)


@given(case=cases(fails=True))
@settings(max_examples=200)
def test_a_device_that_fails_leaves_the_others_right(case: dict[str, Any]) -> None:
    is_right(case)


NOT_IN_THE_MODEL = {("NEW", "ENDED"), ("RUNNING", "ENDED"), ("ABANDONED", "SERVED")}
"""A host without threads to spare, vCPUs that park in C, and awaitables that never wait:
test_lifecycle.py has these."""


def test_the_table_of_states_tells_of_nothing_that_never_happens() -> None:
    """That nothing else happens, each schedule shows."""
    wanted = {
        (before.name, after.name) for before, row in avmm.loop.TRANSITIONS.items() for after in row
    }
    seen: set[tuple[str, str]] = set()

    @given(case=cases(fails=True))
    @settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate])
    def look(case: dict[str, Any]) -> None:
        if not wanted - NOT_IN_THE_MODEL <= seen:
            seen.update(played(REAL, **case).state_steps)

    look()
    assert seen == wanted - NOT_IN_THE_MODEL


@pytest.mark.slow
@given(case=cases())
@settings(max_examples=3000)
def test_whatever_happens_in_many_examples(case: dict[str, Any]) -> None:
    is_right(case)


@pytest.mark.slow
@given(case=cases(fails=True))
@settings(max_examples=1000)
def test_devices_fail_in_many_examples(case: dict[str, Any]) -> None:
    is_right(case)
