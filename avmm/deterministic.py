"""Deterministic programs: a trio program whose time is its guest's.

    async def main() -> None:
        async with avmm.Machine(kernel="guest.elf", deterministic=7) as vm:
            with trio.move_on_after(2):  # of the guest's seconds
                await vm.wait()
        print(trail(vm))

    avmm.deterministic.run(main)

With `Machine(deterministic=SEED)` alone the guest runs the same each time, as long as the program
does the same at the same moments of the guest's time. A program that sleeps, or gives something a
time limit, does so by the real clock, and is an input. Under `run` the clock is the guest's.

What comes from outside of the process (a socket, a tap interface, another process, a thread of
the program's own) is always an input: it is seen at some moment of the guest's time, and not at
the same one in each run. Run one deterministic machine at a time: two of them do not share one
time.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar, TypeVarTuple

import trio
from trio.testing import MockClock

from avmm import chance, lockstep
from avmm.errors import AvmmError

if TYPE_CHECKING:
    from avmm.machine import Machine

_Result = TypeVar("_Result")
_Args = TypeVarTuple("_Args")

KINDS: Final = {1: "exit", 2: "doorbell", 3: "slice", 4: "interrupt", 5: "skip"}
_RECORD: Final = struct.Struct("=qIIQQQ")


class Record(NamedTuple):
    """One thing that has happened in a run. `kind` is one of `KINDS`."""

    nanoseconds: int
    """On the guest's clock."""
    kind: str
    cpu: int
    what: int
    """An exit: its reason (KVM_EXIT_*), and the size of the access from bit 32 on. An interrupt:
    its vector. A slice: its length in blocks."""
    address: int
    """Of an access: a memory address, a port or an MSR's number."""
    value: int
    """What the guest wrote."""


def run(main: Callable[[*_Args], Awaitable[_Result]], *args: *_Args, seed: int = 0) -> _Result:
    """`trio.run(main, *args)` with a clock that follows the guest's time and starts at 0, tasks in
    a fixed order, and no thread of avmm's own. Returns what `main` returns.

    `seed` makes the random bytes of what no machine's own seed does, such as the MAC address of a
    network device that is made before its machine.
    """
    with chance.fixed(seed), lockstep.ordered_tasks():
        return trio.run(main, *args, clock=MockClock(autojump_threshold=0))


def trail(vm: Machine) -> tuple[int, int]:
    """How many things have happened in the run so far, and a digest of all of them, of 64 bits."""
    return _lockstep(vm).order.trail


def nanoseconds(vm: Machine) -> int:
    """The guest's time."""
    return _lockstep(vm).order.now


def digest(vm: Machine) -> str:
    """A digest of the guest's memory."""
    found = hashlib.blake2b(digest_size=16)
    for _, view in vm.memory.addresses():
        found.update(view)
    return found.hexdigest()


@contextmanager
def logged(vm: Machine, path: str | os.PathLike[str]) -> Iterator[None]:
    """Write what happens meanwhile to a file, which `records` reads. To compare two runs, begin
    before the program's first checkpoint in the machine's block: until then the guest does not
    run."""
    order = _lockstep(vm).order
    with Path(path).open("wb", buffering=0) as file:
        order.log(file.fileno())
        try:
            yield
        finally:
            order.log(-1)


def records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Read the file that `logged` has written."""
    for nanoseconds, kind, cpu, *rest in _RECORD.iter_unpack(Path(path).read_bytes()):
        yield Record(nanoseconds, KINDS[kind], cpu, *rest)


def _lockstep(vm: Machine) -> lockstep.Lockstep:
    found = vm._use("memory").lockstep
    if found is None:
        raise AvmmError("this machine does not run deterministically; expected deterministic=SEED")
    return found
