"""What snapshots and clones cost. Writing a snapshot is compared with QEMU, restores and clones
with a boot.

**Writing**: the bundled shell has written to all of its RAM. QEMU's microvm with the same guest
migrates into a file, which is then synced like avmm's file. This is left out if QEMU is not
installed.

**Restores and clones** are timed in this process, until the guest continues: the guest `exits
kind=spin` counts at a place in RAM that is watched. The baseline is the boot of the same guest.
For a guest with eight times the RAM, the baseline is the restore of the small guest.

**Resident memory** is what each of the last tenth of many clones of an idle shell adds. The
baseline is what booting that shell added.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Final

import trio

from avmm import guests
from avmm.arrivals import restore
from avmm.bench import shell
from avmm.bench.qemu import QEMU
from avmm.bench.qmp import Qemu
from avmm.bench.row import BenchRow, SizeRow
from avmm.config import MachineConfig
from avmm.machine import Machine

_COUNTER: Final = 0x9000
_LOOK: Final = 0.0001
"""Seconds between two looks at the counter. Looking all the time would take a core away from the
guest.
"""
_DOWNTIME: Final = 0.1
_LARGE: Final = 8
"""The large guest has this many times the RAM of the small one."""


async def measure(
    memory: int, rounds: int, clones: int, progress: Callable[[], None]
) -> list[BenchRow | SizeRow]:
    """All rows: medians over the rounds, and the median of the rounds' own ratios.

    `progress` is called at each of `steps(rounds, clones)` steps.
    """
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as name:
        folder = Path(name)
        rows: list[BenchRow | SizeRow] = []
        if shutil.which(QEMU) is not None:
            rows += await _writing(folder, memory, rounds, progress)
        rows += await _going_on(folder, memory, rounds, progress)
    rows.append(await _resident(memory, clones, progress))
    return rows


def steps(rounds: int, clones: int) -> int:
    """How often `measure` calls `progress` if QEMU is installed."""
    return 3 * rounds + clones


# -- writing -----------------------------------------------------------------------------------


async def _writing(
    folder: Path, memory: int, rounds: int, progress: Callable[[], None]
) -> list[BenchRow]:
    pairs = []
    for _ in range(rounds):
        base = await _theirs(folder, memory)
        progress()
        async with Machine(memory=memory, acpi=False) as vm:
            await shell.fill(vm.console, memory)
            _make_room(folder / "ours", memory)
            start = time.perf_counter()
            downtime = await vm.snapshot(folder / "ours")
            pairs.append(((time.perf_counter() - start, downtime), base))
        progress()
    return [
        _row(f"write, {what}", [(ours[at], base[at]) for ours, base in pairs])
        for at, what in enumerate(("total", "downtime"))
    ]


async def _theirs(folder: Path, memory: int) -> tuple[float, float]:
    """QEMU's total time and downtime, in seconds."""
    options = ["-kernel", str(guests.path("shell")), "-machine", "acpi=off", "-S"]
    with Qemu(folder, "qemu", [*options, "-m", f"{memory >> 20}M"]) as qemu:
        async with await trio.open_unix_socket(qemu.console) as console:
            qemu.execute("cont")
            await shell.fill(console, memory)
            _make_room(folder / "theirs", memory)
            start = time.perf_counter()
            told = qemu.migrate(f"exec:cat > {folder}/theirs", _DOWNTIME)
            fd = os.open(folder / "theirs", os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(fd)
            os.close(fd)
            return time.perf_counter() - start, max(1, told["downtime"]) / 1000


def _make_room(file: Path, size: int) -> None:
    """Write the file and remove it, so that in the first round, too, its memory was in use a
    moment before.

    On a virtual host, the outer host may have lent free memory to others. Whoever uses it first
    waits for it, ten times as long as it takes to write to the cache. This way both sides find
    enough memory that is present.
    """
    with file.open("wb") as old:
        for _ in range(size >> 20):
            old.write(bytes(1 << 20))
    file.unlink()


# -- restores and clones -----------------------------------------------------------------------


async def _going_on(
    folder: Path, memory: int, rounds: int, progress: Callable[[], None]
) -> list[BenchRow]:
    boots, restores, large, clones = [], [], [], []
    for size, name in ((memory, "small"), (_LARGE * memory, "large")):
        async with Machine(_spinning(size)) as vm:
            await _counts(vm)
            await vm.snapshot(folder / name)
    async with Machine(_spinning(memory)) as origin:
        await _counts(origin)
        await _timed(origin.clone)  # the first makes the origin copy-on-write
        for _ in range(rounds):
            async with origin.paused():  # so that it does not take a core away from the others
                boots.append(await _timed(lambda: Machine(_spinning(memory))))
                restores.append(await _timed(lambda: restore(folder / "small")))
                large.append(await _timed(lambda: restore(folder / "large")))
                clones.append(await _timed(origin.clone))
            progress()
    return [
        _row("restore", list(zip(restores, boots, strict=True))),
        _row(f"restore, {_LARGE} x RAM", list(zip(large, restores, strict=True))),
        _row("clone", list(zip(clones, boots, strict=True))),
    ]


def _spinning(memory: int) -> MachineConfig:
    kernel = guests.path("exits")
    return MachineConfig(kernel=kernel, cmdline="kind=spin count=0", memory=memory)


async def _timed(make: Callable[[], AbstractAsyncContextManager[Machine]]) -> float:
    start = time.perf_counter()
    async with make() as vm:
        await _counts(vm)
        return time.perf_counter() - start


async def _counts(vm: Machine) -> None:
    """Return when the guest's counter has changed."""
    with vm.memory.view(_COUNTER, 8) as view, view.cast("Q") as counter:
        before = counter[0]
        while counter[0] == before:  # noqa: ASYNC110 - only the guest could tell
            await trio.sleep(_LOOK)


# -- resident memory ---------------------------------------------------------------------------


async def _resident(memory: int, clones: int, progress: Callable[[], None]) -> SizeRow:
    sizes = [_rss()]
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(Machine(memory=memory, acpi=False))
        await shell.read_until(origin.console, shell.PROMPT)
        sizes.append(_rss())
        for _ in range(clones):
            twin = await stack.enter_async_context(origin.clone())
            await shell.ask(twin.console, b"\r")
            sizes.append(_rss())
            progress()
    last = max(1, clones // 10)
    each, booted = (sizes[-1] - sizes[-1 - last]) / last, sizes[1] - sizes[0]
    return SizeRow(f"clone {clones}, RSS in KiB", each, booted, each / booted)


def _rss() -> float:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def _row(case: str, pairs: list[tuple[float, float]]) -> BenchRow:
    return BenchRow(
        case,
        median(ours for ours, _ in pairs) * 1e6,
        median(base for _, base in pairs) * 1e6,
        median(ours / base for ours, base in pairs),
    )
