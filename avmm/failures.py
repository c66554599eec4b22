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

from collections.abc import Awaitable, Callable

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
