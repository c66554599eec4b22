"""Nothing lost, nothing twice: the torture guest, moved to a new process at its exits.

What is moved and compared is told in `support/torture.py`, and in `support/torture_moves.py` for
a guest that goes from process to process by migration, again and again. The default suite samples
the exits, the slow one takes every single one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab.plugin import KIND

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm")]

SINGLE_REENTRY_FAILS_FROM = 115
"""Just before the first access of which one re-entry is not enough (an access in fragments)."""


def torture(
    *options: str, timeout: int = 55, program: str = "torture"
) -> subprocess.CompletedProcess[str]:
    """Run it; where it hangs, it says where a while before it is killed."""
    if KIND in os.environ:
        timeout *= 2  # with time to say so, where it hangs, and to be run again
    command = [sys.executable, "-W", "ignore", "-m", f"support.{program}", *options]
    until = {"AVMM_TORTURE_UNTIL": str(time.monotonic() + 0.85 * timeout)}
    try:
        return subprocess.run(
            command,
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=os.environ | until,
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode()
        pytest.fail(f"TimeoutExpired: {options} after {timeout} s; it said:\n{said}")


@pytest.mark.parametrize(
    ("cpus", "every", "first"),
    [
        pytest.param(1, 9, 2, marks=pytest.mark.slow),
        pytest.param(2, 31, 3, marks=pytest.mark.slow),
        pytest.param(3, 53, 11, marks=pytest.mark.slow),
        (4, 97, 5),
    ],
)
@pytest.mark.timeout(180)
def test_a_guest_moved_at_an_exit_is_as_if_it_had_not_been(
    cpus: int, every: int, first: int
) -> None:
    done = torture(
        *("--cpus", str(cpus), "--every", str(every), "--first", str(first)), timeout=170
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > 10


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "cpus", [1, 2, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (3, 4))]
)
def test_at_every_single_exit(cpus: int) -> None:
    done = torture("--cpus", str(cpus), timeout=2390)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[1]) > 300 * cpus


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_strings_longer_than_one_exit() -> None:
    done = torture("--long", "1", "--every", "101", timeout=590)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.timeout(120)
def test_it_fails_without_a_drain() -> None:
    done = torture("--drain", "none", timeout=110)
    assert done.returncode == 1
    assert "moved at access" in done.stderr


@pytest.mark.timeout(120)
def test_it_fails_with_a_single_reentry() -> None:
    done = torture("--drain", "single", "--first", str(SINGLE_REENTRY_FAILS_FROM), timeout=110)
    assert done.returncode == 1
    assert "moved at access" in done.stderr


def moves(cpus: int, moves: int, *options: str, timeout: int) -> subprocess.CompletedProcess[str]:
    loops = 2 + moves // 3  # with some room, as its moves must not outlast the guest
    return torture(
        *("--cpus", str(cpus), "--loops", str(loops), "--moves", str(moves), "--step", "13"),
        *options,
        timeout=timeout,
        program="torture_moves",
    )


@pytest.mark.parametrize("cpus", [1, pytest.param(2, marks=pytest.mark.lab(long=True))])
def test_migrated_again_and_again(cpus: int) -> None:
    done = moves(cpus, 9, timeout=55)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "ok 9\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("cpus", "times"), [(1, 100), (2, 100), pytest.param(2, 1000, marks=pytest.mark.exhaustive)]
)
def test_migrated_many_times(cpus: int, times: int) -> None:
    done = moves(cpus, times, timeout=890)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"ok {times}\n"


@pytest.mark.parametrize("times", [9, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.timeout(180)
def test_through_a_snapshot_again_and_again(tmp_path: Path, times: int) -> None:
    done = moves(2, times, "--snapshots", str(tmp_path), timeout=55 if times == 9 else 175)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"ok {times}\n"


def test_migrations_without_a_drain_are_seen() -> None:
    done = moves(1, 5, "--drain", "none", timeout=55)
    assert done.returncode == 1
    assert "window" in done.stderr or "the guest said" in done.stderr
