"""`avmm bench stall`: what it takes for a stall, and the shape of what it prints."""

from __future__ import annotations

import gc
import json
import time

import pytest
import trio
from support.commands import avmm

from avmm.bench.stall import CASES, Lateness, ticker


async def test_what_keeps_trios_thread_is_seen_and_what_comes_before_is_not() -> None:
    with ticker() as beside:
        await seen(Lateness(beside))


async def seen(lateness: Lateness) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lateness.run)
        await trio.sleep(0.01)
        time.sleep(0.5)  # noqa: ASYNC251 - that is the point
        async with lateness.watched():
            time.sleep(0.05)  # noqa: ASYNC251
            assert not gc.isenabled()
        assert 0.04 < lateness.seconds < 0.4
        # It sleeps: that is no waiting for a core.
        assert lateness.blocked is None or 0.04 < lateness.blocked <= lateness.seconds
        assert gc.isenabled()
        assert lateness.beside < lateness.seconds, "that one does not wait for this thread"
        assert 0 < await lateness.idle() < 0.4
        nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("kvm")
def test_each_case_is_told() -> None:
    done = avmm("bench", "stall", "--rounds", "1", "--memory", "32M", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["case"] for row in rows] == list(CASES)
    for row in rows:
        assert set(row) == {"case", "ms", "most_ms", "blocked_ms", "beside_ms", "idle_ms"}
        assert row["ms"] == row["most_ms"] >= 0 < row["idle_ms"]
        assert row["blocked_ms"] is None or row["blocked_ms"] >= 0
