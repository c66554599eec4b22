"""A byte stream with a side of the protocol at our end: says frames, waits for what comes."""

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
from avmm.transfer.frames import Buffer
from avmm.transfer.protocol import Destination, Source

_CHUNK: Final = 512 << 10
_PIECE: Final = 256 << 10
"""Bytes that a line must take within its time. Less would cost a fast one."""
_SOCKET_BYTES: Final = 208 << 10
"""The kernel doubles it, to have room for its own books."""
_LAST_WORD_SECONDS: Final = 1.0


class Connection:
    """`stream` is the caller's to close; any trio byte stream will do.

    `stall_seconds`: as long may 256 KiB take to leave, or nothing come where something is waited
    for, before the line counts as dead.
    """

    def __init__(
        self, stream: trio.abc.Stream, side: Source | Destination, stall_seconds: float
    ) -> None:
        self._stream = stream
        _widen(stream)
        self._side = side
        self._stall_seconds = stall_seconds
        self.sent = 0
        """Bytes that were said so far."""
        self.is_broken = False
        """Nothing can be said any more."""

    async def say(self, buffers: Sequence[Buffer]) -> None:
        """Send a frame. Raises `MigrationError` where the line is cut or stands still, and what
        the other side has said last where it gave up. Cancelled, part of the frame may have
        left."""
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
            raise MigrationError(f"the line took too little for {self._stall_seconds} s")

    async def _last_word(self) -> None:
        """Who closes the line may have said why before."""
        with (
            trio.move_on_after(_LAST_WORD_SECONDS),
            suppress(trio.BrokenResourceError, trio.ClosedResourceError),
        ):
            while data := await self._stream.receive_some(_CHUNK):
                self._side.feed(data)
                while self._side.next():
                    pass

    async def hear(self, most_seconds: float = math.inf) -> None:
        """Feed the side with what comes next. Raises `MigrationError` where nothing comes, for
        `most_seconds` at the most."""
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
        """Return after so many seconds in which nothing came. Raises what the other side says
        where it gives up meanwhile, and `MigrationError` where the line is cut."""
        with trio.move_on_after(seconds):
            while True:
                await self.hear()
                while self._side.next():
                    pass

    async def give_up(self, why: str) -> None:
        """Say ABORT, if it can still be said, and do not wait long for it."""
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
    """The bytes of a frame, so many at a time. Only its beginning is copied: the small buffers
    there go into one piece."""
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
    """A unix socket holds 208 KiB by default: its two ends would wake each other for each part of
    a frame. Twice as much, which everybody may ask for, makes it a third of that; more than a
    processor's cache holds costs more than it saves. TCP sees to it by itself."""
    if isinstance(stream, trio.SocketStream) and stream.socket.family == socket.AF_UNIX:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)


def _why(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, ssl.SSLEOFError):  # what trio's server says to a certificate it refuses
        return "TLS: it ended without a word, as where this side's certificate is not accepted"
    if isinstance(cause, ssl.SSLError):  # an OSError whose number is none of errno's
        return f"TLS: {cause.reason or cause}"
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"{errno.errorcode.get(cause.errno, cause.errno)} ({cause.strerror})"
    return str(error) or type(error).__name__
