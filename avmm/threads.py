"""Threads for calls that may block: on files, on a guest's memory, and in KVM.

Nothing that may take longer than a millisecond runs in trio's thread, because every other task of
the program would wait for it. It goes through `in_thread` instead. vCPUs (`avmm.loop`) and
requests of disks (`avmm.disks.pool`) have threads of their own.

**The limiter is avmm's own.** A program may fill trio's default limiter with its own threads. A
pause or a snapshot that had to wait for these would keep the guest stopped.

**Cancelling.** Until the call has begun, cancelling prevents it. A call that has begun runs to its
end, and its result is returned: the cancellation is delivered at the next checkpoint. So a
function that opens something can always hand it to its caller.

**Deterministic runs** have no threads (`avmm.chance`): the call is made in trio's thread, so what
follows it does so at the same moment in each run.

**What a thread holds.** The thread drops its function, its arguments and the frames of an expected
error (`AvmmError`, `OSError`) before the caller goes on. They may refer to views of guest memory,
and trio keeps an error that leaves a thread in a reference circle: the memory would stay mapped
until the garbage collector runs. Unexpected errors keep their traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

import outcome
import trio

from avmm import chance
from avmm.errors import AvmmError

_Result = TypeVar("_Result")
_Args = TypeVarTuple("_Args")

MOST: Final = 64
"""The most calls that run at the same time in one run of trio. Others wait for their turn."""
_limiters: Final[trio.lowlevel.RunVar[trio.CapacityLimiter]] = trio.lowlevel.RunVar(
    "avmm's threads"
)


@trio.lowlevel.enable_ki_protection
async def in_thread(function: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """Call `function(*args)` in a thread. Returns what it returns, and raises what it raises.

    Also raises `AvmmError` if the system cannot start a thread. The top of this file says what
    cancelling does.
    """
    if chance.is_fixed():
        await trio.lowlevel.checkpoint()
        return function(*args)
    job = [(function, args)]
    del function, args
    try:
        return (await trio.to_thread.run_sync(_work, job, limiter=_limiter())).unwrap()
    except RuntimeError as error:
        if not job:
            raise  # the function's own
        raise AvmmError(f"the system cannot start another thread: {error}") from None


@trio.lowlevel.enable_ki_protection
async def in_thread_shielded(function: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """Like `in_thread`, for work that must be done even if the caller is cancelled, such as
    closing.

    If the system cannot start a thread, the call is made in trio's thread. Ctrl-C is raised after
    the call.
    """
    if chance.is_fixed():
        return function(*args)
    job = [(function, args)]
    del function, args
    interrupt: KeyboardInterrupt | None = None
    try:
        while True:
            try:
                with trio.CancelScope(shield=True):
                    done = await trio.to_thread.run_sync(_work, job, limiter=_limiter())
            except RuntimeError:
                if not job:
                    raise  # the function's own
                done = _work(job)
            except KeyboardInterrupt as error:
                if not job:
                    raise
                interrupt = error  # it came before the call had begun
                continue
            if interrupt is not None:
                raise interrupt
            return done.unwrap()
    finally:
        del interrupt


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
    """Drop the traceback of an error, and of all errors that led to it."""
    known: set[int] = set()
    left = [error]
    while left:
        error = left.pop()
        if error is not None and id(error) not in known:
            known.add(id(error))
            error.__traceback__ = None
            left += (error.__cause__, error.__context__)
