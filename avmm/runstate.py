"""The states of a machine: which state may follow which, and what may be done in each.

All of it is in this file. `Machine` calls `Life.demand` before it does anything for its user, and
`Life.move` when something has happened. It keeps no flags of its own.

Theory of operation
===================

Two kinds of events change a machine's state.

**Steps of trio's side** change it by `TRANSITIONS`: the machine is entered, migrated, settled,
left. Only trio's thread writes the state, so between two checkpoints no other step comes between
reading and writing it.

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

**The guest's end** may come in any thread, mostly in a vCPU's. An outcome is appended to a list,
which is atomic, and is never removed. The state is not written then. Instead `AT_END` translates
it when it is read: a machine that is RUNNING and has an outcome has ENDED. In a state that is not
in `AT_END`, the outcome waits. Before the machine runs, a `stop` is kept until it does. While the
guest is being handed over, nobody knows yet whose guest would end, so the outcome is kept until
that is decided. `MOVED` wins then, because a guest that runs elsewhere was not stopped.

Both sides write first and then read: the guest's end writes the outcome and then reads the state,
and trio's side writes the state and then reads the outcomes. Under the GIL at least one of them
sees what the other wrote, so each outcome in a state of `AT_END` stops the vCPUs.

**Threads share three things.** `_outcomes` only grows: `append` and `insert` are atomic, and an
outcome stays in it. `_state` is one reference that only trio's thread writes; another thread that
reads it sees what was true a moment ago. `_stop` is set before the first state in which it is
called, and never again after that; any thread may call it (`VcpuGroup.stop`) at any time. Only
trio's side uses the event and the parking lot. There is no lock, so even a signal handler may stop
a machine.

**A refused operation changes nothing.** Its error says in which state the machine is and which
state was expected. An operation that takes some time (a snapshot, a clone, a migration) is checked
again at the machine's standstill, where the guest can no longer end. It may go on in the states of
`MEANWHILE`, so an operation that began while the guest ran never copies a guest that has ended
since.

**A standstill is not a state of the machine.** Pauses overlap with everything here and with one
another; the coordinator counts them (`avmm.migration.Stand`).
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
    """The state of a machine. In messages the value follows the words "this machine"."""

    NEW = "has not been entered"
    """It was made. A `stop` is kept until it runs."""
    STARTING = "is being entered"
    """Its parts are being put together."""
    RUNNING = "runs"
    """Its guest runs, or stands still in a pause."""
    MIGRATING = "is being migrated"
    """Its guest runs, or stands still for the last round. The migration can still be given up."""
    HANDING_OVER = "is being handed over"
    """Its guest stands still, and belongs to the destination as soon as COMMIT has arrived there.
    Within seconds this side knows whether it has, or gives up waiting for the answer."""
    UNSETTLED = "was handed over and waits for settle()"
    """No answer came, so its guest stays stopped."""
    SETTLING = "is being settled"
    """`settle(runs_here=True)` takes back what the guest needs of this host."""
    MOVED = "was handed over, and its guest runs elsewhere"
    """Its RAM can still be read here."""
    ENDED = "has ended"
    """Its guest has ended, or will end at once. RAM and the consoles' last output can still be
    read."""
    LEFT = "was left"
    """Its block is over, and everything was given back to the host."""
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
"""For each state, the states to which trio's side may change it. ENDED is in no row: see
`AT_END`."""

AT_END: Final[Mapping[Runstate, Runstate]] = dict.fromkeys(
    (_S.RUNNING, _S.MIGRATING, _S.UNSETTLED, _S.SETTLING), _S.ENDED
)
"""What these states become as soon as the guest has an outcome. In all other states the outcome
waits, or comes too late to matter."""

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
"""The states in which the machine's block is being run."""
_RUNS: Final = frozenset({_S.RUNNING})

OPERATIONS: Final[Mapping[str, tuple[Set[Runstate], str]]] = {
    "enter": ({_S.NEW}, "one that has not: a Machine runs once, make a new one"),
    **dict.fromkeys(
        ("config", "engine"),
        (frozenset(_S) - {_S.NEW, _S.STARTING, _S.FAILED}, "one that was entered"),
    ),
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
    "fork_many": (_RUNS, "one that runs"),
    "migrate": (_RUNS, "one that runs"),
    "settle": ({_S.UNSETTLED}, "one whose hand-over got no answer"),
    "wait": (_INSIDE | {_S.LEFT}, "one that was entered"),
    "powerdown": ({_S.RUNNING, _S.MIGRATING}, "one that runs"),
    "halted": (_INSIDE, "one inside its `async with`"),
    "stop": (frozenset(_S), "any"),
}
"""For each operation, by the name of its method: the states in which it is allowed, and these in
words. The row of `config` is for machines that come from a file; other machines know their config
from the beginning."""

MEANWHILE: Final[Mapping[str, Set[Runstate]]] = {
    "snapshot": {_S.RUNNING, _S.MIGRATING},  # `DirtyLog` refuses whichever of them comes second
    "clone": _RUNS,
    "fork_many": _RUNS,
    "migrate": {_S.MIGRATING},
}
"""For each operation that takes some time: the states in which it may go on once it has begun."""


def _nothing() -> None:
    pass


def refusal(operation: str, actual: Enum, needed: Set[Enum], expected: str) -> RunstateError:
    """The error for an operation that is not allowed in this state. `expected` is in words."""
    text = f"{operation}: this machine {actual.value}; expected {expected}"
    return RunstateError(text, operation=operation, actual=actual, needed=needed)


class Life:
    """The state of one machine, and how its guest has ended."""

    def __init__(self) -> None:
        self._state = Runstate.NEW
        self._outcomes: list[Outcome] = []
        """Only the first one counts."""
        self._stop: Callable[[], None] = _nothing
        self._over = trio.Event()
        self._moves = trio.lowlevel.ParkingLot()

    @property
    def state(self) -> Runstate:
        """The machine's state. Any thread may read it."""
        return AT_END.get(self._state, self._state) if self._outcomes else self._state

    @property
    def is_inside(self) -> bool:
        """Is the machine's block being run, even if the guest has ended? Any thread may ask."""
        return self.state in _INSIDE

    # -- what may be done ------------------------------------------------------------------

    @anywhere
    def demand(self, operation: str) -> None:
        """Raise `RunstateError` unless this operation is allowed now."""
        allowed, words = OPERATIONS[operation]
        self._demand(operation, allowed, words)

    @anywhere
    def demand_meanwhile(self, operation: str) -> None:
        """Raise `RunstateError` unless an operation that has begun may go on: the guest must not
        have ended, and nobody may have begun to hand it over."""
        self._demand(operation, MEANWHILE[operation], OPERATIONS[operation][1])

    def _demand(self, operation: str, allowed: Set[Runstate], words: str) -> None:
        actual = self.state
        if actual not in allowed:
            raise refusal(operation, actual, allowed, words)

    # -- trio's side -----------------------------------------------------------------------

    @in_trio
    def move(self, to: Runstate) -> None:
        """Change the state, as `TRANSITIONS` allows."""
        if to not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a machine that {self._state.value} cannot become {to.name}")
        self._state = to
        if to is Runstate.MOVED:
            # First in the list, because an outcome during the hand-over came too late.
            self._outcomes.insert(0, Outcome(Cause.MOVED))
            self._stop()
        elif self.state is Runstate.ENDED:
            self._stop()  # an outcome that was kept, or has come just now
        self._moves.unpark_all()

    @in_trio
    def start(self, stop: Callable[[], None]) -> None:
        """The machine runs now. `stop`, which any thread may call, asks the vCPUs to end."""
        self._stop = stop
        self.move(Runstate.RUNNING)

    @in_trio
    def leave(self) -> None:
        """The machine's block is over, or the machine could not be entered."""
        is_starting = self._state is Runstate.STARTING
        self.move(Runstate.FAILED if is_starting else Runstate.LEFT)

    @in_trio
    def hand_over(self) -> None:
        """Begin the hand-over. Until it is decided, nobody here can end the guest. Raises
        `RunstateError` if the guest has ended already."""
        self.move(Runstate.HANDING_OVER)
        if self._outcomes:
            self.move(Runstate.MIGRATING)
            self.demand_meanwhile("migrate")

    async def decided(self) -> None:
        """Wait while the guest is being handed over: a few seconds at the most."""
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
        """The vCPUs have ended, and the devices know it. If there is no outcome, the machine was
        left."""
        if not self._outcomes:
            self._outcomes.append(Outcome(Cause.STOPPED, detail="the machine was left"))
        self._over.set()

    async def over(self) -> Outcome:
        """Wait for `finish`, and return how the guest has ended."""
        await self._over.wait()
        return self._outcomes[0]
