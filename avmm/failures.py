"""What tasks of ours have raised, as they raised it: no nursery's group around it.

A trio nursery puts whatever its tasks raise into a group of its own. That avmm runs nurseries is
its own business, so none of these groups may reach the user; but a group that a user's handler
has raised must reach them. Nothing in a group tells the one from the other. So our tasks never
let an error travel through a nursery: they run in `Failures.guard`, which keeps the error itself,
the very object, and cancels what must not go on without that task.

An error knows the frames that it has come through, and these know views of guest memory. A frame
among them that keeps the error in a variable closes a circle, and RAM stays mapped until Python
looks for circles. So such variables are deleted before the error goes on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


def parted(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """The cancellation in `error`, which belongs to whoever has cancelled, and all else in it.

    An error without any cancellation in it is given back as it is, the same object.
    """
    if isinstance(error, trio.Cancelled):
        return error, None
    if isinstance(error, BaseExceptionGroup):
        cancelled, rest = error.split(trio.Cancelled)
        return (cancelled, rest) if cancelled is not None else (None, error)
    return None, error


def raise_together(errors: list[BaseException], message: str) -> None:
    """Raise the only one of `errors` as it is, several in a group with this message, none where
    there is none. The list is emptied.

    An error keeps its own `__context__`. What else is being handled in the calling task (mostly
    a cancellation that the error itself has caused) tells nobody anything.
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
    """The errors of some tasks in the order in which they came. From trio only."""

    def __init__(self, cancel: Callable[[], object]) -> None:
        """`cancel` is called at each error: it ends what must not go on then."""
        self.errors: list[BaseException] = []
        self._cancel = cancel

    def add(self, error: BaseException) -> None:
        """Keep an error that somebody else has caught."""
        self.errors.append(error)
        self._cancel()

    async def guard(self, function: Callable[[], Awaitable[object]]) -> None:
        """Await `function()` and keep what it raises. Only cancellations pass."""
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
