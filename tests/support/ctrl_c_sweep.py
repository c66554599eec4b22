"""Raises SIGINT at one line after the other of avmm's code in a machine's life. A program of its
own: it traces the main thread.

    python ctrl_c_sweep.py FOLDER LIFE FIRST STEP

prints the number of lines, and then a line for each interrupt after which something was left
behind or something other than KeyboardInterrupt was raised.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any

import trio
import trio.testing

import avmm
from support.leftovers import resources

PACKAGE = str(Path(avmm.__file__).parent)
PROMPT = b"avmm> "


async def booted(vm: avmm.Machine) -> None:
    heard = b""
    while PROMPT not in heard:
        heard += await vm.console.receive_some()


async def stays(folder: Path) -> None:
    """Enter, run, pause, clone, snapshot, restore, leave."""
    async with avmm.Machine(memory="16M") as vm:
        await booted(vm)
        async with vm.paused():
            pass
        async with vm.fork_many(2):
            pass
        async with vm.clone():
            pass
        await vm.snapshot(folder / "snapshot")
    async with avmm.restore(folder / "snapshot"):
        pass


async def leaves(folder: Path) -> None:
    """Migrate as the source, in the main task."""
    here, there = trio.testing.memory_stream_pair()

    async def receive() -> None:
        async with avmm.receive(there):
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        async with avmm.Machine(memory="16M") as vm:
            await booted(vm)
            await vm.migrate(here)


async def comes(folder: Path) -> None:
    """Migrate as the destination, in the main task."""
    here, there = trio.testing.memory_stream_pair()

    async def send() -> None:
        async with avmm.Machine(memory="16M") as vm:
            await booted(vm)
            await vm.migrate(there)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        async with avmm.receive(here):
            pass


LIVES: dict[str, Callable[[Path], Awaitable[None]]] = {
    "stays": stays,
    "leaves": leaves,
    "comes": comes,
}


class Sweep:
    def __init__(self, life: Callable[[Path], Awaitable[None]], folder: Path) -> None:
        self._life = life
        self._folder = folder
        self._target = self.lines = 0
        self._where = ""

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line" and not self._where:
            self.lines += 1
            if self.lines == self._target:
                self._where = f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._line

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def run(self, target: int) -> str:
        """Live once, and interrupt at this line. Returns what was wrong, or nothing."""
        self._target, self.lines, self._where = target, 0, ""
        before = resources()
        sys.settrace(self._call)
        told = ""
        try:
            trio.run(self._bounded)
        except BaseException as error:  # each is judged
            if not is_interrupt(error):
                told = repr(error)
        finally:
            sys.settrace(None)
        after = resources()
        for kind, old, new in zip(
            ("descriptors", "threads", "memory"), before, after, strict=True
        ):
            if new - old:
                told += f" {kind} left: {sorted(new - old)}"
        for path in self._folder.iterdir():
            if path.name != "snapshot":
                told += f" file left: {path.name}"
                path.unlink()
        return f"line {target}, {self._where}: {told}" if told else ""

    async def _bounded(self) -> None:
        with trio.fail_after(60):
            await self._life(self._folder)


def is_interrupt(error: BaseException) -> bool:
    """Is it the interrupt, by itself or in the group of a nursery of ours here? There the other
    side of a migration may add that it was given up."""
    if isinstance(error, BaseExceptionGroup):
        interrupts, others = error.split(KeyboardInterrupt)
        return interrupts is not None and (
            others is None or others.split(avmm.AvmmError)[1] is None
        )
    return isinstance(error, KeyboardInterrupt)


def main() -> None:
    faulthandler.enable()
    folder, life, first, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sweep = Sweep(LIVES[life], folder)
    for _ in range(2):  # what is imported and opened once is there now
        sweep.run(0)
    total = sweep.lines
    print(total, "lines", flush=True)
    for target in range(first, total, step):
        if told := sweep.run(target):
            print(told, flush=True)


if __name__ == "__main__":
    main()
