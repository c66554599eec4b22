"""What an idle guest costs: CPU time, memory of the process, and descriptors, of which a bare VM
(`avmm.bench.fork`) has some, too.

The guests are the bundled shell at its prompt. Their memory includes what they have written to
their RAM. The process's own use before that is subtracted.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Final

import trio

from avmm import arch
from avmm.bench import fork, shell
from avmm.bench.row import FigureRow
from avmm.threads import in_thread, in_thread_shielded

_SETTLE: Final = 1.0
"""Seconds after which nothing of a start is left to do."""
_LOOK: Final = 5.0
"""For how many seconds CPU time is counted."""


async def measure(count: int, progress: Callable[[], None]) -> list[FigureRow]:
    """The cases, for `count` guests. The bare VMs are made in a thread."""
    async with AsyncExitStack() as first:
        await shell.idle(first)  # what is loaded or cached once is not a guest's
    async with AsyncExitStack() as guests:
        before = _use()
        for _ in range(count):
            await shell.idle(guests)
            progress()
        await trio.sleep(_SETTLE)
        memory, descriptors = (now - was for now, was in zip(_use(), before, strict=True))
        began = _cpu_seconds()
        await trio.sleep(_LOOK)
        busy = 100 * (_cpu_seconds() - began) / _LOOK
    bare = await _bare(count)
    return [
        FigureRow(f"{count} idle guests, CPU", "% of a core", busy, None, None),
        FigureRow("memory of each", "KiB", memory / count, None, None),
        FigureRow(
            "descriptors of each", "", descriptors / count, bare, descriptors / count / bare
        ),
    ]


def steps(count: int) -> int:
    """How often `measure` calls `progress`."""
    return count


async def _bare(count: int) -> float:
    """The descriptors of a bare VM."""
    stack = ExitStack()
    try:
        return await in_thread(_bare_descriptors, stack, count)
    finally:
        await in_thread_shielded(stack.close)


def _bare_descriptors(stack: ExitStack, count: int) -> float:
    kind = arch.host()
    system = kind.open_system()
    stack.callback(system.close)
    before = _use()[1]
    for _ in range(count):
        fork.bare_vm(stack, kind, system)
    return (_use()[1] - before) / count


def _use() -> tuple[float, float]:
    """The process's private memory in KiB, and the number of its descriptors."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    private = sum(int(kib) for kib in re.findall(r"Private_(?:Clean|Dirty): +(\d+)", rollup))
    return private, len(list(Path("/proc/self/fd").iterdir()))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
