"""Save at any exit, load, run on: the log and the checksum are the undisturbed run's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings

from model.production import REAL
from model.programs import SHAPES
from model.properties import (
    Believes,
    can_tell,
    drained_at,
    drains,
    each_exit_in_turn,
    requested_at,
    requesting,
)
from model.vcpu import Host, Op

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("quiet_log")]
HOSTS = [
    pytest.param(Host(), id="this class of host"),
    pytest.param(Host(out_past=False), id="stock kvm_amd"),
    pytest.param(Host(out_past=False, store_past=False, by_reason=True), id="arm64"),
    pytest.param(Host(flags="honest", sample_early=True), id="with the flag"),
    pytest.param(Host(flags="sparing"), id="with the series' change"),
]


@given(case=drains)
@settings(max_examples=1500, deadline=None)
def test_a_drained_vcpu_is_what_its_state_says(case: dict[str, Any]) -> None:
    assume(can_tell(case["host"], case["believes"], case["program"], case["onto"]))
    drained_at(REAL, **case)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("op", SHAPES, ids=lambda op: f"{op.kind}{op.parts or ''}")
def test_each_exit_in_turn(op: Op, host: Host) -> None:
    program = (Op("in", 4), op, op, Op("in", 4), Op("out", 1))
    assert each_exit_in_turn(REAL, program, host) >= 3


@given(case=requesting)
@settings(max_examples=1000, deadline=None)
def test_a_loop_that_is_asked_at_any_moment_parks_drained(case: dict[str, Any]) -> None:
    assume(can_tell(case["host"], case["believes"], case["program"]))
    requested_at(REAL, **case)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("op", SHAPES, ids=lambda op: f"{op.kind}{op.parts or ''}")
def test_a_pause_at_each_point_of_the_loop(op: Op, host: Host) -> None:
    program = (op, Op("in", 1))
    late = [True, False, True]
    points, _ = requested_at(REAL, program, host, Believes(), {}, late)
    for number in range(1, points + 1):
        requested_at(REAL, program, host, Believes(), {number: ["pause"]}, late)
