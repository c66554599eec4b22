"""A console's scrollback: its newest output, for those who connect late.

A `Scrollback` reads a console's or port's stream all the time, so that the guest never waits for
anybody, and keeps the newest `size` bytes. A follower gets these bytes first, and then the new
ones. A follower that is slower than the guest misses what has left the buffer meanwhile. Nothing
else is buffered. The followers are in `avmm.ends`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from avmm.ctrl_c import protected
from avmm.errors import ConfigError
from avmm.feeder import Feeder

_CHUNK: Final = 16 * 1024


class Scrollback:
    """The newest output of `stream`, for any number of followers. Nothing else may read the
    stream.
    """

    def __init__(self, stream: trio.abc.Stream, size: int = 64 * 1024) -> None:
        if type(size) is not int or size < 1:
            raise ConfigError(f"a scrollback of {size!r} bytes: expected at least 1")
        self._stream = stream
        self._input = Feeder(stream)
        self._size = size
        self._kept = bytearray()
        self._end = 0
        self._ended = trio.Event()
        self._news = trio.lowlevel.ParkingLot()

    @property
    def contents(self) -> bytes:
        """The bytes that are kept now, oldest first."""
        return bytes(self._kept)

    @protected
    async def run(self) -> None:
        """Read the stream until its end, and deliver the followers' input to it. If this is
        cancelled, output that it has not read yet stays in the stream.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._input.run)
            with suppress(trio.ClosedResourceError):
                while data := await self._stream.receive_some():
                    self._kept += data
                    del self._kept[: -self._size]
                    self._end += len(data)
                    self._news.unpark_all()
            self._ended.set()
            self._news.unpark_all()
            nursery.cancel_scope.cancel()

    @protected
    async def follow(self, send: Callable[[bytes], Awaitable[object]]) -> None:
        """Await `send` with the bytes that are kept, then with new ones as they come, until the
        stream has ended.
        """
        at = 0
        while True:
            first = self._end - len(self._kept)
            at = max(at, first)
            if data := bytes(self._kept[at - first : at - first + _CHUNK]):
                at += len(data)
                await send(data)
            elif self._ended.is_set():
                return
            else:
                await self._news.park()

    async def send(self, data: bytes) -> None:
        """Send input from any follower to the guest. It is delivered while `run` runs, in the
        order of the calls; up to a mebibyte waits for the guest, and then this waits too."""
        await self._input.put(data)

    async def ended(self) -> None:
        """Return when the stream has ended."""
        await self._ended.wait()
