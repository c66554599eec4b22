"""What a live migration takes, in all and in downtime, against QEMU's microvm with the same guest.

Both move the bundled shell between two processes over a unix socket, each as fast as it goes, with
the same downtime allowed. The guest has written to all of its RAM, so no page is zero; it then
does nothing, or goes on writing pages. Afterwards it must answer on its console.

Downtime is from the vCPUs' stop at the source to their start at the destination: QEMU's events
STOP and RESUME tell it more exactly than its `query-migrate`, in whole milliseconds.
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
from statistics import median
from typing import Final

import trio

from avmm import guests
from avmm.bench import shell
from avmm.bench.qemu import QEMU
from avmm.bench.qmp import Qemu
from avmm.bench.row import Row
from avmm.errors import AvmmError, ConfigError
from avmm.machine import Machine

RATES: Final = (0, 200)
"""MiB of pages a second that the guest writes to meanwhile."""
TARGET_DOWNTIME: Final = 0.1
_WARM_SECONDS: Final = 0.5
"""How long it has been writing when the migration begins."""
_ENOUGH: Final = 0.4
"""As much of the rate must it have reached, standstill and first touches of pages included."""
_Times = tuple[float, float]
"""Total and downtime, in seconds."""


async def measure(memory: int, rounds: int, progress: Callable[[], None]) -> list[Row]:
    """Two rows a rate: medians over the rounds, and the median of the rounds' own ratios.

    `progress` is called at each of `steps(rounds)` steps. Raises `ConfigError` where there is no
    QEMU, `AvmmError` where a guest does not go on after its migration.
    """
    if shutil.which(QEMU) is None:
        raise ConfigError(f"{QEMU} is not installed (Debian: apt-get install qemu-system-x86)")
    rows = []
    for rate in RATES:
        pairs = []
        for _ in range(rounds):
            base = await _theirs(memory, rate)
            progress()
            pairs.append((await _ours(memory, rate), base))
            progress()
        name = f"{rate} MiB/s" if rate else "idle"
        for at, what in enumerate(("total", "downtime")):
            rows.append(
                Row(
                    f"{name}, {what}",
                    median(ours[at] for ours, _ in pairs) * 1e6,
                    median(base[at] for _, base in pairs) * 1e6,
                    median(ours[at] / base[at] for ours, base in pairs),
                )
            )
    return rows


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return 2 * rounds * len(RATES)


async def _ours(memory: int, rate: int) -> _Times:
    here, there = socket.socketpair()
    with there:
        fd = there.fileno()
        receiver = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs meanwhile
            [sys.executable, "-m", "avmm.bench.receiver", str(fd)],
            pass_fds=[fd],
            stdout=subprocess.PIPE,
        )
    try:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(here))
        async with stream, Machine(memory=memory, acpi=False) as vm:
            await _prepare(vm.console, memory, rate)
            report = await vm.migrate(stream, target_downtime=TARGET_DOWNTIME)
        said, _ = await trio.to_thread.run_sync(receiver.communicate)
    finally:
        receiver.kill()
        receiver.wait()
    _demand_alive(said.decode(), rate)
    return report.total, report.downtime


async def _theirs(memory: int, rate: int) -> _Times:
    options = ["-kernel", str(guests.path("shell")), "-machine", "acpi=off"]
    options += ["-m", f"{memory >> 20}M"]
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as name:
        folder = Path(name)
        line = f"unix:{folder}/line"
        with (
            # Stopped until somebody listens to its console.
            Qemu(folder, "source", [*options, "-S"]) as source,
            Qemu(folder, "destination", [*options, "-incoming", line]) as destination,
        ):
            async with await trio.open_unix_socket(source.console) as console:
                source.execute("cont")
                await _prepare(console, memory, rate)
                told = source.migrate(line, TARGET_DOWNTIME)
                downtime = destination.wait_for("RESUME") - source.wait_for("STOP")
            async with await trio.open_unix_socket(destination.console) as console:
                _demand_alive(await shell.ask(console, b"\r"), rate)
    return told["total-time"] / 1000, downtime


async def _prepare(console: trio.abc.Stream, memory: int, rate: int) -> None:
    await shell.fill(console, memory)
    if rate:
        await shell.begin_dirtying(console, rate)
        await trio.sleep(_WARM_SECONDS)


def _demand_alive(said: str, rate: int) -> None:
    if shell.PROMPT.decode() not in said or (rate and "wrote to" not in said):
        raise AvmmError(f"the guest does not go on after its migration: {said!r}")
    reached = re.search(r": (\d+) MiB/s", said)
    if rate and (reached is None or int(reached[1]) < rate * _ENOUGH):
        raise AvmmError(f"the guest was to write to {rate} MiB/s, and has not: {said!r}")
