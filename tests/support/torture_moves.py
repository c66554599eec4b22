"""Moves the torture guest from process to process, many times within one run of it.

`python -m support.torture_moves --cpus 2 --loops 4 --moves 20 --step 31`: each of its machines
lives in a process of its own, and migrates to the next one when that many accesses have been
served, or leaves a snapshot for it (`--snapshots FOLDER`). Two times of three the next access of
each CPU is answered only when the machine is paused, so the very exits are moved (as in
`support.torture`); the third time the guest runs while its RAM is copied, as far as `MEANWHILE`,
so that it does not outrun all moves.
Says `ok MOVES` where the last machine has the logs that the uninterrupted guest has, and all of
them together have said what that one says.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from collections.abc import Awaitable
from functools import partial
from pathlib import Path

import trio

import avmm
import avmm.loop
from support.torture import (
    DRAINS,
    Accesses,
    Recorder,
    Result,
    Windows,
    first_difference,
    in_new_process,
    machine,
    run,
    started,
    wanted,
)

MEANWHILE = 100
"""So many accesses, at the most, are answered while RAM is copied."""


class HeldAccesses(Accesses):
    """Asks for a move at number `stop`; from number `held` on all wait until the pause."""

    def __init__(self, stop: int | None, held: int) -> None:
        super().__init__(stop)
        self._held = held

    def step(self, device: Recorder) -> Awaitable[None] | None:
        if self.stop is None or self.count < self.stop:
            return super().step(device)
        self.count += 1
        return self._until_asked() if self.count > self._held else self._ask()

    async def _ask(self) -> None:
        self.wanted.set()
        await self._a_round()


async def live(
    options: argparse.Namespace,
    number: int,
    come_by: socket.socket | None,
    leave_by: socket.socket | None,
) -> Result:
    """Machine `number`, from where it comes by one socket to where it leaves by the other, or
    else from boot and to its end: what it says here, and the logs of the last."""
    held = options.step + (MEANWHILE if number % 3 == 2 else 0)
    windows = Windows(options, HeldAccesses(None if leave_by is None else options.step, held))
    said: list[bytes] = []
    async with contextlib.AsyncExitStack() as stack:
        if come_by is None:
            vm = await stack.enter_async_context(machine(options, windows))
        else:
            stream = await stack.enter_async_context(stream_of(come_by))
            vm = await stack.enter_async_context(
                avmm.receive(stream, devices=windows.places, calls=windows.call)
            )
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                said.extend([bytes(data) async for data in vm.console])

            nursery.start_soon(read)
            if leave_by is not None:
                out = await stack.enter_async_context(stream_of(leave_by))
                await wanted(windows.shared, vm)
                nursery.start_soon(answer_at_pause, vm, windows)
                await vm.migrate(out)
            outcome = await vm.wait()
    expected = avmm.Cause.EXIT if leave_by is None else avmm.Cause.MOVED
    if outcome.status or outcome.cause is not expected:
        raise RuntimeError(f"machine {number} ended by {outcome}")
    return b"".join(said).decode(), windows.logs if leave_by is None else []


async def through(options: argparse.Namespace, number: int) -> Result:
    """Machine `number`, from the snapshot that the one before it has left, and to its own."""
    is_last = number == options.moves
    held = options.step + (MEANWHILE if number % 3 == 2 else 0)
    windows = Windows(options, HeldAccesses(None if is_last else options.step, held))
    said: list[bytes] = []
    path = Path(options.snapshots, "snap")
    entered = (
        avmm.restore(path, devices=windows.places, calls=windows.call)
        if number
        else machine(options, windows)
    )
    async with entered as vm, trio.open_nursery() as nursery:
        reading = trio.CancelScope()

        async def read() -> None:
            with reading:
                async for data in vm.console:
                    said.append(bytes(data))  # one by one: it may be cancelled

        nursery.start_soon(read)
        if not is_last:
            await wanted(windows.shared, vm)
            nursery.start_soon(answer_at_pause, vm, windows)
            async with vm.paused(deadline=20):
                reading.cancel()
                await trio.lowlevel.checkpoint()
                await vm.snapshot(path)
                vm.stop()
        outcome = await vm.wait()
    expected = avmm.Cause.EXIT if is_last else avmm.Cause.STOPPED
    if outcome.status or outcome.cause is not expected:
        raise RuntimeError(f"machine {number} ended by {outcome}")
    return b"".join(said).decode(), windows.logs if is_last else []


def stream_of(end: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(end))


async def answer_at_pause(vm: avmm.Machine, windows: Windows) -> None:
    while not vm._inside.parts.group._lot.asked:
        await trio.lowlevel.checkpoint()
    windows.shared.asked.set()


def moved(options: argparse.Namespace) -> Result:
    """What all machines of the guest have said, and the logs of the last."""
    said, logs = "", []
    if options.snapshots:
        for number in range(options.moves + 1):
            part, logs = in_new_process(partial(trio.run, through, options, number))
            said += part
        return said, logs
    results = []
    come_by = None
    for number in range(options.moves + 1):
        leave_by, next_come_by = socket.socketpair() if number < options.moves else (None, None)

        def work(
            number: int = number,
            come_by: socket.socket | None = come_by,
            leave_by: socket.socket | None = leave_by,
            other: socket.socket | None = next_come_by,
        ) -> Result:
            if other is not None:
                other.close()  # or the line would not end with the machine at its other end
            return trio.run(live, options, number, come_by, leave_by)

        results.append(started(work))
        for end in (come_by, leave_by):
            if end is not None:
                end.close()
        come_by = next_come_by
        # The next one is there, and waits, while one runs.
        while len(results) > 1 or (results and number == options.moves):
            part, logs = results.pop(0)()
            said += part
    return said, logs


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--step", type=int, default=31)
    parser.add_argument("--snapshots", metavar="FOLDER", help="through files there, not by a line")
    parser.add_argument("--drain", choices=DRAINS)
    parser.set_defaults(capability=None, long=0, hypercall=False)
    options = parser.parse_args()
    if options.drain:
        avmm.loop.drain = DRAINS[options.drain]  # type: ignore[assignment]
    said, logs = in_new_process(partial(trio.run, run, options))
    if not logs:
        sys.exit(f"the uninterrupted guest {said}")
    again, their_logs = moved(options)
    if difference := first_difference(their_logs, logs):
        sys.exit(difference)
    if again != said:
        sys.exit(f"the guest said {again!r}, expected {said!r}")
    print("ok", options.moves)


if __name__ == "__main__":
    main()
