"""Unix sockets of the host: to listen at a path, to accept, to connect, to see who has gone.

**Descriptors run out.** A client that cannot be accepted for lack of a descriptor or of memory
waits in the listener's queue. `accept` tries again after a moment, so one client too many never
ends a guest.

**Half-closed connections.** A client that ends the direction in which it sends may still read.
Only `has_gone` says that it has closed the connection.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Final

import trio

import avmm_early
from avmm.ctrl_c import protected
from avmm.errors import ConfigError
from avmm.forks import socket_closed_in_child

logger = logging.getLogger(__name__)

_QUEUE_SECONDS: Final = 10.0
_QUEUE_STEP: Final = 0.02
_SCARCE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
"""The errors of accept(2) that say what the host has too little of. The client still waits."""
_SCARCE_SECONDS: Final = 0.1
_GONE_BEFORE: Final = (
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENONET,
)
"""The errors of accept(2) that belong to the one connection that was to be accepted."""
_GONE_STEP: Final = 0.05
_GONE_MOST_STEP: Final = 1.0
QUEUE_IS_FULL: Final = "the program that listens there accepts no more connections"


def listen(path: str | Path, what: str, backlog: int = 1) -> socket.socket:
    """A socket that listens at `path`, and that only its user may connect to.

    If there is a socket at `path` that nobody serves, this one replaces it. Raises `ConfigError`,
    which names `what` and `path`, if the socket cannot be made. The caller ends it with `close`.
    Does not block.
    """
    path = str(path)
    try:
        listener = avmm_early.take(path) or avmm_early.listen(path, backlog)
    except OSError as error:
        raise ConfigError(f"{what} socket {path}: {error.strerror or error}") from None
    return socket_closed_in_child(listener)


def close(listener: socket.socket | trio.socket.SocketType, path: str | PathLike[str]) -> None:
    """Close what `listen` returned, and remove `path`. Idempotent."""
    listener.close()
    with suppress(FileNotFoundError):
        Path(path).unlink()


@protected
async def accept(listener: trio.socket.SocketType, what: str) -> trio.socket.SocketType:
    """The next connection. Cancelling loses none.

    If the host lacks descriptors or memory, this logs a line that begins with `what`, and tries
    again until it succeeds. Raises `OSError` if the listener itself fails, and
    `trio.ClosedResourceError` if it is closed.
    """
    told = False
    while True:
        try:
            connection, _ = await listener.accept()
        except OSError as error:
            if error.errno in _SCARCE:
                if not told:
                    told = True
                    logger.warning(
                        "%s: a client waits, because the host cannot take it now: %s",
                        what,
                        error.strerror,
                    )
                await trio.sleep(_SCARCE_SECONDS)
            elif listener.fileno() < 0:
                raise trio.ClosedResourceError("this socket was closed") from None
            elif error.errno not in _GONE_BEFORE:
                raise
        else:
            return socket_closed_in_child(connection)


@protected
async def without_trio(connection: trio.socket.SocketType) -> socket.socket:
    """The same connection as a socket that can be closed outside of trio. Closes `connection`, and
    waits for a free descriptor if the host has none."""
    with connection:
        while True:
            try:
                opened = socket.socket(fileno=os.dup(connection.fileno()))
            except OSError as error:
                if error.errno not in _SCARCE:
                    raise
                await trio.sleep(_SCARCE_SECONDS)
            else:
                return socket_closed_in_child(opened)


def has_gone(connection: trio.socket.SocketType) -> bool:
    """Has the other side closed this stream socket, and not just one direction of it? Data that
    it sent before may still be waiting."""
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # Linux reports POLLHUP and POLLERR anyway
    return bool(poll.poll(0))


def has_data(connection: trio.socket.SocketType) -> bool:
    """Does data of the other side wait to be received?"""
    with socket.socket(fileno=os.dup(connection.fileno())) as peek, suppress(OSError):
        return bool(peek.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    return False


async def gone(connection: trio.socket.SocketType) -> None:
    """Return when the other side `has_gone`, or when this side has closed the connection."""
    step = _GONE_STEP
    while connection.fileno() >= 0 and not has_gone(connection):
        await trio.sleep(step)
        step = min(2 * step, _GONE_MOST_STEP)


@protected
async def connect(path: str | Path, seconds: float = _QUEUE_SECONDS) -> trio.SocketStream:
    """Connect to the socket at `path`. Raises `OSError`.

    If the listener's queue of connections is full, this waits for up to `seconds`, and then raises
    an `OSError` (EAGAIN) that says so. trio by itself would return such a socket as connected,
    though it is not.
    """
    give_up = trio.current_time() + seconds
    while True:
        stream = await trio.open_unix_socket(path)
        try:
            stream.socket.getpeername()
        except OSError as error:
            await trio.aclose_forcefully(stream)
            if error.errno != errno.ENOTCONN:
                raise
        else:
            socket_closed_in_child(stream.socket)
            return stream
        if trio.current_time() >= give_up:
            raise OSError(errno.EAGAIN, QUEUE_IS_FULL)
        await trio.sleep(_QUEUE_STEP)


def connect_now(path: str | Path) -> socket.socket:
    """Connect to the socket at `path` without waiting. Raises `OSError`, as `connect` does."""
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.setblocking(False)
        peer.connect(str(path))
    except BlockingIOError:
        peer.close()
        raise OSError(errno.EAGAIN, QUEUE_IS_FULL) from None
    except BaseException:
        peer.close()
        raise
    return socket_closed_in_child(peer)
