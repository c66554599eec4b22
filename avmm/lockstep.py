"""Deterministic runs: the guest and the trio program take turns.

The engine runs the guest only while the program has nothing to do (avmm/soft/native/order.c).
Here is the program's side of that. When a vCPU leaves for it, its task lets all other tasks do
what they can (`settle`), and lets the vCPU go back. Then trio's thread stands still until the
guest has left again (`hold`), so no task ever runs beside the guest. What comes from outside
meanwhile (a socket, a timer of the real clock) is seen when the guest leaves, at the latest after
a millisecond of its own time.

If the guest waits for the program alone, trio runs on, because nothing but something from outside
can wake either of them.

**The clock.** If trio's clock is a `trio.testing.MockClock`, it follows the guest's time: the
guest stops at the program's next deadline, and while it stands still (it has ended, is paused, or
waits for a handler) the clock jumps to the next deadline by itself.

**The order of tasks.** trio runs the tasks that can run in an order that is partly random. While a
deterministic machine exists, that order is the one in which they were started.
"""

from __future__ import annotations

import math
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from avmm.errors import AvmmError
from avmm.sides import anywhere, in_trio, in_vcpu_thread

if TYPE_CHECKING:
    import trio.testing

    from avmm.soft.order import Order

_SECOND: Final = 1_000_000_000


class GuestTime:
    """The guest's time, for the clocks of devices. It stands at its start until there is a VM."""

    def __init__(self, epoch: int) -> None:
        """`epoch` is the start in nanoseconds since 1970."""
        self._epoch = epoch
        self.order: Order | None = None

    def nanoseconds(self) -> int:
        """Since the guest was made."""
        return 0 if self.order is None else self.order.now

    def wall(self) -> int:
        """Since 1970."""
        return self._epoch + self.nanoseconds()


class Lockstep:
    """One machine's turns with the trio program. Make it in trio."""

    def __init__(self, order: Order, never: int) -> None:
        """`never` is a deadline that never comes."""
        self.order = order
        self._never = never
        self._free = threading.Event()
        self._idle = False
        self._is_held = False
        self._pending = _pending_events()
        self._clock = _mock_clock()
        self._ahead = 0.0
        """How far the clock is ahead of the guest's time, in seconds."""

    # -- the vCPUs' threads ----------------------------------------------------------------------

    @in_vcpu_thread
    @anywhere
    def call(self) -> None:
        """trio is needed: it stands still no longer."""
        self._free.set()

    @in_vcpu_thread
    def served(self, vcpu: int) -> None:
        """The vCPU with this descriptor has served an exit by itself. If that has given trio
        nothing to do, the vCPU goes straight back, which is many times faster."""
        if self._is_held and self._pending is not None and not self._pending.poll(0):
            self.order.unchanged(vcpu)

    # -- trio ------------------------------------------------------------------------------------

    @in_trio
    async def settle(self) -> None:
        """Let all tasks do what they can at this moment of the guest's time."""
        from trio.testing import wait_all_tasks_blocked  # noqa: PLC0415 - takes long to import

        self._follow()
        await wait_all_tasks_blocked()
        self._idle = self.order.settled(self._deadline(self.order.now))

    def _follow(self) -> None:
        """Let the clock show the guest's time, unless it is ahead."""
        if self._clock is not None:
            behind = self.order.now / _SECOND + self._ahead - self._clock.current_time()
            if behind > 0:
                self._clock.jump(behind)
            else:
                self._ahead -= behind

    def _deadline(self, now: int) -> int:
        """When the program's next deadline is, on the guest's clock."""
        if self._clock is None:
            return self._never
        left = trio.lowlevel.current_statistics().seconds_to_next_deadline
        return self._never if math.isinf(left) else now + max(1, math.ceil(left * _SECOND))

    @in_trio
    def prepare(self, runs: bool) -> None:
        """A vCPU is about to be let go, and `runs` the guest, or not. From now on `call` ends
        `hold`."""
        self._free.clear()
        self.moves(not self._idle)
        self._is_held, self._idle = runs and not self._idle, False

    @in_trio
    def hold(self) -> None:
        """Stand still until the guest has left again. Does nothing if it does not run, or waits
        for trio."""
        if self._is_held:
            self._free.wait()
            self._is_held = False
            # Before any other task runs: some may run before the one that will `settle`.
            self._follow()

    @in_trio
    def moves(self, moves: bool) -> None:
        """Does the guest's time go on, or does the guest stand still for now?"""
        if self._clock is not None:
            self._clock.autojump_threshold = math.inf if moves else 0


def _mock_clock() -> trio.testing.MockClock | None:
    clock = trio.lowlevel.current_clock()
    # Without importing it: a program that has such a clock has imported it.
    if type(clock).__name__ != "MockClock":
        return None
    from trio.testing import MockClock  # noqa: PLC0415 - takes long to import

    return clock if isinstance(clock, MockClock) else None


def _pending_events() -> select.poll | None:
    """Polls what trio waits for: what is ready is what a task would be woken by, also from another
    thread. Use it only while trio does not wait itself. None if this trio does not tell."""
    found: Any = trio.lowlevel.current_root_task()
    for name in ("_runner", "io_manager", "_epoll"):  # private: nothing public tells
        found = getattr(found, name, None)
    if found is None:
        return None
    pending = select.poll()
    pending.register(found.fileno(), select.POLLIN)
    return pending


class _Unshuffled:
    """Instead of trio's random numbers: tasks run in the order in which they were started."""

    def shuffle(self, batch: list[Any]) -> None:
        pass

    def random(self) -> float:
        return 1.0


_scheduler: Final[dict[str, Any]] = {}
_users: Final[list[None]] = []


@contextmanager
def ordered_tasks() -> Iterator[None]:
    """Meanwhile trio runs tasks in the order in which they were started. Raises `AvmmError` if
    this trio cannot do so."""
    import trio._core._run as scheduler  # noqa: PLC0415 - private: nothing public does this

    names = {"_ALLOW_DETERMINISTIC_SCHEDULING": True, "_r": _Unshuffled()}
    if missing := [name for name in names if not hasattr(scheduler, name)]:
        raise AvmmError(f"this version of trio ({trio.__version__}) has no {missing[0]}")
    if not _users:
        _scheduler.update({name: getattr(scheduler, name) for name in names})
        for name, value in names.items():
            setattr(scheduler, name, value)
    _users.append(None)
    try:
        yield
    finally:
        _users.pop()
        if not _users:
            for name, value in _scheduler.items():
                setattr(scheduler, name, value)
            _scheduler.clear()
