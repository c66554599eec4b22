"""Streams for a guest to move over: by a unix socket, TCP, TLS, or a descriptor that is given.

Any other trio stream will do for `Machine.migrate` and `avmm.receive` as well. Whoever can write
to the stream can read and change the guest: without TLS it belongs on a unix socket, which is its
user's alone, or into a network that is.

Nothing here blocks trio's thread: files are read and names looked up in threads.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

import trio

from avmm.devices import sockets
from avmm.errors import ConfigError, MigrationError
from avmm.threads import in_thread
from avmm.transfer import tls as security
from avmm.transfer.targets import Target
from avmm.transfer.tls import Tls, shake_hands

logger = logging.getLogger(__name__)

_CLOSE_SECONDS: Final = 1.0
_BACKLOG: Final = 16


async def connect(target: str, *, tls: Tls | None = None) -> trio.abc.Stream:
    """Connect to whoever waits at `target`, for example an `avmm.listen` in another process.

        async with await avmm.connect("tcp:host:4711", tls=tls) as stream:
            await vm.migrate(stream)

    `target` is "unix:PATH", "tcp:HOST:PORT" or "fd:N". The last is a connected stream socket of
    this process, with descriptor N; it is taken over, and closed with the stream. With `tls`, for
    tcp only, both sides prove who they are, by TLS 1.3: the other side must show a certificate
    that `tls.ca` has signed, with HOST in it, and gets `tls.cert`.

    The stream is the caller's to close. Raises `ConfigError` where `target` or the files of `tls`
    cannot be, and `MigrationError` where nobody answers there, or the handshake fails or takes
    more than 10 seconds. Cancelled, it leaves nothing open, but for descriptor N as it was.
    """
    to = Target.parse(target)
    context = await _context(to, tls, server=False)
    if to.kind == "fd":
        await trio.lowlevel.checkpoint()
        return trio.SocketStream(_adopt(to, listening=False))
    try:
        if to.kind == "unix":
            return await sockets.connect(to.path)
        stream = await trio.open_tcp_stream(to.host, to.port)
    except OSError as error:
        raise MigrationError(f"{to}: {_why(error)}") from None
    if context is None:
        return stream
    secure = trio.SSLStream(stream, context, server_hostname=to.host)
    await shake_hands(secure, to, security.CALLING_SECONDS)
    return secure


async def listen(target: str, *, tls: Tls | None = None) -> Listener:
    """Wait for callers at `target`, for example `avmm.connect` in another process.

        async with await avmm.listen("unix:/run/line") as listener:
            async with await listener.accept() as stream, avmm.receive(stream) as vm:
                ...

    `target` is "unix:PATH", a socket that only this user may connect to, "tcp:HOST:PORT", where
    port 0 means any that is free, or "fd:N". The last is a listening stream socket of this
    process, with descriptor N; it is taken over, and closed with the listener. With `tls`, for tcp
    only, both sides prove who they are, by TLS 1.3: a caller must show a certificate that
    `tls.ca` has signed, whatever name is in it, and gets `tls.cert`.

    The listener is the caller's to close. Raises `ConfigError` where `target` or the files of
    `tls` cannot be. Cancelled, it leaves nothing open, but for descriptor N as it was.
    """
    at = Target.parse(target)
    context = await _context(at, tls, server=True)
    if at.kind == "fd":
        await trio.lowlevel.checkpoint()
        return Listener(at, [trio.SocketListener(_adopt(at, listening=True))], context)
    if at.kind == "unix":
        await trio.lowlevel.checkpoint()
        waiting = trio.socket.from_stdlib_socket(sockets.listen(at.path, "migration", _BACKLOG))
        return Listener(at, [trio.SocketListener(waiting)], context)
    try:
        listeners = await trio.open_tcp_listeners(at.port, host=at.host)
    except OSError as error:
        raise ConfigError(f"{at}: {_why(error)}") from None
    if at.port == 0:  # each has another one: only that of the first is told
        for listener in listeners[1:]:
            listener.socket.close()
        port = listeners[0].socket.getsockname()[1]
        return Listener(Target("tcp", host=at.host, port=port), listeners[:1], context)
    return Listener(at, listeners, context)


class Listener(trio.abc.Listener[trio.abc.Stream]):
    """Where callers are waited for; made by `avmm.listen`, and closed by whoever has it.

    Several tasks may await `accept` at once, and `trio.serve_listeners` works with it, too.
    """

    def __init__(
        self,
        target: Target,
        listeners: Sequence[trio.SocketListener],
        context: ssl.SSLContext | None,
    ) -> None:
        self._target = target
        self._listeners = listeners
        self._context = context
        self._called: deque[trio.SocketStream] = deque()
        self._turn = trio.Lock()  # trio lets one task wait at a socket

    @property
    def target(self) -> str:
        """Where callers come to, as `avmm.connect` takes it, with the port that was free where
        any was asked for."""
        return str(self._target)

    async def accept(self) -> trio.abc.Stream:
        """The next caller's stream, which is yours to close.

        With TLS, the next whose handshake succeeds within 4 seconds: others are logged and
        closed, and callers behind them wait. Cancelled, it closes a caller who is in the midst of
        that, and loses no other. Raises `trio.ClosedResourceError` once the listener is closed,
        and `OSError` as trio's own listeners do.
        """
        while True:
            stream = await self._next()
            if self._context is None:
                return stream
            secure = trio.SSLStream(stream, self._context, server_side=True)
            try:
                await shake_hands(secure, "who called", security.CALLED_SECONDS)
            except MigrationError as error:
                logger.warning("%s", error)
            else:
                return secure

    async def _next(self) -> trio.SocketStream:
        """Whoever calls first, at any of the sockets; who calls at the same moment is next."""
        async with self._turn:
            if not self._called:
                await self._wait()
            return self._called.popleft()

    async def _wait(self) -> None:
        failures: list[Exception] = []

        async def accept(listener: trio.SocketListener) -> None:
            try:
                self._called.append(await listener.accept())
            except (OSError, trio.ClosedResourceError) as error:
                failures.append(error)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for listener in self._listeners:
                nursery.start_soon(accept, listener)
        if failures and not self._called:
            raise failures[0]

    async def aclose(self) -> None:
        """Close it, and what nobody has accepted yet; the socket's PATH is gone then."""
        for listener in self._listeners:
            listener.socket.close()
        while self._called:
            await trio.aclose_forcefully(self._called.popleft())
        if self._target.kind == "unix":
            with suppress(FileNotFoundError):
                Path(self._target.path).unlink()
        await trio.lowlevel.checkpoint()


async def close(stream: trio.abc.Stream) -> None:
    """Close it, politely if that does not take longer than a second."""
    with (
        trio.CancelScope(shield=True),
        trio.move_on_after(_CLOSE_SECONDS),
        suppress(trio.BrokenResourceError),
    ):
        await stream.aclose()


async def _context(target: Target, tls: Tls | None, *, server: bool) -> ssl.SSLContext | None:
    if tls is None:
        return None
    if target.kind != "tcp":
        raise ConfigError(f"target {target}: TLS is for tcp:HOST:PORT")
    return await in_thread(partial(tls.context, server=server))


def _adopt(target: Target, *, listening: bool) -> trio.socket.SocketType:
    """The socket of this descriptor. Where it is none like that it stays as it was."""
    expected = "a listening stream socket" if listening else "a connected stream socket"
    try:
        adopted = socket.socket(fileno=target.fd)
    except OSError as error:
        raise ConfigError(f"target {target}: {_why(error)}; expected {expected}") from None
    try:
        is_stream = adopted.type == socket.SOCK_STREAM
        accepts = is_stream and adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if not listening:
            adopted.getpeername()
    except OSError as error:
        adopted.detach()
        raise ConfigError(f"target {target}: {_why(error)}; expected {expected}") from None
    if not is_stream or bool(accepts) is not listening:
        adopted.detach()
        raise ConfigError(f"target {target}: expected {expected}")
    os.set_inheritable(target.fd, False)
    return trio.socket.from_stdlib_socket(adopted)


def _why(error: OSError) -> str:
    cause = error.__cause__
    if error.strerror is None and isinstance(cause, OSError):
        return _why(cause)
    if isinstance(cause, BaseExceptionGroup) and isinstance(cause.exceptions[0], OSError):
        return _why(cause.exceptions[0])
    return security.why(error)
