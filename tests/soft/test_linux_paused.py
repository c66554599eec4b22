"""A Linux that boots on the software engine, paused at random moments and moved to new machines by
its state: it boots as if nothing had been, and its memory and disks are right."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio
from support import stock

import avmm

pytestmark = [
    pytest.mark.usefixtures("kvm", "nothing_left"),
    pytest.mark.timeout(600),
]

MANY = int(os.environ.get("AVMM_PAUSES", "1000"))
SUMS = (
    "d=$(dd if=/dev/zero bs=1M count=20 2>/dev/null | sha256sum | cut -c1-8); echo sum $d; exit 7"
)
RIGHT = "sum cd52d81e"


def settings(cpus: int) -> dict[str, object]:
    return {
        **stock.boot_files(stock.GUEST),
        "memory": "128M",
        "cpus": cpus,
        "engine": "soft",
        "cmdline": "console=ttyS0 quiet panic=-1",
    }


class Told:
    """What the guest says, in whichever machine it is; it is told what to do at its prompt."""

    def __init__(self) -> None:
        self.text = ""
        self._is_asked = False

    async def listen(self, vm: avmm.Machine) -> None:
        async for data in vm.console:
            self.text += data.decode()
            if "avmm:/root# " in self.text and not self._is_asked:
                self._is_asked = True
                await vm.console.send_all(SUMS.encode() + b"\r")


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("pauses", [20, pytest.param(MANY, marks=pytest.mark.slow)])
async def test_pauses_at_random_moments(cpus: int, pauses: int) -> None:
    """Of the whole boot, and of the work after it, boot after boot until there were enough."""
    moments, done = random.Random(14), 0
    while done < pauses:
        told = Told()
        async with avmm.Machine(**settings(cpus)) as vm, trio.open_nursery() as nursery:  # type: ignore[arg-type]
            nursery.start_soon(told.listen, vm)
            while vm.state is avmm.Runstate.RUNNING:
                await trio.sleep(moments.expovariate(1 / 0.004))
                try:
                    async with vm.paused(deadline=20):
                        done += 1
                except avmm.RunstateError:  # it has ended meanwhile
                    break
            outcome = await vm.wait()
        assert outcome.status == 7, told.text
        assert RIGHT in told.text


@pytest.mark.parametrize("cpus", [pytest.param(1, marks=pytest.mark.slow), 2])
async def test_saved_at_random_moments_and_loaded_into_a_new_machine(
    tmp_path: Path, cpus: int
) -> None:
    moments, told = random.Random(15), Told()
    file, outcome = tmp_path / "guest.snap", None
    machine: object = avmm.Machine(**settings(cpus))  # type: ignore[arg-type]
    for _ in range(200):
        async with machine as vm, trio.open_nursery() as nursery:  # type: ignore[attr-defined]
            nursery.start_soon(told.listen, vm)
            with trio.move_on_after(moments.uniform(0.2, 1.2)):
                outcome = await vm.wait()
            if outcome is None:
                async with vm.paused(deadline=20):
                    await vm.snapshot(file)
                    vm.stop()
        if outcome is not None:
            break
        machine = avmm.restore(file)
    assert outcome is not None
    assert outcome.status == 7, told.text
    assert RIGHT in told.text
