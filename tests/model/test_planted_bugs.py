"""The suite finds the bugs that it plants: a test of the tests.

Each property runs on examples that are the same in every run, first on avmm's source as it is,
then with each bug. What counts as found is `Broken` alone, so a mutant that merely crashes is
not taken for one that was found.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings

from model.mutants import BUGS, FINDERS, Bug
from model.production import Production, mutate
from model.properties import can_tell
from model.vcpu import Broken

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("quiet_log")]
UNPLANTED = 200
"""Examples of each property on unchanged source; test_model_*.py has thousands."""


def examined(code: Production, finder: str, most: int = 0) -> tuple[int, Broken | None]:
    """The property on as many examples as it takes: how many, and what it found."""
    strategy, holds, enough = FINDERS[finder]
    count = 0
    found: list[Broken] = []

    @given(case=strategy)
    @settings(
        max_examples=most or enough,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    def look(case: dict[str, Any]) -> None:
        nonlocal count
        several = case["several"] if "several" in case else [case["program"]]
        host, believes, onto = case["host"], case["believes"], case.get("onto")
        assume(all(can_tell(host, believes, program, onto) for program in several))
        if found:
            raise found[0]  # hypothesis plays a failure again: once is enough
        count += 1
        try:
            holds(code, case)
        except Broken as broken:
            found.append(broken)
            raise

    with suppress(Broken):
        look()
    return count, found[0] if found else None


@pytest.mark.parametrize("finder", FINDERS)
def test_without_a_bug_nothing_is_found(finder: str) -> None:
    count, found = examined(mutate({}), finder, UNPLANTED)
    assert found is None, found
    assert count > UNPLANTED // 2


SLOW = {"resume forgotten after a cancellation"}
BY_CHANCE = [
    pytest.param(bug, id=bug.name, marks=[pytest.mark.slow] * (bug.name in SLOW))
    for bug in BUGS
    if bug.finder in FINDERS
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what it drops
@pytest.mark.parametrize("bug", BY_CHANCE)
def test_a_planted_bug_is_found(bug: Bug, record_property: Any) -> None:
    count, found = examined(bug.planted(), bug.finder)
    assert found is not None, f"{count} examples did not find it"
    record_property("examples", count)
    print(f"{bug.name}: found by example {count}: {found}")
