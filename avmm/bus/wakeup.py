"""What a device's handlers and its task share: a wake-up, and the device's lock."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

import trio


class TaskWakeup:
    """Lets a handler, in whichever thread, wake a task; see `avmm.devices.base.Wakeup`.

    Both sides announce first and look second: `set` sets the flag and then looks for a waiter;
    `wait` announces a waiter and then looks at the flag. Under the GIL one of them sees the other.
    `set` calls into trio's loop only if there is a waiter.
    """

    def __init__(self, token: trio.lowlevel.TrioToken | None = None) -> None:
        """`token` is that of the loop in which the task waits. Without one it is the running
        loop's, and the wake-up can be made in trio only, not in another thread."""
        self._token = trio.lowlevel.current_trio_token() if token is None else token
        self._flag = False
        self._waiter: trio.Event | None = None

    def set(self) -> None:
        """Wake the waiter, or the next one. Any thread."""
        self._flag = True
        if self._waiter is not None:
            self._token.run_sync_soon(self._fire, idempotent=True)

    def _fire(self) -> None:
        if self._waiter is not None:
            self._waiter.set()

    async def wait(self) -> None:
        """Return as soon as `set` has been called since the last return. Cancelling loses no
        wake-up."""
        if self._waiter is not None:
            raise trio.BusyResourceError("another task waits for this wake-up already")
        self._waiter = trio.Event()
        try:
            if self._flag:
                await trio.lowlevel.checkpoint()
            else:
                await self._waiter.wait()
        finally:
            self._waiter = None
        self._flag = False


def device_lock() -> AbstractContextManager[bool]:
    """A lock for one device, held while one of its plain handlers runs.

    "Who may touch what" at the top of `avmm.loop` says why that is enough.
    """
    return threading.Lock()
