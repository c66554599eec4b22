"""Ctrl-C: where it may interrupt avmm, and where it has to wait.

Python raises `KeyboardInterrupt` between any two instructions of the main thread. If that comes
between taking something and guarding it, what was taken is lost: a thread, a descriptor, a pause.
trio can put it off: in code that is *protected*, it waits, and trio raises it at the next
checkpoint of the program's main task, like a cancellation. avmm's own code copes with a
cancellation at each checkpoint, so all of it is protected: each function that users call, each
task of ours, and each block (`context`). A function that they call is protected as well. Handlers
and devices of users are not (`interruptible`).

There is one difference to a cancellation: a `trio.CancelScope` does not shield from it. So what
must be done in any case, in a task that may be the main task, is done by `undisturbed`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import wraps
from types import TracebackType
from typing import Final, Generic, ParamSpec, TypeVar, TypeVarTuple

import trio

from avmm.failures import raise_together

_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")
_Yielded = TypeVar("_Yielded")
_Args = TypeVarTuple("_Args")

protected: Final = trio.lowlevel.enable_ki_protection
"""Decorates a function in which Ctrl-C waits for the next checkpoint of the main task."""


@trio.lowlevel.disable_ki_protection
async def interruptible(work: Awaitable[_Result]) -> _Result:
    """Await what a user has written: Ctrl-C interrupts that at any instruction, as always."""
    return await work


def context(
    function: Callable[_Params, AsyncIterator[_Yielded]],
) -> Callable[_Params, AbstractAsyncContextManager[_Yielded]]:
    """`contextlib.asynccontextmanager`, whose entering and leaving are protected."""
    make = asynccontextmanager(function)

    @wraps(function)
    def made(
        *args: _Params.args, **kwargs: _Params.kwargs
    ) -> AbstractAsyncContextManager[_Yielded]:
        return _Context(make(*args, **kwargs))

    return made


class _Context(AbstractAsyncContextManager[_Yielded], Generic[_Yielded]):
    def __init__(self, manager: AbstractAsyncContextManager[_Yielded]) -> None:
        self._manager = manager

    @protected
    async def __aenter__(self) -> _Yielded:
        return await self._manager.__aenter__()

    @protected
    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._manager.__aexit__(kind, error, traceback)


@protected
async def undisturbed(function: Callable[[*_Args], Awaitable[_Result]], *args: *_Args) -> _Result:
    """Await `function(*args)`, whatever is cancelled and however often Ctrl-C is pressed. If it
    was pressed, this raises `KeyboardInterrupt` afterwards. Otherwise it returns or raises what
    the function does.
    """
    with trio.CancelScope(shield=True):
        results = [await (_in_a_child if _may_be_main() else _call)(function, *args)]
    return results[0]


def _may_be_main() -> bool:
    """trio interrupts only its main task. That is a child of the root task, as are few others."""
    nursery = trio.lowlevel.current_task().parent_nursery
    return nursery is not None and nursery.parent_task is trio.lowlevel.current_root_task()


async def _call(function: Callable[[*_Args], Awaitable[_Result]], *args: *_Args) -> _Result:
    return await function(*args)


async def _in_a_child(function: Callable[[*_Args], Awaitable[_Result]], *args: *_Args) -> _Result:
    results: list[_Result] = []
    errors: list[BaseException] = []

    @protected
    async def run() -> None:
        with trio.CancelScope(shield=True):  # an interrupted nursery is cancelled
            try:
                results.append(await function(*args))
            except BaseException as error:
                errors.append(error)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
    except BaseException as error:
        # Nothing but the interrupt comes out of this nursery.
        errors[:0] = error.exceptions[:1] if isinstance(error, BaseExceptionGroup) else [error]
    raise_together(errors, "interrupted, and it has failed")
    return results[0]
