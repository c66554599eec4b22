"""The bundled shell at its prompt: nothing wakes it, and its clock is right all the same."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path

import pytest
import trio
from lab.plugin import KIND

import avmm

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm", "nothing_left")]

IN_LAB = KIND in os.environ
IDLE_SECONDS = 10.0 if IN_LAB else 2.0
LATE = 1.0 if IN_LAB else 0.1
"""How many seconds later the answer to one command may come than that to another."""


async def prompt(vm: avmm.Machine) -> bytes:
    said = b""
    while not said.endswith(b"avmm> "):
        said += await vm.console.receive_some()
    return said


async def uptime(vm: avmm.Machine) -> tuple[float, float]:
    """What the guest's clock shows, and a clock of the host's, in seconds."""
    await vm.console.send_all(b"uptime\r")
    said, now = await prompt(vm), time.monotonic()
    assert b"not ticking" not in said
    shown = re.search(rb"up (\d+):(\d+):(\d+\.\d+)", said)
    assert shown is not None
    return 3600 * int(shown[1]) + 60 * int(shown[2]) + float(shown[3]), now


def wakeups() -> int:
    """How often the vCPU's thread has gone to sleep."""
    (thread,) = (each for each in threading.enumerate() if each.name == "avmm vCPU 0")
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(re.findall(r"^voluntary_ctxt_switches:\t(\d+)", status, re.MULTILINE)[0])


async def test_an_idle_shell_sleeps_and_its_clock_goes_on() -> None:
    async with avmm.Machine(memory="16M") as vm:
        await prompt(vm)
        shown, began = await uptime(vm)
        await trio.sleep(0.2)  # the last tick of a clock that stops comes within 55 ms
        before = wakeups()
        await trio.sleep(IDLE_SECONDS)
        assert wakeups() - before <= 2
        shown_later, later = await uptime(vm)
        assert shown_later - shown == pytest.approx(later - began, abs=LATE, rel=0.02)
