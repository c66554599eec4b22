"""Consoles to which one client after another attaches: a unix socket and a pseudoterminal.

**Output** that a client leaves unread waits for the next one. A socket's client that closes its
end with unread data resets the connection, so it is known that there was some. Linux says how much
it was at most, and no more: the next client may get a part again that the last one has read.

**Input** that a client has sent is delivered, even if the client leaves before the guest takes it.
A client that ends only the direction in which it sends goes on reading.

**At the end of the guest** a client has a second to read on, and again a second after each time it
has read something, up to ten seconds in all. The rest is dropped, and a line says how much it was.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from fcntl import ioctl
from termios import FIONREAD, TIOCOUTQ
from typing import Final

import click
import trio

from avmm.devices import sockets
from avmm.devices.console import ConsoleStream
from avmm.feeder import Feeder
from avmm.machine import Machine

_BATCH_SECONDS: Final = 0.004
_LAST_OUTPUT_SECONDS: Final = 1.0
_LAST_OUTPUT_MOST_SECONDS: Final = 10.0
_CHUNK: Final = 64 * 1024
_INT: Final = 4


class Outbox:
    """The guest's output on its way to one client after another."""

    def __init__(self, stream: ConsoleStream) -> None:
        self._stream = stream
        self._unsent = bytearray()
        self.sent = 0
        """How many bytes were sent to clients."""

    async def send_to(self, send_some: Callable[[bytes], Awaitable[int]]) -> None:
        """Send the guest's output by `send_some`, which returns how many bytes were accepted,
        until the guest has ended. Output that was not accepted stays here."""
        while True:
            while self._unsent:
                count = await send_some(bytes(self._unsent[:_CHUNK]))
                del self._unsent[:count]
                self.sent += count
            # The first byte goes out at once; the rest is taken in batches, because waking up for
            # each byte would cost the guest more than printing it.
            await trio.sleep(_BATCH_SECONDS)
            if not (data := await self._stream.receive_some()):
                return
            self._unsent += data

    def give_back(self, data: bytes) -> None:
        """This was sent, but nobody has read it: it goes to the next client."""
        self._unsent[:0] = data

    @property
    def left(self) -> int:
        """How many bytes of output nobody has read. Asking throws away what the stream still
        holds, so ask once, at the end."""
        return len(self._unsent) + self._stream.discard_output()


async def serve_unix(
    listener: trio.socket.SocketType, vm: Machine, stream: ConsoleStream, feeder: Feeder
) -> None:
    """Serve one client of `listener` at a time, until the guest has ended and the client that was
    there has its output. While there is none, output waits in the port's buffer."""
    outbox = Outbox(stream)
    while (connection := await _next_client(listener, vm)) is not None:
        with connection:
            await _SocketClient(connection, feeder, outbox).serve(vm)
    _say_what_was_dropped(outbox.left)


async def serve_pty(
    near: int, far: int, vm: Machine, stream: ConsoleStream, feeder: Feeder
) -> None:
    """Serve whoever has the terminal open, until the guest has ended and its output is read.

    `near` is the terminal's near end, non-blocking, and `far` is its far end.
    """
    outbox = Outbox(stream)

    async def send_some(data: bytes) -> int:
        while True:
            await trio.lowlevel.wait_writable(near)
            with suppress(BlockingIOError):
                return os.write(near, data)

    async def take_input() -> None:
        while True:
            await trio.lowlevel.wait_readable(near)
            with suppress(BlockingIOError):
                await feeder.put(os.read(near, _CHUNK))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_input)
        async with _while_it_reads(vm, lambda: outbox.sent - _waiting(far)):
            await outbox.send_to(send_some)
            # The terminal forgets its contents when its near end is closed.
            while _waiting(far):  # noqa: ASYNC110 - no event tells it
                await trio.sleep(_BATCH_SECONDS)
        nursery.cancel_scope.cancel()
    _say_what_was_dropped(outbox.left + _waiting(far))


class _SocketClient:
    """One client of a console's socket."""

    def __init__(self, connection: trio.socket.SocketType, feeder: Feeder, outbox: Outbox) -> None:
        self._connection = connection
        self._feeder = feeder
        self._outbox = outbox
        self._unconfirmed = bytearray()
        """The newest of what was sent, at least as much as the client may not have read."""
        self._was_reset = False

    async def serve(self, vm: Machine) -> None:
        """Pass data in both directions, until the client has gone or the guest has ended."""
        async with (
            _while_it_reads(vm, lambda: self._outbox.sent) as scope,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._take_input, scope)
            try:
                await self._outbox.send_to(self._send_some)
                scope.cancel()
            except OSError as error:  # it reads no more, but may still send
                self._note(error)
        with suppress(OSError):
            self._was_reset |= bool(
                self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            )
        if self._was_reset:
            self._outbox.give_back(bytes(self._unconfirmed))

    async def _send_some(self, data: bytes) -> int:
        # Asked before: a client that has closed its end since would seem to have read all.
        unread = _unread(self._connection)
        count = await self._connection.send(data)
        self._unconfirmed += data[:count]
        del self._unconfirmed[: -(unread + count) or None]
        return count

    async def _take_input(self, scope: trio.CancelScope) -> None:
        try:
            while data := await self._connection.recv(_CHUNK):
                await self._feeder.put(data)
        except OSError as error:
            self._note(error)
        await sockets.gone(self._connection)
        scope.cancel()

    def _note(self, error: OSError) -> None:
        self._was_reset |= error.errno == errno.ECONNRESET


def _unread(connection: trio.socket.SocketType) -> int:
    """How many bytes the other side has not read: no fewer than the real number, because the
    kernel counts the memory that they take, and 0 if it has read all (unix(7), SIOCOUTQ)."""
    return int.from_bytes(ioctl(connection.fileno(), TIOCOUTQ, bytes(_INT)), "little")


def _waiting(terminal: int) -> int:
    """How many bytes this end of a terminal holds for its reader."""
    return int.from_bytes(ioctl(terminal, FIONREAD, bytes(_INT)), "little")


async def _next_client(
    listener: trio.socket.SocketType, vm: Machine
) -> trio.socket.SocketType | None:
    """The next client that connects; None if the guest ends first."""
    connection = None
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await vm.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        connection = await sockets.accept(listener, "console socket")
        nursery.cancel_scope.cancel()
    return connection


@asynccontextmanager
async def _while_it_reads(
    vm: Machine, how_much: Callable[[], int]
) -> AsyncIterator[trio.CancelScope]:
    """Cancel the block when the guest has ended and `how_much` was read no longer grows."""

    async def limit() -> None:
        await vm.wait()
        with trio.move_on_after(_LAST_OUTPUT_MOST_SECONDS):
            grows = True
            while grows:
                before = how_much()
                await trio.sleep(_LAST_OUTPUT_SECONDS)
                grows = how_much() > before
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(limit)
        yield nursery.cancel_scope
        nursery.cancel_scope.cancel()


def _say_what_was_dropped(count: int) -> None:
    if count:
        click.echo(f"avmm: console: nobody has read the last {count} bytes of output", err=True)
