"""Measures how long the program's other tasks have to wait while avmm works.

A task sleeps a millisecond, over and over, and notes how late it was woken. Beside it, avmm does
one thing after another: it makes a guest, boots it, clones, saves, restores and pauses it, moves
it here and away, and leaves it. The result for each is the longest lateness meanwhile, minus the
99th percentile of the lateness while nothing is done. A round does everything once. The median
over the rounds shows what avmm costs. The maximum also shows what a busy host adds.

Preparations and garbage collection happen before the measurement and are not counted. In a
migration the other side is another process.
"""

from __future__ import annotations

import gc
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Final

import trio

from avmm import guests
from avmm.arrivals import receive, restore
from avmm.bench import shell
from avmm.bench.row import StallRow
from avmm.errors import AvmmError
from avmm.machine import Machine

_TICK: Final = 0.001
_SETTLE: Final = 0.02
"""Seconds to wait before and after each measurement, which are several ticks."""
_IDLE_SECONDS: Final = 0.5
_PAUSES: Final = 20
_BETWEEN_PAUSES: Final = 0.005
_SMALL: Final = "64M"
_BOOTED: Final = "256M"
"""RAM of the guest whose kernel is compressed. The unpacked kernel must fit."""
_PADDING: Final = 32 << 20
"""Bytes that follow the bundled guest in the image that stands in for a compressed kernel.
Unpacking them takes as long as unpacking Debian's kernel.
"""


class Lateness:
    """The task that sleeps. `run` it in the background."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self.seconds = 0.0
        """The longest lateness in the last `watched` block."""

    async def run(self) -> None:
        """Sleep again and again, and note each lateness, until cancelled."""
        while True:
            before = time.perf_counter()
            await trio.sleep(_TICK)
            self._late.append(time.perf_counter() - before - _TICK)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Measure the lateness while the block runs."""
        gc.collect()
        gc.disable()
        try:
            await trio.sleep(_SETTLE)
            self._late.clear()
            yield
            await trio.sleep(_SETTLE)  # so that a tick which was delayed ends
            self.seconds = max(self._late)
        finally:
            gc.enable()

    async def idle(self) -> float:
        """The 99th percentile of the lateness while nothing is done, in seconds."""
        async with self.watched():
            await trio.sleep(_IDLE_SECONDS)
        return quantiles(self._late, n=100)[-1]


@dataclass(frozen=True)
class _Bench:
    lateness: Lateness
    kernel: Path
    memory: int
    """Bytes of RAM of the guests that write to all of their RAM."""
    folder: Path


async def measure(
    kernel: Path | None, memory: int, rounds: int, progress: Callable[[], None]
) -> list[StallRow]:
    """All cases. `kernel` is a compressed kernel. If it is None, one is made from the bundled
    guest.

    `progress` is called at each of `steps(rounds)` steps. Raises `AvmmError` if a guest does not
    do what it should.
    """
    found: dict[str, list[float]] = {name: [] for name in CASES}
    idle: dict[str, list[float]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as name:
        folder = Path(name)
        bench = _Bench(Lateness(), kernel or _compressed(folder), memory, folder)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.lateness.run)
            for _ in range(rounds):
                base = await bench.lateness.idle()
                for case, run in CASES.items():
                    await run(bench)
                    found[case].append(max(0.0, bench.lateness.seconds - base))
                    idle[case].append(base)
                    progress()
            nursery.cancel_scope.cancel()
    return [
        StallRow(case, 1e3 * median(found[case]), 1e3 * max(found[case]), 1e3 * median(idle[case]))
        for case in CASES
    ]


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return len(CASES) * rounds


def _compressed(folder: Path) -> Path:
    """The bundled guest, compressed, followed by padding that the loader unpacks but does not
    load.
    """
    image = folder / "shell.gz"
    packer = zlib.compressobj(level=1, wbits=31)
    with image.open("wb") as file:
        file.write(packer.compress(guests.path("shell").read_bytes()))
        # Half the bits of each byte are random, so the compressor neither stores the bytes as they
        # are nor finds runs in them.
        for _ in range(_PADDING >> 20):
            file.write(packer.compress(secrets.token_hex(1 << 19).encode()))
        file.write(packer.flush())
    return image


# -- the cases ---------------------------------------------------------------------------------


@asynccontextmanager
async def _filled(bench: _Bench) -> AsyncIterator[Machine]:
    """A guest that has written to all of its RAM."""
    async with Machine(memory=bench.memory, acpi=False) as vm:
        await shell.fill(vm.console, bench.memory)
        yield vm


async def _new(bench: _Bench) -> None:
    async with AsyncExitStack() as stack, bench.lateness.watched():
        await stack.enter_async_context(Machine(memory=_SMALL))


async def _boot(bench: _Bench) -> None:
    async with AsyncExitStack() as stack, bench.lateness.watched():
        await stack.enter_async_context(Machine(kernel=bench.kernel, memory=_BOOTED))


async def _clone(bench: _Bench) -> None:
    async with _filled(bench) as vm, AsyncExitStack() as stack, bench.lateness.watched():
        await stack.enter_async_context(vm.clone())


async def _clone_again(bench: _Bench) -> None:
    """Clone a guest that was cloned before, and has written to all of its RAM since then."""
    async with _filled(bench) as vm:
        async with vm.clone():
            pass
        await vm.console.send_all(b"\r")
        await shell.fill(vm.console, bench.memory)
        async with AsyncExitStack() as stack, bench.lateness.watched():
            await stack.enter_async_context(vm.clone())


async def _snapshot(bench: _Bench) -> None:
    async with _filled(bench) as vm, bench.lateness.watched():
        await vm.snapshot(bench.folder / "snap")


async def _restore(bench: _Bench) -> None:
    """Restore the snapshot that `_snapshot` has left."""
    async with AsyncExitStack() as stack, bench.lateness.watched():
        await stack.enter_async_context(restore(bench.folder / "snap"))


async def _pause(bench: _Bench) -> None:
    async with Machine(memory=_SMALL) as vm:
        await shell.read_until(vm.console, shell.PROMPT)
        async with bench.lateness.watched():
            for _ in range(_PAUSES):
                async with vm.paused():
                    pass
                await trio.sleep(_BETWEEN_PAUSES)


async def _source(bench: _Bench) -> None:
    async with (
        _filled(bench) as vm,
        _peer("receive", bench.memory) as (stream, _),
        bench.lateness.watched(),
    ):
        await vm.migrate(stream)


async def _destination(bench: _Bench) -> None:
    async with (
        _peer("send", bench.memory) as (stream, go),
        AsyncExitStack() as stack,
        bench.lateness.watched(),
    ):
        go()
        await stack.enter_async_context(receive(stream))


async def _leaving(bench: _Bench) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_filled(bench))
        async with bench.lateness.watched():
            await stack.aclose()


CASES: Final[dict[str, Callable[[_Bench], Awaitable[None]]]] = {
    "new guest": _new,
    "boot, compressed kernel": _boot,
    "clone": _clone,
    "clone, written again": _clone_again,
    "snapshot": _snapshot,
    "restore": _restore,
    "pause": _pause,
    "migration, source": _source,
    "migration, destination": _destination,
    "leaving": _leaving,
}


@asynccontextmanager
async def _peer(
    what: str, memory: int
) -> AsyncIterator[tuple[trio.SocketStream, Callable[[], None]]]:
    """Start another process (`avmm.bench.peer`), and wait until it is ready. Yields a stream to
    it, and the function that lets it begin.
    """
    here, there = socket.socketpair()
    async with trio.SocketStream(trio.socket.from_stdlib_socket(here)) as stream:
        with there:
            fd = there.fileno()
            process = subprocess.Popen(  # noqa: ASYNC220 - nothing is measured yet
                [sys.executable, "-m", "avmm.bench.peer", what, str(fd), str(memory)],
                pass_fds=[fd],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                if await trio.to_thread.run_sync(process.stdout.readline) != b"ready\n":
                    raise AvmmError(f"the process that should {what} a guest has failed")
                yield stream, process.stdin.close
            finally:
                process.kill()
