"""The clocks of a guest that was saved: they go on from where they stood, or catch up."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
from support.commands import AVMM
from support.guest import machine

import avmm
from avmm.arch.x86_64.kvm import X86Vm

pytestmark = [
    pytest.mark.lab,
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("kvm", "nothing_left"),
]

SECOND = 1_000_000_000
IDLE = "sti; 1: hlt; jmp 1b"


async def saved(tmp_path: Path) -> dict[str, Any]:
    async with machine(tmp_path, IDLE, cpus=2) as vm, vm.paused():
        return vm.save()


def clock(vm: avmm.Machine) -> int:
    kvm = vm._inside.parts.vm
    assert isinstance(kvm, X86Vm)
    return kvm.clock()


def earlier(state: dict[str, Any], seconds: float) -> dict[str, Any]:
    """As if the state had been saved so much earlier."""
    changed = copy.deepcopy(state)
    changed["vm"]["real"] -= int(seconds * SECOND)
    return changed


@pytest.mark.parametrize(
    ("chosen", "passed", "least", "most"),
    [
        ({}, 100, 0, 50),
        ({"clock": "guest"}, 100, 0, 50),
        ({"clock": "host"}, 100, 100, 150),
        ({"clock": "host"}, -1000, 0, 50),
    ],
    ids=["as it was", "guest", "host", "host, from the future"],
)
async def test_kvmclock(
    tmp_path: Path, chosen: dict[str, str], passed: int, least: int, most: int
) -> None:
    state = await saved(tmp_path)
    settings: dict[str, Any] = {"cpus": 2, **chosen}
    async with machine(tmp_path, IDLE, state=earlier(state, passed), **settings) as vm:
        assert least <= (clock(vm) - state["vm"]["clock"]) / SECOND < most


@pytest.mark.lab(only="stock")
async def test_the_tsc_keeps_pace_with_kvmclock(tmp_path: Path) -> None:
    """Not every KVM sets a guest's TSC."""
    state = await saved(tmp_path)
    vm_ = machine(tmp_path, IDLE, cpus=2, state=earlier(state, 100), clock="host")
    async with vm_ as vm, vm.paused():
        again = vm.save()
    for before, after in zip(state["vcpus"], again["vcpus"], strict=True):
        ticks = dict(after["msrs"])[0x10] - dict(before["msrs"])[0x10]
        assert 100 <= ticks / before["tsc_khz"] / 1000 < 150
    assert len({vcpu["tsc_offset"] for vcpu in again["vcpus"]}) == 1


async def test_a_snapshot_whose_guest_catches_up(tmp_path: Path) -> None:
    file = tmp_path / "file"
    async with machine(tmp_path, IDLE) as vm:
        before = clock(vm)
        await vm.snapshot(file)
    await trio.sleep(1.5)  # the time that passes is what this is about
    for chosen, least, most in (("host", 1.5, 30), ("guest", 0, 1.5)):
        async with avmm.restore(file, clock=chosen) as vm:
            assert least <= (clock(vm) - before) / SECOND < most


async def test_a_state_that_does_not_tell_when_it_was_saved(tmp_path: Path) -> None:
    state = await saved(tmp_path)
    del state["vm"]["real"]
    async with machine(tmp_path, IDLE, cpus=2, state=state):
        pass
    with pytest.raises(
        avmm.StateError, match="it does not tell when it was saved, as clock 'host'"
    ):
        async with machine(tmp_path, IDLE, cpus=2, state=state, clock="host"):
            pass


async def test_a_machine_that_boots_has_nothing_to_catch_up_with(tmp_path: Path) -> None:
    with pytest.raises(avmm.ConfigError, match="clock 'host': it is for a machine that continues"):
        async with machine(tmp_path, IDLE, clock="host"):
            pass
    with pytest.raises(avmm.ConfigError, match="clock 'ntp': expected one of guest, host"):
        avmm.restore("file", clock="ntp")


def test_the_command_that_boots_refuses_it(tmp_path: Path) -> None:
    config = tmp_path / "guest.toml"
    config.write_text('clock = "host"\n')
    done = subprocess.run(
        [*AVMM, "run", "--config", str(config)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, "it is for a machine that continues" in done.stderr) == (2, True)
