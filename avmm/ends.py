"""Ends for a console or port, to which clients may connect at any time.

    async with trio.open_nursery() as nursery:
        log = Scrollback(vm.ports["hvc0"], size=65536)
        nursery.start_soon(log.run)
        nursery.start_soon(serve_unix, log, "/run/guest/console")
        nursery.start_soon(write_file, log, "/var/log/guest")

Each of them follows a `Scrollback` (`avmm.scrollback`).
"""

from __future__ import annotations

import os
import tty
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from avmm.ctrl_c import protected
from avmm.devices import sockets
from avmm.errors import AvmmError
from avmm.forks import closed_in_child, let_go_of
from avmm.scrollback import Scrollback

__all__ = ["Scrollback", "serve_pty", "serve_unix", "write_file"]

_LAST_OUTPUT_SECONDS: Final = 1.0


@protected
async def write_file(log: Scrollback, path: str | os.PathLike[str]) -> None:
    """Write what the guest prints to the file at `path`, until the stream has ended.

    Raises `AvmmError` if that fails.
    """
    try:
        async with await trio.open_file(path, "wb", buffering=0) as file:
            await log.follow(file.write)
    except OSError as error:
        raise AvmmError(f"console file {os.fspath(path)}: {error.strerror}") from None


@protected
async def serve_unix(
    log: Scrollback,
    path: str | os.PathLike[str],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Let any number of clients connect to a socket at `path` that only its user may use.

    If it is started with `nursery.start`, clients can connect when that returns. It returns when
    the stream has ended and the clients have its last output, or a second after the end. Raises
    `ConfigError` if there can be no such socket. The socket is removed at the end.
    """
    listener = listen(os.fspath(path))
    task_status.started()
    try:
        async with trio.open_nursery() as clients:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_accept, listener, log, clients)
                await log.ended()
                nursery.cancel_scope.cancel()
            clients.cancel_scope.deadline = trio.current_time() + _LAST_OUTPUT_SECONDS
    finally:
        sockets.close(listener, path)


@protected
async def serve_pty(log: Scrollback, announce: Callable[[str], None]) -> None:
    """Offer the console as a terminal, whose path is passed to `announce`. Returns when the stream
    has ended and its last output is written, or a second after the end.
    """
    # Our own descriptor of the far end stays open: without it, the near end would give an
    # error whenever nobody is connected.
    near, far = os.openpty()
    try:
        tty.setraw(far)
        async with trio.lowlevel.FdStream(near) as host:
            closed_in_child(host, lambda stream: let_go_of(*_open_ends(stream, far)))
            announce(os.ttyname(far))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_exchange, log, host)
                await log.ended()
                nursery.cancel_scope.deadline = trio.current_time() + _LAST_OUTPUT_SECONDS
    finally:
        os.close(far)


def _open_ends(host: trio.lowlevel.FdStream, far: int) -> tuple[int, ...]:
    """Both ends of a terminal, if it is still open."""
    return (host.fileno(), far) if host.fileno() >= 0 else ()


@protected
async def _accept(
    listener: trio.socket.SocketType, log: Scrollback, clients: trio.Nursery
) -> None:
    while True:
        connection = await sockets.accept(listener, "console socket")
        clients.start_soon(_exchange, log, trio.SocketStream(connection))


@protected
async def _exchange(log: Scrollback, client: trio.abc.Stream) -> None:
    """Pass data in both directions, until the client has gone or the stream has ended. A direction
    that the client ends does not end the other one."""

    @protected
    async def take_input() -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in client:
                await log.send(bytes(data))
        if isinstance(client, trio.SocketStream):  # it may still read
            await sockets.gone(client.socket)
            nursery.cancel_scope.cancel()

    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(take_input)
        with suppress(trio.BrokenResourceError):
            await log.follow(client.send_all)
            nursery.cancel_scope.cancel()


def listen(path: str) -> trio.socket.SocketType:
    """A listening socket at `path`; see `avmm.devices.sockets.listen`."""
    return trio.socket.from_stdlib_socket(sockets.listen(path, "console"))
