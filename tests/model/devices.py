"""The devices that model programs talk to: every read has a side effect, everything is logged.

Each vCPU has three of its own (ports, addresses, MSRs) and a handler of calls, so that its log
does not depend on how vCPUs interleave, and can be compared with that of an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import trio

from avmm.bus.space import Bus, Placement, mmio, msr, pio
from avmm.devices.base import Device
from avmm.errors import MsrFault
from avmm.vcpu.calls import Answer, Call
from model.vcpu import ADDRESS, ADDRESSES, MSR, MSRS, PORT, PORTS, Broken, mix

SPACES: Final = ("pio", "mmio", "msr")
Entry = tuple[Any, ...]
"""One line of a log."""


class Failed(Exception):
    """What a failing device raises."""


@dataclass
class Board:
    """All that one vCPU's devices hold; `copy` is what saving and loading it comes to."""

    index: int = 0
    count: int = 0
    log: list[Entry] = field(default_factory=list)

    def copy(self) -> Board:
        return replace(self, log=list(self.log))

    def note(self, *entry: Any) -> int:
        """Log an access; gives the number that a read of it answers."""
        self.count += 1
        answer = mix(self.index, self.count, *(hash(part) for part in entry[1:]))
        self.log.append((*entry, answer))
        return answer


Wait = Callable[[], Awaitable[None]] | None
"""What an answer waits for, called when it is awaited; None: it is there at once."""


def _at_once() -> Wait:
    return None


class Recorder(Device):
    """One device of a board. Whether it answers at once or later, `later` says, or it raises."""

    def __init__(self, board: Board, space: str) -> None:
        self.board = board
        self.space = space
        self.later: Callable[[], Wait] = _at_once
        """Asked at each access: what to wait for before it is answered; it may raise."""
        self.quiesced = False
        self.withheld: list[int] = []
        self.interrupt: Callable[[int], None] = lambda vector: None
        self.on_quiesce: Callable[[], Awaitable[None]] = _nothing
        self.on_resume: Callable[[], Awaitable[None]] = _nothing

    @property
    def name(self) -> str:
        return f"{self.space} of vCPU {self.board.index}"

    def read(self, offset: int, size: int) -> Any:
        self._check()
        wait = self.later()
        if wait is not None:
            return self._read_later(wait, offset, size)
        return self._read(offset, size)

    def write(self, offset: int, size: int, value: int) -> Any:
        self._check()
        wait = self.later()
        if wait is not None:
            return self._write_later(wait, offset, size, value)
        return self._write(offset, size, value)

    async def _read_later(
        self, wait: Callable[[], Awaitable[None]], offset: int, size: int
    ) -> int:
        await wait()
        return self._read(offset, size)

    async def _write_later(
        self, wait: Callable[[], Awaitable[None]], offset: int, size: int, value: int
    ) -> None:
        await wait()
        self._write(offset, size, value)

    def _read(self, offset: int, size: int) -> int:
        self._check()
        answer = self.board.note("read", SPACES.index(self.space), offset, size)
        self._refuse(answer)
        return answer & (1 << 8 * size) - 1

    def _write(self, offset: int, size: int, value: int) -> None:
        self._check()
        answer = self.board.note("write", SPACES.index(self.space), offset, size, value)
        self._refuse(answer)

    def _refuse(self, answer: int) -> None:
        if self.space == "msr" and not answer % 5:
            raise MsrFault("an MSR that does not like what it is asked")

    def _check(self) -> None:
        if self.quiesced:
            raise Broken(f"{self.name}: an access after it was quiesced")

    # -- what the coordinator needs --------------------------------------------------------

    async def quiesce(self) -> None:
        self.quiesced = True  # at once, as a device that then waits for what is in flight
        await self.on_quiesce()

    async def resume(self) -> None:
        await trio.lowlevel.checkpoint()  # whoever resumes devices must not be cancelled here
        await self.on_resume()
        self.quiesced = False
        for vector in self.withheld:
            self.interrupt(vector)
        self.withheld.clear()

    def work(self, vector: int) -> None:
        """The device's own activity: it interrupts the guest, unless it is to keep still."""
        if self.quiesced:
            self.withheld.append(vector)
        else:
            self.interrupt(vector)


async def _nothing() -> None:
    pass


def recorders(board: Board) -> list[Recorder]:
    return [Recorder(board, space) for space in SPACES]


def place(recorder: Recorder) -> Placement:
    """Where the model's programs look for it."""
    index = recorder.board.index
    if recorder.space == "pio":
        return pio(recorder, PORT + PORTS * index, PORTS)
    if recorder.space == "mmio":
        return mmio(recorder, ADDRESS + ADDRESSES * index, ADDRESSES)
    return msr(recorder, MSR + MSRS * index, MSRS)


def buses() -> dict[str, Bus]:
    """Empty buses, silent about what nobody claims."""
    return {
        "pio": Bus("port", 1 << 16, 0),
        "mmio": Bus("address", 1 << 52, 0),
        "msr": Bus("MSR", 1 << 32, 0, unit=8),
    }


def plug(recorder: Recorder, onto: dict[str, Bus], lock: AbstractContextManager[Any]) -> None:
    onto[recorder.space].add(place(recorder), lock)


def calls(board: Board, later: Callable[[], Wait]) -> Callable[[Call], Any]:
    """A handler of calls with its log on `board`; gives all that each kind can be given."""

    def answer(call: Call) -> int | Answer:
        value = board.note("call", len(call.kind), call.number, *call.args) & 0x7FFF_FFFF
        if call.kind not in ("papr", "osi"):
            return value
        return Answer(value, tuple(mix(value, at) for at in range(len(call.args))))

    async def answer_later(wait: Callable[[], Awaitable[None]], call: Call) -> int | Answer:
        await wait()
        return answer(call)

    def handler(call: Call) -> Any:
        wait = later()
        return answer(call) if wait is None else answer_later(wait, call)

    return handler
