"""Streams for a guest to move over: unix sockets, TCP, TLS, and descriptors from elsewhere.

`Machine.migrate` and `avmm.receive` take any other trio stream as well. Whoever can write to the
stream can read and change the guest. So without TLS, use a unix socket, which only its user may
connect to, or a network that nobody else is on.

Nothing here blocks trio's thread: certificates are read and names are looked up in threads.
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
from typing import Final

import trio

from avmm.ctrl_c import protected
from avmm.devices import sockets
from avmm.errors import ConfigError, MigrationError
from avmm.forks import socket_closed_in_child
from avmm.threads import in_thread
from avmm.transfer import tls as security
from avmm.transfer.targets import Target
from avmm.transfer.tls import Tls, shake_hands

logger = logging.getLogger(__name__)

_WANTED: Final = "give the source --tls-cert, --tls-key and --tls-ca"
_PEEK_SECONDS: Final = 0.01
_CLOSE_SECONDS: Final = 1.0
_BACKLOG: Final = 16


@protected
async def connect(target: str, *, tls: Tls | None = None) -> trio.abc.Stream:
    """Connect to `target`, for example to an `avmm.listen` in another process.

        async with await avmm.connect("tcp:host:4711", tls=tls) as stream:
            await vm.migrate(stream)

    `target` is "unix:PATH", "tcp:HOST:PORT" or "fd:N". With "fd:N" this takes over descriptor N
    of this process, which must be a connected stream socket, and closes it with the stream.

    `tls` works with tcp only. Then both sides speak TLS 1.3, and each proves who it is: the other
    side must show a certificate for HOST that `tls.ca` has signed, and is shown `tls.cert`.

    Close the stream when you are done with it. Raises `ConfigError` if `target` or the files of
    `tls` are not valid, and `MigrationError` if nobody listens at `target`, or if the handshake
    fails or takes longer than 10 seconds. If it is cancelled, nothing stays open; descriptor N
    stays as it was.
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
        socket_closed_in_child(stream.socket)
    except OSError as error:
        raise MigrationError(f"{to}: {_why(error)}") from None
    if context is None:
        return stream
    assert tls is not None
    secure = trio.SSLStream(stream, context, server_hostname=tls.peer or to.host)
    await shake_hands(secure, to, security.CALLING_SECONDS, tls)
    return secure


@protected
async def listen(target: str, *, tls: Tls | None = None) -> Listener:
    """Listen at `target` for connections, for example from `avmm.connect` in another process.

        async with await avmm.listen("unix:/run/line") as listener:
            async with await listener.accept() as stream, avmm.receive(stream) as vm:
                ...

    `target` is "unix:PATH", "tcp:HOST:PORT" or "fd:N". Only this user may connect to the socket
    at PATH. PORT 0 chooses a free port; `Listener.target` says which. With "fd:N" this takes over
    descriptor N of this process, which must be a listening stream socket, and closes it with the
    listener.

    `tls` works with tcp only. Then both sides speak TLS 1.3, and each proves who it is: whoever
    connects must show a certificate that `tls.ca` has signed, for whatever name, and is shown
    `tls.cert`.

    Close the listener when you are done with it. Raises `ConfigError` if `target` or the files of
    `tls` are not valid, or if `target` cannot be listened at. If it is cancelled, nothing stays
    open; descriptor N stays as it was.
    """
    at = Target.parse(target)
    context = await _context(at, tls, server=True)
    if at.kind == "fd":
        await trio.lowlevel.checkpoint()
        return Listener(at, [trio.SocketListener(_adopt(at, listening=True))], context, tls)
    if at.kind == "unix":
        await trio.lowlevel.checkpoint()
        waiting = trio.socket.from_stdlib_socket(sockets.listen(at.path, "migration", _BACKLOG))
        return Listener(at, [trio.SocketListener(waiting)], context, tls)
    try:
        listeners = await trio.open_tcp_listeners(at.port, host=at.host)
    except OSError as error:
        raise ConfigError(f"{at}: {_why(error)}") from None
    for listener in listeners:
        socket_closed_in_child(listener.socket)
    if at.port == 0:  # each address got its own port, but `target` can name only one
        for listener in listeners[1:]:
            listener.socket.close()
        port = listeners[0].socket.getsockname()[1]
        return Listener(Target("tcp", host=at.host, port=port), listeners[:1], context, tls)
    return Listener(at, listeners, context, tls)


class Listener(trio.abc.Listener[trio.abc.Stream]):
    """Accepts connections; made by `avmm.listen`.

    Several tasks may await `accept` at the same time. `trio.serve_listeners` works with it, too.
    """

    def __init__(
        self,
        target: Target,
        listeners: Sequence[trio.SocketListener],
        context: ssl.SSLContext | None,
        tls: Tls | None = None,
    ) -> None:
        self._target = target
        self._listeners = listeners
        self._context = context
        self._tls = tls
        self._called: deque[trio.SocketStream] = deque()
        self._turn = trio.Lock()  # trio lets only one task wait on a socket

    @property
    def target(self) -> str:
        """Where it listens, in the form that `avmm.connect` takes. The port is never 0."""
        return str(self._target)

    @protected
    async def accept(self) -> trio.abc.Stream:
        """Wait for the next connection, and return its stream. Close the stream when you are done
        with it.

        With TLS, this does the handshake as well. A connection whose handshake fails, or takes
        longer than 4 seconds, is logged and closed, and the wait goes on. If it is cancelled
        during a handshake, that connection is closed; no other connection is lost. Raises
        `trio.ClosedResourceError` when the listener is closed, and `OSError` as trio's own
        listeners do.
        """
        while True:
            stream = await self._next()
            if self._context is None:
                return stream
            assert self._tls is not None
            secure = trio.SSLStream(stream, self._context, server_side=True)
            try:
                begun = trio.current_time()
                with trio.fail_after(security.CALLED_SECONDS):
                    await _demand_tls(stream)
                left = begun + security.CALLED_SECONDS - trio.current_time()
                await shake_hands(secure, "the caller", max(left, 0.0), self._tls)
                await _demand_name(secure, self._tls)
            except trio.TooSlowError:
                await trio.aclose_forcefully(stream)
                logger.warning("the caller: TLS: it has said nothing")
            except MigrationError as error:
                logger.warning("%s", error)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            else:
                return secure

    async def _next(self) -> trio.SocketStream:
        """The first connection at any of the sockets. A second one at the same moment is kept for
        the next call."""
        async with self._turn:
            if not self._called:
                await self._wait()
            return self._called.popleft()

    async def _wait(self) -> None:
        failures: list[Exception] = []

        @protected
        async def accept(listener: trio.SocketListener) -> None:
            try:
                connection = await sockets.accept(listener.socket, f"migration {self._target}")
                self._called.append(trio.SocketStream(connection))
            except (OSError, trio.ClosedResourceError) as error:
                failures.append(error)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for listener in self._listeners:
                nursery.start_soon(accept, listener)
        if failures and not self._called:
            raise failures[0]

    @protected
    async def aclose(self) -> None:
        """Stop listening, and remove the unix socket's PATH. Connections that nobody has accepted
        are closed."""
        for listener in self._listeners:
            listener.socket.close()
        while self._called:
            await trio.aclose_forcefully(self._called.popleft())
        if self._target.kind == "unix":
            sockets.close(self._listeners[0].socket, self._target.path)
        await trio.lowlevel.checkpoint()


async def why_no_source(stream: trio.abc.Stream) -> str:
    """Wait for the first bytes of a connection that was accepted. If it does not begin as a
    migration's source does, returns why not, and the caller is told if it speaks TLS. Nothing is
    received. Over TLS the caller has shown who it is, and this is not asked."""
    if not isinstance(stream, trio.SocketStream):
        return ""
    first = await _first_bytes(stream)
    if not first:
        return "it has said nothing"
    if first[0] == security.HANDSHAKE:
        await security.last_words(stream, security.SPEAKS_NO_TLS)
        return "it speaks TLS, and this side was given no --tls-cert, --tls-key and --tls-ca"
    return "" if _begins_as_hello(first) else "it did not begin as a guest's source does"


async def _first_bytes(stream: trio.SocketStream) -> bytes:
    """The first bytes that come, so many that one can tell what they begin. They can still be
    received. b"" at the end."""
    from avmm.transfer.frames import HEADER_BYTES  # noqa: PLC0415 - xxhash

    with suppress(OSError):
        while first := await stream.socket.recv(HEADER_BYTES, socket.MSG_PEEK):
            if _begins_as_hello(first) is not None:
                return first
            # The socket stays readable, so there is nothing to wait for.
            await trio.sleep(_PEEK_SECONDS)
    return b""


def _begins_as_hello(first: bytes) -> bool | None:
    from avmm.transfer.frames import begins_as_hello  # noqa: PLC0415 - xxhash

    return begins_as_hello(first)


async def _demand_tls(stream: trio.SocketStream) -> None:
    """Raise `MigrationError` if a source calls that speaks no TLS, which is told so."""
    if _begins_as_hello(await _first_bytes(stream)):
        why = "it does not speak TLS; expected --tls-cert, --tls-key and --tls-ca"
        await security.last_words(stream, _refusal(f"this side wants TLS: {_WANTED}"))
        raise MigrationError(f"the caller: TLS: {why}")


async def _demand_name(stream: trio.SSLStream[trio.SocketStream], tls: Tls) -> None:
    """Raise `MigrationError` if the caller's certificate is for another name than the one that is
    expected. The caller is told so."""
    if tls.peer is None or security.is_named(stream.getpeercert(), tls.peer):
        return
    why = f"its certificate is not for {tls.peer!r} (--tls-peer)"
    with (
        trio.move_on_after(_CLOSE_SECONDS),
        suppress(trio.BrokenResourceError, trio.ClosedResourceError),
    ):
        await stream.receive_some()  # its HELLO, so that it hears what comes now
        await stream.send_all(_refusal(f"the source is not whom this side expects: {why}"))
    await close(stream)
    raise MigrationError(f"the caller: TLS: {why}")


def _refusal(why: str) -> bytes:
    """ABORT, as a destination sends it."""
    from avmm.transfer.protocol import refusal  # noqa: PLC0415 - xxhash and msgpack

    return refusal(why)


async def close(stream: trio.abc.Stream) -> None:
    """Close the stream: in an orderly way if that takes no longer than a second."""
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
    """The socket with this descriptor. A descriptor that is anything else stays as it was."""
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
    return trio.socket.from_stdlib_socket(socket_closed_in_child(adopted))


def _why(error: OSError) -> str:
    cause = error.__cause__
    if error.strerror is None and isinstance(cause, OSError):
        return _why(cause)
    if isinstance(cause, BaseExceptionGroup) and isinstance(cause.exceptions[0], OSError):
        return _why(cause.exceptions[0])
    return security.why(error)
