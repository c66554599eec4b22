"""Pauses the torture guest at one exit after the other, and moves it to a new process there.

Run as a program: `python -m support.torture --cpus 2 --every 1 [--drain none|single] ...`. Each
guest lives in a process of its own (forked before anything runs), so that what is loaded is loaded
into a new VM of a new process. The exits that count are all accesses to the devices that keep a
log; what the guest says on its console and how it ends are exits of no interest. Says `ok N` where
all N moved guests saw and did exactly what an uninterrupted one does, else what the first
difference is. With `--capability`, that must be the number by which this kernel announces
NEEDS_COMPLETION, and its flag must decide to the end.
"""

from __future__ import annotations

import argparse
import ast
import errno
import math
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

import avmm
import avmm.loop
from avmm import guests
from avmm.devices.base import Host
from support.where import tell_at

MSR = 0x4D56_0000
PORTS, WINDOW = 0x200, 0xD000_0000
CALLS = 0x300
COLLECTED = 2
"""What a log has for a write that was collected, instead of 0 for a read and 1 for a write."""
UNTIL = float(os.environ.get("AVMM_TORTURE_UNTIL", "inf"))
"""A process that is not done by then (CLOCK_MONOTONIC) tells where it hangs, and ends."""


class Recorder(avmm.Device):
    """A CPU's window: what is read depends on all accesses before; every access is logged.

    Access number `stop` asks for a pause while it is being served; every third one is answered
    by an awaitable, so that pauses find vCPUs that wait for a task, too.

    Some of its registers are served in C, without the GIL: plain bytes, and in memory bits that a
    write clears. What they give the guest is in its sum. Its writes to another one are collected;
    they are logged before the next access that is.
    """

    registers = ""
    """Which it has: those of "ports" or of "memory"."""

    def __init__(self, name: str, shared: Accesses) -> None:
        self._name = name
        self.shared = shared
        self.log: list[list[int]] = []

    @property
    def name(self) -> str:
        return self._name

    def attach(self, host: Host) -> None:
        super().attach(host)
        if self.registers == "ports":
            host.registers.storage(0x04, 4)
            self._collected = host.registers.collected(0x00, 1, 2)
        elif self.registers == "memory":
            host.registers.storage(0x480, 32)
            self._collected = host.registers.collected(0x408, 8, 2)
            self._bits = host.registers.clearable(0x404, 4)

    def read(self, offset: int, size: int) -> int | Awaitable[int]:
        value = self._next(0, offset, size, 0)
        later = self.shared.step(self)
        return value if later is None else self._answer(value, later)

    def write(self, offset: int, size: int, value: int) -> Awaitable[None] | None:
        self._next(1, offset, size, value)
        return self.shared.step(self)

    async def _answer(self, value: int, later: Awaitable[None]) -> int:
        await later
        return value

    def finish(self) -> None:
        self._log_collected()

    def _log_collected(self) -> None:
        if self.registers:
            self.log += ([COLLECTED, 0, 0, byte] for byte in self._collected.take())

    def _next(self, way: int, offset: int, size: int, value: int) -> int:
        self._log_collected()
        if self.registers == "memory":
            self._bits.set_bits(len(self.log) * 0x9E37_79B9 & 0xFFFF_FFFF)
        if way == 0:
            value = (len(self.log) * 0x9E37_79B9_7F4A_7C15 + offset + 1) & ((1 << 8 * size) - 1)
        self.log.append([way, offset, size, value])
        return value

    def save(self) -> Mapping[str, Any]:
        return {"log": [list(entry) for entry in self.log]}

    def load(self, state: Mapping[str, Any]) -> None:
        self.log = [list(entry) for entry in state["log"]]


class ReadByTask(Recorder):
    """Its reads are handed to the vCPU's task without the GIL (avmm/kvm/claims.h)."""

    registers = "ports"

    async def read(self, offset: int, size: int) -> int:
        answer = super().read(offset, size)
        return answer if isinstance(answer, int) else await answer


class WrittenByTask(Recorder):
    """The same for its writes."""

    registers = "memory"

    async def write(self, offset: int, size: int, value: int) -> None:
        if (later := super().write(offset, size, value)) is not None:
            await later


class Accesses:
    """Counts the accesses of all windows, and asks for the pause at number `stop`."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop
        self.count = 0
        self.wanted = trio.Event()
        self.asked = trio.Event()

    def step(self, device: Recorder) -> Awaitable[None] | None:
        number = self.count
        self.count += 1
        if number == self.stop:
            return self._until_asked()
        return self._a_round() if number % 3 == 0 else None

    async def _a_round(self) -> None:
        await trio.lowlevel.checkpoint()

    async def _until_asked(self) -> None:
        """Answer only when the pause has been asked for: this very exit is caught by it."""
        self.wanted.set()
        await self.asked.wait()


class Windows:
    """The windows of all CPUs (ports, MMIO and MSR of each), and their shared counter."""

    def __init__(self, options: argparse.Namespace, shared: Accesses) -> None:
        self.shared = shared
        self.all: list[Recorder] = []
        self.places: list[Any] = []
        for cpu in range(options.cpus):
            ports = ReadByTask(f"ports{cpu}", shared)
            memory = WrittenByTask(f"mmio{cpu}", shared)
            msr = Recorder(f"msr{cpu}", shared)
            self.all += [ports, memory, msr]
            self.places += [
                avmm.pio(ports, PORTS + 0x20 * cpu, 32),
                avmm.mmio(memory, WINDOW + 0x10000 * cpu, 0x10000),
                avmm.msr(msr, MSR + cpu),
            ]
        self._calls = Recorder("calls", shared)  # a device only to be saved with the others
        self.all.append(self._calls)
        self.places.append(avmm.pio(self._calls, CALLS, 1))

    def call(self, call: Any) -> int | Awaitable[int]:
        return self._calls.read(call.number, 4)

    @property
    def logs(self) -> list[list[list[int]]]:
        return [window.log for window in self.all]


def machine(options: argparse.Namespace, windows: Windows, state: Any = None) -> avmm.Machine:
    """The guest, with these windows."""
    words = f"cpus={options.cpus} loops={options.loops} msr={MSR:#x} long={options.long}"
    words += f" hypercall={int(options.hypercall)}"
    return avmm.Machine(
        kernel=guests.path("torture"),
        cmdline=words,
        memory="16M",
        cpus=options.cpus,
        devices=windows.places,
        state=state,
        calls=windows.call,
        completion_capability=options.capability,
    )


Result = tuple[str, list[list[list[int]]]]


async def run(
    options: argparse.Namespace,
    state: Any = None,
    disturb: Callable[[avmm.Machine], Awaitable[None]] | None = None,
) -> Result:
    """To the end: what the guest says, and the logs of its windows; `disturb` runs meanwhile."""
    windows = Windows(options, Accesses(None))
    async with machine(options, windows, state) as vm, trio.open_nursery() as nursery:
        if disturb is not None:
            nursery.start_soon(disturb, vm)
        said = b"".join([bytes(data) async for data in vm.console])
        outcome = await vm.wait()
        nursery.cancel_scope.cancel()
    judge(options, vm)
    if outcome.status or outcome.cause is not avmm.Cause.EXIT:
        return f"ended by {outcome}: {said!r}", []
    return said.decode(), windows.logs


async def run_until(options: argparse.Namespace, stop: int) -> Any:
    """Pause while access number `stop` is being served: (the state, what was said so far)."""
    windows = Windows(options, Accesses(stop))
    shared = windows.shared
    async with machine(options, windows) as vm:
        await wanted(shared, vm)
        async with trio.open_nursery() as nursery:
            states: list[Any] = []

            async def pause() -> None:
                async with vm.paused(deadline=20):
                    states.append(vm.save())

            nursery.start_soon(pause)
            while not vm._inside.parts.group._lot.asked:
                await trio.lowlevel.checkpoint()
            shared.asked.set()
    judge(options, vm)
    return states[0]


async def wanted(shared: Accesses, vm: avmm.Machine) -> None:
    """Until the pause is asked for. Raises `RuntimeError` where the guest ends before."""
    async with trio.open_nursery() as nursery:

        async def look_for_the_end() -> None:
            outcome = await vm.wait()
            raise RuntimeError(f"the guest has ended by {outcome}, not at the access meant")

        nursery.start_soon(look_for_the_end)
        await shared.wanted.wait()
        nursery.cancel_scope.cancel()


def judge(options: argparse.Namespace, vm: Any) -> None:
    """With `--capability`, the kernel's flag has decided until the end."""
    policy = vm._inside.parts.policy
    if options.capability is not None and not policy.by_flag:
        raise RuntimeError(f"the flag does not decide, but {policy.describe()}")


def started(work: Callable[[], Any]) -> Callable[[], Any]:
    """Run `work` in a forked process; call what this gives for its result, once. An exception is
    one there as well."""
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(near)
            if math.isfinite(UNTIL):
                tell_at(UNTIL)
            with open(far, "w") as pipe:  # noqa: PTH123 - a descriptor
                pipe.write(repr(work()))
            status = 0
        except BaseException:  # the process ends here, whatever it was
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(far)

    def result() -> Any:
        with open(near) as pipe:  # noqa: PTH123 - a descriptor
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError("a guest's process failed")
        return ast.literal_eval(text)

    return result


def in_new_process(work: Callable[[], Any]) -> Any:
    """What `work` gives, computed in a forked process."""
    return started(work)()


def no_drain(vcpu: Any, serve: Any, policy: Any) -> None:
    """The planted bug: state is read as it is at the exit."""


def single_reentry(vcpu: Any, serve: Any, policy: Any) -> None:
    """The planted bug: one `KVM_RUN`, and what it brings is served but not finished."""
    vcpu.page.immediate_exit = 1
    status = vcpu.run()
    if status >= 0:
        serve(status)
    assert status >= 0 or status == -errno.EINTR


DRAINS = {"none": no_drain, "single": single_reentry}


def first_difference(there: list[list[list[int]]], here: list[list[list[int]]]) -> str:
    """Of the logs of a guest that was moved and of one that was not; empty where there is none."""
    for number, (theirs, ours) in enumerate(zip(there, here, strict=True)):
        for at, (their, our) in enumerate(zip(theirs, ours, strict=False)):
            if their != our:
                return f"window {number}, {at}: {their}, not {our}"
        if len(theirs) != len(ours):
            return f"window {number}: {len(theirs)} accesses, not {len(ours)}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--capability", type=int)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, help="only so many accesses, the last")
    parser.add_argument("--hypercall", action="store_true", help="for one CPU")
    parser.add_argument("--drain", choices=DRAINS)
    options = parser.parse_args()
    if options.hypercall and options.cpus != 1:
        parser.error("hypercalls of several CPUs would come in any order")
    if options.drain:
        avmm.loop.drain = DRAINS[options.drain]  # type: ignore[assignment]
    said, logs = in_new_process(lambda: trio.run(run, options))
    if not logs:
        sys.exit(f"the uninterrupted guest {said}")
    total = sum(entry[0] != COLLECTED for log in logs for entry in log)
    moved = 0
    first = options.first if options.last is None else total - options.last
    for stop in range(first, total, options.every):
        state = in_new_process(lambda stop=stop: trio.run(run_until, options, stop))
        again, their_logs = in_new_process(lambda state=state: trio.run(run, options, state))
        if not (again.endswith(said[said.rindex("torture ") :]) and said.endswith(again)):
            sys.exit(f"moved at access {stop}, the guest said {again!r}, expected {said!r}")
        if difference := first_difference(their_logs, logs):
            sys.exit(f"moved at access {stop}: {difference}")
        moved += 1
    print("ok", moved)


if __name__ == "__main__":
    main()
