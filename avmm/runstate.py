"""What a machine is at: its states, what leads from one to the next, and what may be done in each.

All of it is in this file. `Machine` asks `Life.demand` before it does anything for its user and
tells `Life.move` what has happened; it keeps no flags beside it.

Theory of operation
===================

A machine's state is moved by two kinds of events.

**What trio's side does** moves it by `TRANSITIONS`: the machine is entered, migrated, settled,
left. Only trio's thread writes it, so between two checkpoints nobody else's step comes between a
look and a move.

    NEW ── STARTING ──┬── RUNNING ─────────────────────────────────────────────── LEFT
                      │     │  ^                                                   ^
                    FAILED  v  │ given up, taken back                              │
                         MIGRATING ──── HANDING_OVER ──── MOVED ───────────────────┤
                            │                │              ^                      │
                            │ not taken back v no answer    │ it runs there        │
                            └──────────> UNSETTLED ─────────┴──────────────────────┘
                                           │  ^
                                           v  │ it cannot be here
                                         SETTLING ── RUNNING: it runs here

**The guest's end** may come in any thread, mostly a vCPU's: an outcome is appended to a list,
which is atomic, and never taken out again. The state is not written then; it is *seen through*
`AT_END`: what is RUNNING, and has an outcome, has ENDED. Where a state is not in `AT_END`, the
outcome waits: before the machine runs, a `stop` is kept until it does; while the guest is handed
over nobody knows whose end it would be, and it is kept until that is decided (`MOVED` wins then: a
guest that runs elsewhere was not stopped). Both sides first write and then look, the one the
outcome and then the state, the other the state and then the outcomes. Under the GIL one of them
sees the other, so every outcome in a state of `AT_END` has the vCPUs stopped.

**What threads share** is three things. `_outcomes` only grows: `append` and `insert` are atomic,
and an outcome that is there stays. `_state` is one reference that trio's thread alone writes; who
else reads it sees what was true a moment ago. `_stop` is set before the first state in which it is
called, and then never again; what it does (`VcpuGroup.stop`) any thread may do, at any time. The
event and the parking lot are for trio's side only. There is no lock, so a signal handler may stop
a machine, too.

**A refused operation changes nothing**, and says what the machine is and what it would have to
be. One that takes its time (a snapshot, a clone, a migration) is demanded again at the machine's
standstill, where the guest can end no more, in the states of `MEANWHILE`: what began on a guest
that ran makes no copy of one that has ended since.

**Whether it stands still** is no state of the machine's. Pauses overlap with everything here and
with one another; the coordinator counts them (`avmm.migration.Stand`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from enum import Enum
from typing import Final

import trio

from avmm.errors import RunstateError
from avmm.outcome import Cause, Outcome
from avmm.sides import anywhere, in_trio


class Runstate(Enum):
    """What a machine is at; the value is a sentence's end, after "this machine"."""

    NEW = "has not been entered"
    """It was made. A `stop` is kept until it runs."""
    STARTING = "is being entered"
    """Its parts are put together."""
    RUNNING = "runs"
    """Its guest does, or stands still in a pause."""
    MIGRATING = "is being migrated"
    """Its guest runs, or stands still for the last round; it can still be given up."""
    HANDING_OVER = "is being handed over"
    """Its guest stands still, and is the destination's as soon as that has heard so. Soon it is
    known whether it has."""
    UNSETTLED = "was handed over and waits for settle()"
    """No answer came: its guest stays stopped."""
    SETTLING = "is being settled"
    """`settle(runs_here=True)` takes back what the guest needs of this host."""
    MOVED = "was handed over, and its guest runs elsewhere"
    """Of what was here, RAM can still be looked at."""
    ENDED = "has ended"
    """Its guest has, or is to end at once; RAM and consoles' last output can still be read."""
    LEFT = "was left"
    """Its block is over, and all was given back to the host."""
    FAILED = "could not be entered"
    """Nothing of it is left."""


_S = Runstate  # the tables are unreadable with the long name

TRANSITIONS: Final[Mapping[Runstate, Set[Runstate]]] = {
    _S.NEW: {_S.STARTING},
    _S.STARTING: {_S.RUNNING, _S.FAILED},
    _S.RUNNING: {_S.MIGRATING, _S.LEFT},
    _S.MIGRATING: {_S.RUNNING, _S.HANDING_OVER, _S.UNSETTLED},
    _S.HANDING_OVER: {_S.MIGRATING, _S.RUNNING, _S.UNSETTLED, _S.MOVED},
    _S.UNSETTLED: {_S.SETTLING, _S.MOVED, _S.LEFT},
    _S.SETTLING: {_S.RUNNING, _S.UNSETTLED},
    _S.MOVED: {_S.LEFT},
    _S.LEFT: set(),
    _S.FAILED: set(),
}
"""What trio's side makes of each state. ENDED is in no row: see `AT_END`."""

AT_END: Final[Mapping[Runstate, Runstate]] = dict.fromkeys(
    (_S.RUNNING, _S.MIGRATING, _S.UNSETTLED, _S.SETTLING), _S.ENDED
)
"""What these are as soon as the guest has an outcome. In all others the outcome waits, or comes
too late to matter."""

_INSIDE: Final = frozenset(
    {
        _S.RUNNING,
        _S.MIGRATING,
        _S.HANDING_OVER,
        _S.UNSETTLED,
        _S.SETTLING,
        _S.MOVED,
        _S.ENDED,
    }
)
"""Its block is being run."""
_RUNS: Final = frozenset({_S.RUNNING})

OPERATIONS: Final[Mapping[str, tuple[Set[Runstate], str]]] = {
    "enter": ({_S.NEW}, "one that has not: a Machine runs once, make a new one"),
    "config": (frozenset(_S) - {_S.NEW, _S.STARTING, _S.FAILED}, "one that was entered"),
    **dict.fromkeys(
        (
            "console",
            "ports",
            "vsock",
            "balloon",
            "nets",
            "memory",
            "tsc_khz",
            "message_interrupt",
            "paused",
        ),
        (_INSIDE, "one inside its `async with`"),
    ),
    "save": (_RUNS, "one that runs"),
    "snapshot": (_RUNS, "one that runs"),
    "clone": (_RUNS, "one that runs"),
    "migrate": (_RUNS, "one that runs"),
    "settle": ({_S.UNSETTLED}, "one whose hand-over got no answer"),
    "wait": (_INSIDE | {_S.LEFT}, "one that was entered"),
    "stop": (frozenset(_S), "any"),
}
"""By the name that its user calls: the states in which it is done, and these in words. `config` is
so of a machine out of a file; others have theirs from the beginning."""

MEANWHILE: Final[Mapping[str, Set[Runstate]]] = {
    "snapshot": {_S.RUNNING, _S.MIGRATING},  # one of both: RAM is copied for one at a time
    "clone": _RUNS,
    "migrate": {_S.MIGRATING},
}
"""In which states these go on that were allowed to begin."""


def _nothing() -> None:
    pass


def refusal(operation: str, actual: Enum, needed: Set[Enum], expected: str) -> RunstateError:
    """The error for an operation that cannot be done in this state; `expected` is in words."""
    text = f"{operation}: this machine {actual.value}; expected {expected}"
    return RunstateError(text, operation=operation, actual=actual, needed=needed)


class Life:
    """The state of one machine, and how its guest has ended."""

    def __init__(self) -> None:
        self._state = Runstate.NEW
        self._outcomes: list[Outcome] = []
        """The first counts."""
        self._stop: Callable[[], None] = _nothing
        self._over = trio.Event()
        self._moves = trio.lowlevel.ParkingLot()

    @property
    def state(self) -> Runstate:
        """What the machine is at; any thread."""
        return AT_END.get(self._state, self._state) if self._outcomes else self._state

    @property
    def is_inside(self) -> bool:
        """Is the machine's block being run, whatever has become of the guest? Any thread."""
        return self.state in _INSIDE

    # -- what may be done ------------------------------------------------------------------

    @anywhere
    def demand(self, operation: str) -> None:
        """Raise `RunstateError` unless this may be done now."""
        allowed, words = OPERATIONS[operation]
        self._demand(operation, allowed, words)

    @anywhere
    def demand_meanwhile(self, operation: str) -> None:
        """Raise `RunstateError` unless what was begun may go on: the guest has not ended, and
        nobody has begun to hand it over."""
        self._demand(operation, MEANWHILE[operation], OPERATIONS[operation][1])

    def _demand(self, operation: str, allowed: Set[Runstate], words: str) -> None:
        actual = self.state
        if actual not in allowed:
            raise refusal(operation, actual, allowed, words)

    # -- trio's side -----------------------------------------------------------------------

    @in_trio
    def move(self, to: Runstate) -> None:
        """It has come to be this: a row of `TRANSITIONS`."""
        if to not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a machine that {self._state.value} cannot be: {to.name}")
        self._state = to
        if to is Runstate.MOVED:
            # Before all others: whatever came while it was being handed over came too late.
            self._outcomes.insert(0, Outcome(Cause.MOVED))
            self._stop()
        elif self.state is Runstate.ENDED:
            self._stop()  # an outcome that was kept, or has come just now
        self._moves.unpark_all()

    @in_trio
    def start(self, stop: Callable[[], None]) -> None:
        """It runs. `stop`, which any thread may call, asks the vCPUs to end."""
        self._stop = stop
        self.move(Runstate.RUNNING)

    @in_trio
    def leave(self) -> None:
        """Its block is over, or it could not be entered."""
        is_starting = self._state is Runstate.STARTING
        self.move(Runstate.FAILED if is_starting else Runstate.LEFT)

    @in_trio
    def hand_over(self) -> None:
        """From here on nobody ends the guest but whoever it will be. Raises `RunstateError` where
        it has ended already."""
        self.move(Runstate.HANDING_OVER)
        if self._outcomes:
            self.move(Runstate.MIGRATING)
            self.demand_meanwhile("migrate")

    async def decided(self) -> None:
        """Wait until the guest is not being handed over; a few seconds at the most."""
        while self._state is Runstate.HANDING_OVER:
            await self._moves.park()

    # -- its end ---------------------------------------------------------------------------

    @anywhere
    def end(self, outcome: Outcome) -> None:
        """The guest ends like this, unless it has an outcome already."""
        self._outcomes.append(outcome)
        if self.state is Runstate.ENDED:
            self._stop()

    @in_trio
    def finish(self) -> None:
        """Its vCPUs have ended and its devices know it. What has no outcome was left."""
        if not self._outcomes:
            self._outcomes.append(Outcome(Cause.STOPPED, detail="the machine was left"))
        self._over.set()

    async def over(self) -> Outcome:
        """Wait until `finish`: how the guest has ended."""
        await self._over.wait()
        return self._outcomes[0]
