"""Collects the errors of avmm's own tasks, without the groups that nurseries put around them.

A trio nursery puts whatever its tasks raise into a group of its own. Users need not know that avmm
runs nurseries, so none of these groups may reach them. But a group that a user's handler has
raised must reach the user, and the two kinds of groups look alike. So our tasks never let an error
travel through a nursery: they run in `Failures.guard`, which keeps the error object itself and
cancels what must not go on without that task.

An error refers to the frames through which it has come, and these refer to views of guest memory.
If one of these frames keeps the error in a variable, there is a reference cycle, and RAM stays
mapped until Python collects cycles. So such variables are deleted before the error goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio


def parted(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Split `error` into the cancellation, which belongs to whoever has cancelled, and the rest.

    An error that contains no cancellation is returned as the same object.
    """
    if isinstance(error, trio.Cancelled):
        return error, None
    if isinstance(error, BaseExceptionGroup):
        cancelled, rest = error.split(trio.Cancelled)
        return (cancelled, rest) if cancelled is not None else (None, error)
    return None, error


def keep(error: BaseException, cancelled: list[BaseException], own: list[BaseException]) -> None:
    """Add the cancellation in `error` to `cancelled`, and the rest of it to `own`."""
    cancellation, rest = parted(error)
    cancelled.extend([] if cancellation is None else [cancellation])
    own.extend([] if rest is None else [rest])


def raise_together(errors: list[BaseException], message: str) -> None:
    """Raise `errors`: a single one as it is, several in a group with this message. Do nothing if
    the list is empty. The list is emptied.

    An error keeps its own `__context__`. Another exception that the calling task is handling just
    then is mostly a cancellation that the error itself has caused, and would not help anybody.
    """
    if not errors:
        return
    error = errors[0] if len(errors) == 1 else BaseExceptionGroup(message, errors)
    errors.clear()
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error


class Failures:
    """The errors of some tasks, in the order in which they came. Use it only in trio."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        """`cancel` is called at each error, and cancels what must not go on then."""
        self.errors: list[BaseException] = []
        self._cancel = cancel

    def add(self, error: BaseException) -> None:
        """Keep an error that somebody else has caught."""
        self.errors.append(error)
        self._cancel()

    @trio.lowlevel.enable_ki_protection
    async def guard(self, function: Callable[[], Awaitable[object]]) -> None:
        """Await `function()` and keep the errors that it raises. Only cancellations are raised
        again. Ctrl-C goes to the main task (`avmm.ctrl_c`), unless the function lets it in."""
        try:
            await function()
        except BaseException as error:
            cancelled, own = parted(error)
            try:
                if own is not None:
                    self.add(own)
                if cancelled is not None:
                    raise cancelled from None
            finally:
                del cancelled, own


class Gathering:
    """The tasks of a `gathered` block."""

    def __init__(self, nursery: trio.Nursery, failures: Failures, scope: trio.CancelScope) -> None:
        self._nursery = nursery
        self._failures = failures
        self._scope = scope

    def start(self, function: Callable[[], Awaitable[object]]) -> None:
        """Start a task that awaits `function()`."""
        self._nursery.start_soon(self._failures.guard, function)

    def cancel(self) -> None:
        """Cancel the block and its tasks. If none of them raises an error then, the block ends
        without one."""
        self._scope.cancel()


@asynccontextmanager
async def gathered(message: str) -> AsyncIterator[Gathering]:
    """A block with tasks. It is left when all of them have ended.

    At the first error, be it a task's or the block's, all else is cancelled. The errors are raised
    by `raise_together`, with `message`, also if somebody else has cancelled the block meanwhile.
    """
    own: list[BaseException] = []
    cancelled: list[BaseException] = []
    scope = trio.CancelScope()
    failures = Failures(scope.cancel)
    try:
        with scope:
            try:
                async with trio.open_nursery() as nursery:
                    try:
                        yield Gathering(nursery, failures, scope)
                    except BaseException as error:  # a group among it is the block's own
                        keep(error, cancelled, own)
                        scope.cancel()
            except BaseException as error:
                # All tasks are guarded: it is a cancellation, or Ctrl-C in the nursery's group.
                inner = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
                for one in inner:
                    keep(one, cancelled, own)
            if cancelled and not own and not failures.errors:
                raise cancelled[0]
        raise_together([*own, *failures.errors], message)
    finally:
        for kept in (own, cancelled, failures.errors):
            kept.clear()
