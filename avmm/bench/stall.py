"""How long the program's other tasks have to wait while avmm works.

A task sleeps a millisecond, over and over, and notes how late it was woken. Beside it, avmm does
one thing after another: it makes a guest, boots one, clones, saves, restores and pauses one, moves
one away and here, and leaves one. The result of each is the longest lateness meanwhile, minus the
99th percentile of the lateness while nothing is done. A round does everything once. The median
over the rounds is reported, and the worst of all rounds.

On a busy host the thread also waits for a core, which is not avmm's fault. Linux counts that time
(/proc/thread-self/schedstat), so the longest lateness without it is reported too. And there is a
baseline: another process, which only sleeps, notes how late it is meanwhile (`avmm.bench.ticker`).

Preparations and garbage collection happen before a measurement and are not counted. In a migration
the other side is another process.
"""

from __future__ import annotations

import gc
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from subprocess import Popen
from typing import Final

import trio

from avmm import guests
from avmm.arrivals import receive, restore
from avmm.bench import shell
from avmm.bench.row import StallRow
from avmm.bench.ticker import TICK
from avmm.errors import AvmmError
from avmm.machine import Machine

_SETTLE: Final = 0.02
"""Seconds of waiting before and after each measurement: several ticks."""
_IDLE_SECONDS: Final = 0.5
_PAUSES: Final = 20
_BETWEEN_PAUSES: Final = 0.005
_SMALL: Final = "64M"
_BOOTED: Final = "256M"
"""RAM of the guest whose kernel is compressed. The unpacked kernel must fit into it."""
_PADDING: Final = 32 << 20
"""Bytes that follow the bundled guest in the image that stands for a compressed kernel. Unpacking
them takes as long as unpacking Debian's kernel."""


class Lateness:
    """The task that sleeps. Start `run` in the background. `beside` is the process that does
    nothing but sleep."""

    def __init__(self, beside: Popen[bytes]) -> None:
        self._beside = beside
        self._late: list[float] = []
        self._blocked: list[float] = []
        self.seconds = 0.0
        """The longest lateness in the last `watched` block."""
        self.blocked: float | None = None
        """The same without the time of waiting for a core. None if Linux does not count that."""
        self.beside = 0.0
        """The longest lateness of the other process meanwhile."""

    async def run(self) -> None:
        """Tick, until cancelled."""
        with ExitStack() as stack:
            with suppress(FileNotFoundError):
                counts = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, counts)

                def core() -> float:
                    """How many seconds this thread has waited for a core so far."""
                    return int(os.pread(counts, 100, 0).split()[1]) / 1e9

                await self._tick(core)
            await self._tick(None)

    async def _tick(self, core: Callable[[], float] | None) -> None:
        while True:
            waited = core() if core else 0.0
            before = time.perf_counter()
            await trio.sleep(TICK)
            late = time.perf_counter() - before - TICK
            self._late.append(late)
            if core:
                self._blocked.append(max(0.0, late - (core() - waited)))

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Measure the lateness while the block is run."""
        gc.collect()
        gc.disable()
        try:
            await trio.sleep(_SETTLE)
            self._late.clear()
            self._blocked.clear()
            self._ask()
            yield
            await trio.sleep(_SETTLE)  # so that a tick which was delayed can end
            self.seconds, self.blocked = max(self._late), max(self._blocked, default=None)
            self.beside = self._ask()
        finally:
            gc.enable()

    def _ask(self) -> float:
        """The other process's longest lateness since it was asked before. It answers at once."""
        assert self._beside.stdin is not None
        assert self._beside.stdout is not None
        self._beside.stdin.write(b"\n")
        return float(self._beside.stdout.readline())

    async def idle(self) -> float:
        """Return the 99th percentile of the lateness while nothing is done, in seconds."""
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


@dataclass(frozen=True)
class _Round:
    """One case of one round, in seconds."""

    late: float
    blocked: float | None
    beside: float
    idle: float


async def measure(
    kernel: Path | None, memory: int, rounds: int, progress: Callable[[], None]
) -> list[StallRow]:
    """Measure all cases. `kernel` is a compressed kernel; if it is None, one is made from the
    bundled guest.

    `progress` is called at each of `steps(rounds)` steps. Raises `AvmmError` if a guest does not
    do what it should.
    """
    found: dict[str, list[_Round]] = {name: [] for name in CASES}
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="avmm-bench-"))
        folder = Path(name)
        beside = stack.enter_context(ticker())
        bench = _Bench(Lateness(beside), kernel or _compressed(folder), memory, folder)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.lateness.run)
            for _ in range(rounds):
                base = await bench.lateness.idle()
                for case, run in CASES.items():
                    await run(bench)
                    lateness = bench.lateness
                    late = max(0.0, lateness.seconds - base)
                    found[case].append(_Round(late, lateness.blocked, lateness.beside, base))
                    progress()
            nursery.cancel_scope.cancel()
    return [_row(case, rounds_) for case, rounds_ in found.items()]


@contextmanager
def ticker() -> Iterator[Popen[bytes]]:
    """The process that only sleeps, inside the block."""
    command = [sys.executable, "-m", "avmm.bench.ticker"]
    pipe = subprocess.PIPE
    with Popen(command, stdin=pipe, stdout=pipe, bufsize=0) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"\n")
            process.stdout.readline()  # it has begun
            yield process
        finally:
            process.kill()


def _row(case: str, rounds: Sequence[_Round]) -> StallRow:
    late = [each.late for each in rounds]
    blocked = [each.blocked for each in rounds if each.blocked is not None]
    return StallRow(
        case,
        1e3 * median(late),
        1e3 * max(late),
        1e3 * median(blocked) if blocked else None,
        1e3 * median(each.beside for each in rounds),
        1e3 * median(each.idle for each in rounds),
    )


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return len(CASES) * rounds


def _compressed(folder: Path) -> Path:
    """Compress the bundled guest, with much data after it that the loader unpacks but does not
    load."""
    image = folder / "shell.gz"
    packer = zlib.compressobj(level=1, wbits=31)
    with image.open("wb") as file:
        file.write(packer.compress(guests.path("shell").read_bytes()))
        # Four bits of each byte are random: the compressor neither stores it raw nor finds runs.
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
    """Clone a guest that was cloned before and has written to all of its RAM again."""
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
    """Restore the snapshot that `_snapshot` has written."""
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
    """Start another process (`avmm.bench.peer`), and wait until it is ready. Yields a stream to it
    and a function that lets it begin."""
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
                    raise AvmmError(f"the process that was to {what} a guest has failed")
                yield stream, process.stdin.close
            finally:
                process.kill()
