"""Unix sockets of the host: to listen at a path, and to connect to one."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Final

import trio

from avmm.errors import ConfigError

_QUEUE_SECONDS: Final = 10.0
_QUEUE_STEP: Final = 0.02


def listen(path: str | Path, what: str, backlog: int = 1) -> socket.socket:
    """A socket that listens at `path`, and that only its user may connect to.

    If there is a socket at `path` that nobody serves, this one replaces it. Raises `ConfigError`,
    which names `what` and `path`, if the socket cannot be made. The caller ends it with `close`.
    Does not block.
    """
    with suppress(OSError):  # if something else is in the way, `bind` says so
        if stat.S_ISSOCK(Path(path).stat().st_mode) and not _served(path):
            Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.setblocking(False)
        listener.bind(str(path))
        Path(path).chmod(0o600)  # before anybody can connect
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{what} socket {path}: {error.strerror or error}") from None
    return listener


def close(listener: socket.socket | trio.socket.SocketType, path: str | PathLike[str]) -> None:
    """Close what `listen` returned, and remove `path`. Idempotent."""
    listener.close()
    with suppress(FileNotFoundError):
        Path(path).unlink()


def _served(path: str | Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # a full queue of connections would make it wait
        return probe.connect_ex(str(path)) in (0, errno.EAGAIN)


async def connect(path: str | Path) -> trio.SocketStream:
    """Connect to the socket at `path`. Raises `OSError`.

    If the listener's queue of connections is full, this waits for up to ten seconds. trio by
    itself would return such a socket as connected, though it is not.
    """
    give_up = trio.current_time() + _QUEUE_SECONDS
    while True:
        stream = await trio.open_unix_socket(path)
        try:
            stream.socket.getpeername()
        except OSError as error:
            await trio.aclose_forcefully(stream)
            if error.errno != errno.ENOTCONN:
                raise
        else:
            return stream
        if trio.current_time() >= give_up:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        await trio.sleep(_QUEUE_STEP)
