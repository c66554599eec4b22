"""Input for a console from clients that come and go.

What a client has sent stays in a `Feeder` until the guest takes it, even after the client has
gone. So nobody who types waits for somebody else, and input is delivered in the order in which it
was put in.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import trio

from avmm.ctrl_c import protected

MOST: Final = 1 << 20
"""The most bytes that wait for the guest before `put` waits."""
_CHUNK: Final = 16 * 1024


class Feeder:
    """Passes input on to `stream`. Nothing else may send to the stream while `run` runs."""

    def __init__(self, stream: trio.abc.SendStream) -> None:
        self._stream = stream
        self._changed = trio.lowlevel.ParkingLot()
        self._has_ended = False
        self.waiting = bytearray()
        """The input that the guest has not taken yet."""

    @protected
    async def put(self, data: bytes) -> None:
        """Add input. Waits while `MOST` bytes or more wait for the guest. If this is cancelled,
        nothing was added. Input that comes after the guest has ended stays in `waiting`, up to
        the same bound."""
        await trio.lowlevel.checkpoint()
        while len(self.waiting) >= MOST:
            if self._has_ended:
                return
            await self._changed.park()
        self.waiting += data
        self._changed.unpark_all()

    @protected
    async def run(self) -> None:
        """Deliver the input until the guest has ended. If this is cancelled, the input that was
        not delivered stays in `waiting`."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                while not self.waiting:
                    await self._changed.park()
                data = bytes(self.waiting[:_CHUNK])
                try:
                    await self._stream.send_all(data)
                finally:
                    del self.waiting[: self._accepted(len(data))]
                    self._changed.unpark_all()
        self._has_ended = True
        self._changed.unpark_all()

    def _accepted(self, sent: int) -> int:
        """How many of the `sent` bytes the stream has accepted. Only a console's stream can say so
        after a failure; of any other, nothing may be sent twice."""
        accepted: int = getattr(self._stream, "accepted", sent)
        return accepted
