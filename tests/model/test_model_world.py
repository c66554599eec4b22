"""Several vCPUs, their threads, bridges and the coordinator, under drawn schedules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings

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
