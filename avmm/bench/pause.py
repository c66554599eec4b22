"""What a pause costs: the time from the request until all vCPUs are parked, compared with a kick
in C.

The guest `exits kind=spin` counts for ever on all its CPUs. So when a vCPU is asked to pause, it
is either in the guest, or it waits for a core on which to run or to return from the last pause. In
each round the C kick is measured first. The report gives medians over the rounds, and the median
of the rounds' own ratios.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Final

import trio

from avmm import guests
from avmm.bench.row import BenchRow
from avmm.config import MachineConfig
from avmm.engine import AUTO
from avmm.kvm.kick import install_kick
from avmm.machine import Machine
from avmm.parts import build, dismantle

CPUS: Final = (1, 2, 4, 16)
_FOR_EVER: Final = b"\xf3\x90\xeb\xfc"
"""`1: pause; jmp 1b`"""
_GUEST_SECONDS: Final = 0.0005
"""How long the guest runs between two pauses: long enough for the vCPUs to be in the guest again
or to wait for a core. With sixteen vCPUs on two cores, some have not come back from the last
pause.
"""


async def measure(count: int, rounds: int, progress: Callable[[], None]) -> list[BenchRow]:
    """All cases, `count` pauses in each of `rounds` rounds; `progress` is called at each step.

    The C kicks block the program; cancelling takes effect between them.
    """
    rows = []
    for cpus in CPUS:
        raw, ours = [], []
        for _ in range(rounds):
            raw.append(await kicks(count))
            progress()
            ours.append(await pauses(cpus, count))
            progress()
        ratio = median(us / base for us, base in zip(ours, raw, strict=True))
        rows.append(BenchRow(f"{cpus} vCPU" + "s" * (cpus > 1), median(ours), median(raw), ratio))
    return rows


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return 2 * len(CPUS) * rounds


def _config(cpus: int, engine: str) -> MachineConfig:
    kernel, cmdline = guests.path("exits"), "kind=spin count=0"
    return MachineConfig(kernel=kernel, cmdline=cmdline, memory=16 << 20, cpus=cpus, engine=engine)


async def kicks(count: int, engine: str = AUTO) -> float:
    """The median of `count` kicks in C, in microseconds. They block the program."""
    install_kick()
    with tempfile.NamedTemporaryFile() as image:
        image.write(_FOR_EVER)
        image.flush()
        config = MachineConfig.make(
            kernel=image.name, flat="long@0x100000", memory="16M", engine=engine
        )
        parts = await build(config)
    try:
        return median(parts.vcpus[0].kick_raw(count)) / 1000
    finally:
        with trio.CancelScope(shield=True):
            await dismantle(parts)


async def pauses(cpus: int, count: int, engine: str = AUTO) -> float:
    """The median of `count` pauses of a guest with so many CPUs, in microseconds."""
    times = []
    async with Machine(_config(cpus, engine)) as vm:
        counters = vm.memory.view(0x9000, 64 * cpus)
        while not all(counters[64 * cpu] for cpu in range(cpus)):
            await trio.lowlevel.checkpoint()
        counters.release()
        for _ in range(count):
            await trio.sleep(_GUEST_SECONDS)
            start = time.perf_counter()
            async with vm.paused():
                times.append(time.perf_counter() - start)
    return median(times) * 1e6
