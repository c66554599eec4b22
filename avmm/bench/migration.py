"""The total time and the downtime of a live migration, compared with QEMU's microvm and the same
guest.

Both move the bundled shell between two processes over a unix socket, each as fast as it goes, with
the same downtime allowed. The guest has written to all of its RAM, so no page is zero; it then
does nothing, or goes on writing pages. Afterwards it must answer on its console.

Downtime is the time from the stop of the vCPUs at the source to their start at the destination.
QEMU's events STOP and RESUME give it more exactly than its `query-migrate`, which counts whole
milliseconds.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from avmm import guests
from avmm.bench import shell
from avmm.bench.qemu import QEMU
from avmm.bench.qmp import Qemu
from avmm.bench.row import BenchRow, SpeedRow, medians
from avmm.errors import AvmmError
from avmm.machine import Machine
from avmm.transfer.transports import connect

RATES: Final = (0, 200)
"""How much the guest writes meanwhile, as MiB of pages per second."""
TARGET_DOWNTIME: Final = 0.1
_WARM_SECONDS: Final = 0.5
"""How long the guest writes before the migration begins."""
_ENOUGH: Final = 0.4
"""The guest must have reached this share of the rate, counting its standstill and its first touch
of each page.
"""
_Measured = tuple[float, float, float]
"""Total time and downtime in microseconds, and how fast the guest wrote, in MiB per second."""


async def measure(
    memory: int, rounds: int, progress: Callable[[], None]
) -> list[BenchRow | SpeedRow]:
    """For each rate, two rows of medians over the rounds with the median of the rounds' own
    ratios, and one row that says how fast the guest wrote from before its migration until after
    it.

    `progress` is called at each of `steps(rounds)` steps. Raises `AvmmError` if a guest does not
    continue after its migration.
    """
    has_qemu = shutil.which(QEMU) is not None
    rows: list[BenchRow | SpeedRow] = []
    for rate in RATES:
        pairs: list[tuple[_Measured, _Measured | None]] = []
        for _ in range(rounds):
            base = await _theirs(memory, rate) if has_qemu else None
            progress()
            pairs.append((await _ours(memory, rate), base))
            progress()
        name = f"{rate} MiB/s" if rate else "idle"
        rows.append(BenchRow(f"{name}, total", *_medians(pairs, 0)))
        rows.append(BenchRow(f"{name}, downtime", *_medians(pairs, 1)))
        if rate:
            rows.append(SpeedRow("written, MiB/s", *_medians(pairs, 2)))
    return rows


def _medians(
    pairs: list[tuple[_Measured, _Measured | None]], at: int
) -> tuple[float, float | None, float | None]:
    return medians([(ours[at], None if base is None else base[at]) for ours, base in pairs])


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return 2 * rounds * len(RATES)


async def _ours(memory: int, rate: int) -> _Measured:
    here, there = socket.socketpair()
    with there:
        fd = there.fileno()
        receiver = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs meanwhile
            [sys.executable, "-m", "avmm.bench.receiver", str(fd)],
            pass_fds=[fd],
            stdout=subprocess.PIPE,
        )
    try:
        async with (
            await connect(f"fd:{here.detach()}") as stream,
            Machine(memory=memory, acpi=False) as vm,
        ):
            await _prepare(vm.console, memory, rate)
            report = await vm.migrate(stream, target_downtime=TARGET_DOWNTIME)
        said, _ = await trio.to_thread.run_sync(receiver.communicate)
    finally:
        receiver.kill()
        receiver.wait()
    return report.total * 1e6, report.downtime * 1e6, _written(said.decode(), rate)


async def _theirs(memory: int, rate: int) -> _Measured:
    options = ["-kernel", str(guests.path("shell")), "-machine", "acpi=off"]
    options += ["-m", f"{memory >> 20}M"]
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as name:
        folder = Path(name)
        line = f"unix:{folder}/line"
        with (
            # It stays stopped until its console is connected.
            Qemu(folder, "source", [*options, "-S"]) as source,
            Qemu(folder, "destination", [*options, "-incoming", line]) as destination,
        ):
            async with await trio.open_unix_socket(source.console) as console:
                source.execute("cont")
                await _prepare(console, memory, rate)
                told = source.migrate(line, TARGET_DOWNTIME)
                downtime = destination.wait_for("RESUME") - source.wait_for("STOP")
            async with await trio.open_unix_socket(destination.console) as console:
                written = _written(await shell.ask(console, b"\r"), rate)
    return told["total-time"] * 1e3, downtime * 1e6, written


async def _prepare(console: trio.abc.Stream, memory: int, rate: int) -> None:
    await shell.fill(console, memory)
    if rate:
        await shell.begin_dirtying(console, rate)
        await trio.sleep(_WARM_SECONDS)


def _written(said: str, rate: int) -> float:
    """How fast the guest reports that it wrote, in MiB per second. Raises `AvmmError` if it did
    not continue after its migration, or wrote too slowly.
    """
    if shell.PROMPT.decode() not in said:
        raise AvmmError(f"the guest did not continue after its migration: {said!r}")
    if not rate:
        return 0.0
    reached = re.search(r"wrote to .*: (\d+) MiB/s", said)
    if reached is None or int(reached[1]) < rate * _ENOUGH:
        raise AvmmError(f"the guest was told to write {rate} MiB/s, but wrote less: {said!r}")
    return float(reached[1])
