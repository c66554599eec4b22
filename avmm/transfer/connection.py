"""Connects a byte stream with one side of the protocol: sends frames, and waits for what comes."""

from __future__ import annotations

import errno
import math
import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

import trio

from avmm.errors import MigrationError
from avmm.transfer import tls as security
from avmm.transfer.frames import Buffer
from avmm.transfer.protocol import Destination, Source

_CHUNK: Final = 512 << 10
_PIECE: Final = 256 << 10
"""How many bytes a line must take within its time limit. Smaller pieces would slow down a fast
line."""
_SOCKET_BYTES: Final = 208 << 10
"""The kernel doubles it, because its own bookkeeping needs room too."""
_LAST_WORD_SECONDS: Final = 1.0


class Connection:
    """One side of the protocol on `stream`: any trio byte stream, which the caller must close.

    The line counts as dead if 256 KiB take longer than `stall_seconds` to leave, or if nothing
    comes for that long while something is expected.
    """

    def __init__(
        self, stream: trio.abc.Stream, side: Source | Destination, stall_seconds: float
    ) -> None:
        self._stream = stream
        _widen(stream)
        self._side = side
        self._stall_seconds = stall_seconds
        self.sent = 0
        """How many bytes were sent so far."""
        self.is_broken = False
        """Nothing more can be sent."""

    async def say(self, buffers: Sequence[Buffer]) -> None:
        """Send a frame. Raises `MigrationError` if the line is cut or stands still. If the other
        side gave up before it cut the line, raises the error with its reason. If this is
        cancelled, part of the frame may have left."""
        done = False
        try:
            with trio.move_on_after(self._stall_seconds) as scope:
                for piece in _pieces(buffers):
                    await self._stream.send_all(piece)
                    self.sent += len(piece)
                    scope.deadline = trio.current_time() + self._stall_seconds
                done = True
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.is_broken = True
            await self._last_word()
            raise MigrationError(f"the line was cut: {_why(error)}") from error
        finally:
            self.is_broken |= not done
        if not done:
            raise MigrationError(
                f"the line took less than {_PIECE >> 10} KiB in {self._stall_seconds} s"
            )

    async def _last_word(self) -> None:
        """Look whether the other side said why before it cut the line."""
        with (
            trio.move_on_after(_LAST_WORD_SECONDS),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            while data := await self._stream.receive_some(_CHUNK):
                self._side.feed(data)
                while self._side.next():
                    pass

    async def hear(self, most_seconds: float = math.inf) -> None:
        """Feed the side with what comes next. Raises `MigrationError` if the line is cut, or if
        nothing comes for `stall_seconds`, or for `most_seconds` if that is shorter."""
        heard = False
        patience = min(most_seconds, self._stall_seconds)
        try:
            with trio.move_on_after(patience):
                data = await self._stream.receive_some(_CHUNK)
                heard = True
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.is_broken = True
            raise MigrationError(f"the line was cut: {_why(error)}") from error
        if not heard:
            raise MigrationError(f"nothing came for {patience} s")
        if not data:
            self.is_broken = True
            self._side.feed_end()
        self._side.feed(data)

    async def watch(self, seconds: float) -> None:
        """Listen for `seconds`, then return. Raises the other side's reason if it gives up
        meanwhile, and `MigrationError` if the line is cut."""
        with trio.move_on_after(seconds):
            while True:
                await self.hear()
                while self._side.next():
                    pass

    async def give_up(self, why: str) -> None:
        """Send ABORT if that is still possible. Do not wait long for it."""
        if self.is_broken:
            return
        self.is_broken = True
        with (
            trio.move_on_after(_LAST_WORD_SECONDS, shield=True),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError),
        ):
            for buffer in self._side.abort(why):
                await self._stream.send_all(buffer)


def _pieces(buffers: Sequence[Buffer]) -> Iterator[Buffer]:
    """The bytes of a frame, in pieces of at most `_PIECE` bytes. Only the first piece is copied,
    which joins the small buffers at the beginning."""
    first, left = bytearray(), _PIECE
    for buffer in buffers:
        view = memoryview(buffer)
        if left:
            first += view[:left]
            view, left = view[left:], _PIECE - len(first)
            if left:
                continue
            yield first
        for at in range(0, len(view), _PIECE):
            yield view[at : at + _PIECE]
    if left and first:
        yield first


def _widen(stream: trio.abc.Stream) -> None:
    """Enlarge the buffer of a unix socket. It holds 208 KiB by default, so its two ends would wake
    each other for each part of a frame. Doubling it, which any user may do, cuts the wake-ups to a
    third. A buffer larger than a processor's cache costs more than it saves. TCP adjusts its
    buffers by itself."""
    if isinstance(stream, trio.SocketStream) and stream.socket.family == socket.AF_UNIX:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)


def _why(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, ssl.SSLError):  # an OSError whose number is not an errno
        return f"TLS: {security.why(cause)}"
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"{errno.errorcode.get(cause.errno, cause.errno)} ({cause.strerror})"
    return str(error) or type(error).__name__
