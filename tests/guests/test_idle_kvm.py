"""The bundled shell at its prompt: nothing wakes it, and its clock is right all the same."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import trio
from lab.plugin import KIND

import avmm

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm", "nothing_left")]

IDLE_SECONDS = 10.0 if KIND in os.environ else 2.0


async def prompt(vm: avmm.Machine) -> bytes:
    said = b""
    while not said.endswith(b"avmm> "):
        said += await vm.console.receive_some()
    return said


class Reading(NamedTuple):
    """What the guest's clock shows, and between which times of the host's that was. In seconds."""

    shown: float
    after: float
    before: float


async def uptime(vm: avmm.Machine) -> Reading:
    after = time.monotonic()
    await vm.console.send_all(b"uptime\r")
    said, before = await prompt(vm), time.monotonic()
    assert b"not ticking" not in said
    shown = re.search(rb"up (\d+):(\d+):(\d+\.\d+)", said)
    assert shown is not None
    seconds = 3600 * int(shown[1]) + 60 * int(shown[2]) + float(shown[3])
    return Reading(seconds, after, before)


def wakeups() -> int:
    """How often the vCPU's thread has gone to sleep."""
    (thread,) = (each for each in threading.enumerate() if each.name == "avmm vCPU 0")
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\t(\d+)", status, re.MULTILINE)[0])


async def test_an_idle_shell_sleeps_and_its_clock_goes_on() -> None:
    async with avmm.Machine(memory="16M") as vm:
        await prompt(vm)
        first = await uptime(vm)
        await trio.sleep(0.2)  # the last tick of a clock that stops comes within 55 ms
        before = wakeups()
        await trio.sleep(IDLE_SECONDS)
        assert wakeups() - before <= 2
        second = await uptime(vm)
        passed = second.shown - first.shown
        assert 0.98 * (second.after - first.before) - 0.02 <= passed
        assert passed <= 1.02 * (second.before - first.after) + 0.02
