"""A guest that panics says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.guest import machine

import avmm
from avmm.devices.pc.pvpanic import Pvpanic


def test_a_panic_is_told_and_other_events_are_not() -> None:
    calls: list[str] = []
    device = Pvpanic(lambda: calls.append("panicked"))
    assert device.read(0, 1) == 3
    for value in (0, 2, 4, 0xFE):
        device.write(0, 1, value)
    assert calls == []
    device.write(0, 1, 1)
    assert calls == ["panicked"]


@pytest.mark.lab
@pytest.mark.usefixtures("kvm", "nothing_left")
async def test_it_ends_the_run_with_the_status_of_a_crash(tmp_path: Path) -> None:
    async with machine(tmp_path, "mov dx, 0x505; mov al, 1; out dx, al; 1: hlt; jmp 1b") as vm:
        outcome = await vm.wait()
    assert (outcome.cause, outcome.status) == (avmm.Cause.CRASH, 134)
    assert str(outcome) == "crash, status 134 (the guest has panicked)"
