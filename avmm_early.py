"""The first milliseconds of the `avmm` command: its control socket, before avmm is imported.

Importing avmm takes some tenths of a second. A program that has started `avmm run --control
unix:PATH` looks for the socket within tens of milliseconds. So the command's entry point is here,
outside of the package, and makes the socket first. Who connects meanwhile waits in the socket's
queue, and is served when avmm is ready.

Nothing is decided here. If the socket cannot be made, or if the command line turns out to be
wrong, `avmm.cli` says so later. A socket that nobody has taken by then is removed.
"""

from __future__ import annotations

import errno
import gc
import os
import socket
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NoReturn

_COMMANDS: Final = ("run", "restore", "receive")
_BACKLOG: Final = 16
_MOST_PATH_BYTES: Final = 107
_INTERRUPTED: Final = 130

_waiting: Final[dict[str, socket.socket]] = {}
"""What listens already, by its path, until it is taken."""


def main() -> NoReturn:
    """The entry point of the `avmm` command; does not return."""
    gc.disable()  # until avmm is imported: it would look at all that comes to stay (`avmm.cli`)
    _fill_standard_descriptors()
    path = control_path(sys.argv[1:])
    try:
        if path is not None:
            with suppress(OSError):  # avmm tries again, and says what is wrong
                _waiting[path] = listen(path, _BACKLOG)
        from avmm.cli import main as command  # noqa: PLC0415 - this is what takes so long

        command()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    finally:
        for path, listener in _waiting.items():
            listener.close()
            with suppress(OSError):
                os.unlink(path)


def control_path(arguments: Sequence[str]) -> str | None:
    """Where this command line wants its control socket, or None.

    Click reads the command line later, with all its rules. If it finds another path, the socket
    that was made too early is removed again.
    """
    if not any(word in _COMMANDS for word in arguments):
        return None
    target = ""
    words = iter(arguments)
    for word in words:
        if word == "--":
            break
        name, is_joined, value = word.partition("=")
        if name == "--control":
            target = value if is_joined else next(words, "")
    kind, _, path = target.partition(":")
    return path if kind == "unix" and path else None


def take(path: str) -> socket.socket | None:
    """The socket that `main` has made at `path`, if it has. From now on it is the caller's."""
    return _waiting.pop(path, None)


def listen(path: str, backlog: int) -> socket.socket:
    """A socket that listens at `path`, and that only its user may connect to.

    If there is a socket at `path` that nobody serves, this one replaces it. The socket gets this
    name when it listens already, so whoever finds it can connect. Raises `OSError`. Does not
    block.
    """
    with suppress(OSError):  # if something else is in the way, `bind` or `link` says so
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _is_served(path):
            os.unlink(path)
    hidden = os.path.join(os.path.dirname(path), f".{os.urandom(4).hex()}")
    if len(os.fsencode(path)) > _MOST_PATH_BYTES or len(os.fsencode(hidden)) > _MOST_PATH_BYTES:
        return _bound(path, backlog)
    listener = _bound(hidden, backlog)
    try:
        os.link(hidden, path)
    except OSError as error:
        listener.close()
        if error.errno == errno.EEXIST:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)) from None
        return _bound(path, backlog)  # a file system without hard links
    except BaseException:
        listener.close()
        raise
    finally:
        os.unlink(hidden)
    return listener


def _bound(path: str, backlog: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.setblocking(False)
        listener.bind(path)
    except BaseException:
        listener.close()
        raise
    try:
        os.chmod(path, 0o600)  # before anybody can connect
        listener.listen(backlog)
    except BaseException:
        listener.close()
        os.unlink(path)
        raise
    return listener


def _is_served(path: str) -> bool:
    """Does a socket of some process have this path? Asking leaves no connection in its queue.

    A datagram socket cannot be connected to a stream socket: Linux says that the types differ, or
    that nobody has the path.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) in (0, errno.EPROTOTYPE)


def _fill_standard_descriptors() -> None:
    """If one of these descriptors is closed (`avmm run <&-`), open /dev/null there, before another
    file takes its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
