"""The trips of docs/architecture.md, counted: how many of avmm's files an exit passes through."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

import pytest

import avmm
from avmm import guests

PACKAGE = Path(avmm.__file__).parent
ADDRESS = 0xD000_0000
MOST = 5
"""Files from `KVM_RUN` to a device and back, the device's own among them."""


class Counter(avmm.Device):
    """Records, between its first read and its last, which files the vCPU's thread enters."""

    def __init__(self, reads: int) -> None:
        self.left = reads
        self.files: set[str] = set()

    def read(self, offset: int, size: int) -> int:
        self.left -= 1
        sys.setprofile(self.note if self.left else None)
        return 7

    def note(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and "avmm vCPU" in threading.current_thread().name:
            self.files.add(frame.f_code.co_filename)


@pytest.mark.usefixtures("kvm")
async def test_an_exit_passes_through_few_files() -> None:
    words = f"kind=mmio op=read width=4 addr={ADDRESS:#x} ring=0 count=90 warmup=10"
    device = Counter(100)
    place = avmm.mmio(device, ADDRESS, 4096)
    async with avmm.Machine(
        kernel=guests.path("exits"), cmdline=words, memory="16M", devices=[place]
    ) as vm:
        await vm.wait()
    assert device.left == 0
    ours = {name for name in device.files if Path(name).is_relative_to(PACKAGE)}
    entered = {str(Path(name).relative_to(PACKAGE)) for name in ours}
    assert entered <= {"loop.py", "vcpu/exits.py", "bus/space.py", "kvm/run.py"}, entered
    assert len(device.files) <= MOST, device.files
