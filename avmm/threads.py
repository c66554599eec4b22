"""Threads for what may block: files, a guest's memory, and KVM where it waits for the kernel.

Nothing that may take longer than a millisecond runs in trio's thread, because every other task of
the program would wait for it. It goes through `in_thread` instead. vCPUs (`avmm.loop`) and
requests of disks (`avmm.disks.pool`) have threads of their own.

**The limiter is avmm's own.** Users fill trio's default one with whatever they like to do in
threads. A pause or a snapshot that had to wait for their threads would keep the guest stopped.

**Cancelling.** Until the call has begun, cancelling prevents it. A call that has begun runs to its
end, and its result is returned: the cancellation is delivered at the next checkpoint. So a
function that opens something always gets to give it to its caller.

**What a thread holds.** Its function and arguments are let go of in the thread, before the caller
goes on, and so are the frames of an expected error (`AvmmError`, `OSError`). They may know views
of guest memory, and trio keeps an error that leaves a thread in a reference circle: the memory
would stay mapped until the garbage collector comes round. Errors that nobody expects keep their
traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

import outcome
import trio

from avmm.errors import AvmmError

_Result = TypeVar("_Result")
_Args = TypeVarTuple("_Args")

MOST: Final = 64
"""How many such calls run at the same time in one run of trio; others wait for their turn."""
_limiters: Final[trio.lowlevel.RunVar[trio.CapacityLimiter]] = trio.lowlevel.RunVar(
    "avmm's threads"
)


async def in_thread(function: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """Call `function(*args)` in a thread, and return or raise what it does.

    Raises `AvmmError` where the system has no thread to give. For cancelling see the top of this
    file.
    """
    job = [(function, args)]
    del function, args
    try:
        return (await trio.to_thread.run_sync(_work, job, limiter=_limiter())).unwrap()
    except RuntimeError as error:
        if not job:
            raise  # the function's own
        raise AvmmError(f"the system has no thread to give: {error}") from None


async def in_thread_shielded(function: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """`in_thread` for what has to be done even while the caller is cancelled, such as closing.

    Where the system has no thread to give, the call is made in trio's thread.
    """
    job = [(function, args)]
    del function, args
    try:
        with trio.CancelScope(shield=True):
            return (await trio.to_thread.run_sync(_work, job, limiter=_limiter())).unwrap()
    except RuntimeError:
        if not job:
            raise  # the function's own
    return _work(job).unwrap()


def _limiter() -> trio.CapacityLimiter:
    try:
        return _limiters.get()
    except LookupError:
        limiter = trio.CapacityLimiter(MOST)
        _limiters.set(limiter)
        return limiter


def _work(
    job: list[tuple[Callable[[*_Args], _Result], tuple[*_Args]]],
) -> outcome.Value[_Result] | outcome.Error:
    function, args = job.pop()
    try:
        return outcome.Value(function(*args))
    except (AvmmError, OSError) as error:
        _drop_frames(error)
        return outcome.Error(error)


def _drop_frames(error: BaseException | None) -> None:
    """Forget where an error was raised, and all those that it was raised from."""
    known: set[int] = set()
    left = [error]
    while left:
        error = left.pop()
        if error is not None and id(error) not in known:
            known.add(id(error))
            error.__traceback__ = None
            left += (error.__cause__, error.__context__)
