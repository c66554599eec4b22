"""Many guests in one program: how fast they exit, compared with as many programs of one guest.

Every guest makes the same number of exits, all at the same time. Each measures its own exits with
the TSC, and their rates are added up. The baseline is the same in as many processes with one guest
each. Beside a hundred idle guests, the rate of one is compared with its rate alone.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from statistics import median
from typing import Final

import trio

from avmm.bench import shell
from avmm.bench.exits import WAYS, config, served
from avmm.bench.row import ManyRow
from avmm.errors import AvmmError

KINDS: Final = ("pio ring0", "mmio ring3")


async def measure(
    count: int, together: int, idle: int, rounds: int, progress: Callable[[], None]
) -> list[ManyRow]:
    """All cases: `together` guests at once, and one beside `idle` ones, `count` exits each."""
    rows = []
    for kind in KINDS:
        for way in ("at once", "in a task"):
            pairs = []
            for _ in range(rounds):
                apart = await _in_processes(kind, way, count, together)
                progress()
                pairs.append((await _in_one(kind, way, count, together), apart))
                progress()
            rows.append(_row(f"{together} guests, {kind} {way}", pairs))
    for way in ("at once", "in a task"):
        pairs = []
        for _ in range(rounds):
            alone = await _in_one(KINDS[0], way, count, 1)
            progress()
            async with AsyncExitStack() as stack:
                for _ in range(idle):
                    await shell.idle(stack)
                pairs.append((await _in_one(KINDS[0], way, count, 1), alone))
            progress()
        rows.append(_row(f"beside {idle} idle ones, {KINDS[0]} {way}", pairs))
    return rows


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return (len(KINDS) + 1) * 2 * 2 * rounds


def _row(case: str, pairs: list[tuple[float, float]]) -> ManyRow:
    return ManyRow(
        case,
        median(ours for ours, _ in pairs),
        median(base for _, base in pairs),
        median(ours / base for ours, base in pairs),
    )


async def _in_one(kind: str, way: str, count: int, together: int) -> float:
    """The sum of the guests' rates, in exits per second."""
    times: list[float] = []

    async def one() -> None:
        times.append(await _served(kind, way, count))

    async with trio.open_nursery() as nursery:
        for _ in range(together):
            nursery.start_soon(one)
    return sum(1e6 / us for us in times)


async def _served(kind: str, way: str, count: int) -> float:
    name, ring = kind.split(" ring")
    return await served(config(name, int(ring), count), name, WAYS[way]())


async def _in_processes(kind: str, way: str, count: int, together: int) -> float:
    """The same in processes of their own. They start their guests when all are ready."""
    command = [sys.executable, "-m", __name__, kind, way, str(count)]
    total = 0.0
    async with AsyncExitStack() as stack:
        others = []
        for _ in range(together):
            other = await trio.lowlevel.open_process(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            stack.push_async_callback(_end, other)
            others.append(other)
        for other in others:
            await _line(other)
        for other in others:
            assert other.stdin is not None
            await other.stdin.send_all(b"go\n")
        for other in others:
            total += 1e6 / float(await _line(other))
    return total


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        process.kill()
        await process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            await pipe.aclose()


async def _line(process: trio.Process) -> bytes:
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        data = await process.stdout.receive_some()
        if not data:
            raise AvmmError(f"a process of this measurement ended with {await process.wait()}")
        line += data
    return line


async def _alone(kind: str, way: str, count: int) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    print(await _served(kind, way, count), flush=True)


if __name__ == "__main__":
    trio.run(_alone, sys.argv[1], sys.argv[2], int(sys.argv[3]))
