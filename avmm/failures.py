"""What tasks of ours have raised, as they raised it: no nursery's group around it.

A trio nursery puts whatever its tasks raise into a group of its own. That avmm runs nurseries is
its own business, so none of these groups may reach the user; but a group that a user's handler
has raised must reach them. Nothing in a group tells the one from the other. So our tasks never
let an error travel through a nursery: they run in `Failures.guard`, which keeps the error itself,
the very object, and cancels what must not go on without that task.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

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


def raise_together(errors: Iterable[BaseException], message: str) -> None:
    """Raise the only one of `errors` as it is, several in a group with this message.

    An error keeps its own `__context__`. What else is being handled in the calling task (mostly
    a cancellation that the error itself has caused) tells nobody anything.
    """
    found = list(errors)
    if not found:
        return
    error = found[0] if len(found) == 1 else BaseExceptionGroup(message, found)
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, found  # or they and this frame would know each other


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
            if own is not None:
                self.add(own)
            if cancelled is not None:
                raise cancelled from None
