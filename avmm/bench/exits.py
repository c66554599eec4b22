"""What an exit costs: each of avmm's ways to serve one, compared with a loop in C that does
nothing else.

The bundled guest `exits` measures itself with the TSC, so the figures do not include starting it.
Each round measures every way once, the C loop first. The report gives medians over the rounds. The
ratio is the median of the rounds' own ratios, because on a busy machine rounds differ more than
ways do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from statistics import median
from typing import Final

import trio

from avmm import arch, guests
from avmm.bench.row import BenchRow
from avmm.bus.space import Placement, mmio, pio
from avmm.config import MachineConfig
from avmm.devices.base import Device, Host
from avmm.engine import AUTO
from avmm.errors import AvmmError
from avmm.machine import Machine
from avmm.parts import build, dismantle

PORT: Final = 0xE0
ADDRESS: Final = arch.host().own_window.start


class AtOnce(Device):
    """Answers in the vCPU's thread."""

    def write(self, offset: int, size: int, value: int) -> None:
        return None


class InTask(Device):
    """Answers in a trio task that waits for nothing."""

    async def write(self, offset: int, size: int, value: int) -> None:
        return None


class Awaiting(Device):
    """Answers in a trio task that first waits for one round of trio's scheduler."""

    async def write(self, offset: int, size: int, value: int) -> None:
        await trio.lowlevel.checkpoint()


class InC(Device):
    """Leaves the register to C."""

    def attach(self, host: Host) -> None:
        super().attach(host)
        host.registers.storage(0, 1)


class Published(Device):
    """Publishes the page in which the register is."""

    def attach(self, host: Host) -> None:
        super().attach(host)
        host.registers.page(0)


WAYS: Final[dict[str, Callable[[], Device]]] = {
    "in C": InC,
    "at once": AtOnce,
    "in a task": InTask,
    "awaiting": Awaiting,
}


async def measure(count: int, rounds: int, progress: Callable[[], None]) -> list[BenchRow]:
    """All cases, `count` exits in each of `rounds` rounds; `progress` is called at each step.

    Cancelling it ends the guest that runs. The C loop's rounds block the program.
    """
    rows = []
    for kind in ("pio", "mmio"):
        for ring in (0, 3):
            raw: list[float] = []
            ours: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                raw.append(await measure_raw(config(kind, ring, count)))
                progress()
                for way, device in WAYS.items():
                    ours[way].append(await served(config(kind, ring, count), kind, device()))
                    progress()
            for way, times in ours.items():
                ratio = median(us / base for us, base in zip(times, raw, strict=True))
                rows.append(
                    BenchRow(f"{kind} ring{ring} {way}", median(times), median(raw), ratio)
                )
    return rows + [await published(ring, count, rounds, progress) for ring in (0, 3)]


async def published(ring: int, count: int, rounds: int, progress: Callable[[], None]) -> BenchRow:
    """Reads of a published page, which make no exit, next to reads that make one."""
    raw, ours = [], []
    for _ in range(rounds):
        raw.append(await measure_raw(config("mmio", ring, count, op="read")))
        progress()
        ours.append(await served(config("mmio", ring, count, op="read"), "mmio", Published()))
        progress()
    ratio = median(us / base for us, base in zip(ours, raw, strict=True))
    return BenchRow(f"mmio ring{ring} published", median(ours), median(raw), ratio)


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return rounds * (4 * (1 + len(WAYS)) + 2 * 2)


def config(
    kind: str, ring: int, count: int, engine: str = AUTO, op: str = "write"
) -> MachineConfig:
    """A guest that makes `count` exits of one kind."""
    words = f"kind={kind} op={op} width=1 port={PORT:#x} addr={ADDRESS:#x} ring={ring}"
    cmdline = f"{words} count={count} warmup={count // 10}"
    return MachineConfig(
        kernel=guests.path("exits"), cmdline=cmdline, memory=16 << 20, engine=engine
    )


async def measure_raw(config: MachineConfig) -> float:
    """How many microseconds an exit takes in the C loop, which blocks the program."""
    parts = await build(config)
    try:
        return _microseconds(parts.vcpus[0].run_raw(), parts.clock_khz)
    finally:
        with trio.CancelScope(shield=True):
            await dismantle(parts)


async def served(config: MachineConfig, kind: str, device: Device) -> float:
    """How many microseconds an exit takes that `device` answers."""
    output = b""
    async with Machine(config, devices=[_place(kind, device)]) as vm:
        async for data in vm.console:
            output += data
        khz = vm.tsc_khz
    return _microseconds(output, khz)


def _place(kind: str, device: Device) -> Placement:
    return pio(device, PORT, 1) if kind == "pio" else mmio(device, ADDRESS, 4096)


def _microseconds(output: bytes, khz: int) -> float:
    """The time of one exit in microseconds, from the guest's result line."""
    match = re.search(rb"exits .*\bcount=(\d+) .*\bcycles=(\d+)", output)
    if match is None:
        raise AvmmError(f"the guest 'exits' printed no result, only {output!r}")
    return int(match[2]) / int(match[1]) / khz * 1000
