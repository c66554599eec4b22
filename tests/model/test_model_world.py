"""Several vCPUs, their threads, bridges and the coordinator, under drawn schedules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings

from model.production import REAL
from model.properties import can_tell
from model.schedules import cases, played

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("quiet_log")]


@given(case=cases())
@settings(max_examples=1500, deadline=None)
def test_whatever_happens_when_nothing_is_lost(case: dict[str, Any]) -> None:
    assume(all(can_tell(case["host"], case["believes"], program) for program in case["several"]))
    played(REAL, **case)


@given(case=cases(fails=True))
@settings(max_examples=600, deadline=None)
def test_a_device_that_fails_leaves_the_others_right(case: dict[str, Any]) -> None:
    assume(all(can_tell(case["host"], case["believes"], program) for program in case["several"]))
    played(REAL, **case)
