"""A forked child lets go of its parent's guests.

`fork` copies every descriptor and mapping. Without this, a child of `os.fork` or of
`multiprocessing` would keep a disk locked, a VM and its RAM alive, and connections open after the
parent has closed them. So whatever holds something of a guest registers itself here, and is
closed in the child before any other code runs there. In the child a machine is of no use.

The child only closes: it shares trio's epoll descriptor with its parent, so it must not tell trio
of anything, and it must not unlock, unlink or join what is still the parent's. Programs that are
started (`subprocess`) need none of this, because all descriptors are closed on `exec`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import socket

    import trio

_Owner = TypeVar("_Owner")
_Socket = TypeVar("_Socket", "socket.socket", "trio.socket.SocketType")

_owners: Final[WeakKeyDictionary[Any, Callable[[Any], object]]] = WeakKeyDictionary()


def closed_in_child(owner: _Owner, close: Callable[[_Owner], object]) -> None:
    """Call `close(owner)` in a forked child, if `owner` still exists then. `close` must not refer
    to `owner`, and must not wait for threads: they do not exist in the child."""
    _owners[owner] = close


def socket_closed_in_child(connection: _Socket) -> _Socket:
    """Close this socket in a forked child. Returns it."""
    closed_in_child(connection, _let_go_of_socket)
    return connection


def close_descriptor(fd: int) -> None:
    """Close a descriptor in a child. -1 is none."""
    if fd >= 0:
        os.close(fd)


def let_go_of(*fds: int) -> None:
    """Replace descriptors that objects of trio or of Python own, by /dev/null: these objects'
    own `close` would tell trio, and trio would tell the parent's epoll."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        if fd >= 0:
            os.dup2(null, fd, inheritable=False)
    os.close(null)


def _let_go_of_socket(connection: socket.socket | trio.socket.SocketType) -> None:
    let_go_of(connection.fileno())


def _let_go() -> None:
    errors: list[Exception] = []
    for owner, close in list(_owners.items()):
        try:
            close(owner)
        except Exception as error:  # of any type: the others must be closed as well
            errors.append(error)
    _owners.clear()
    if errors:
        raise ExceptionGroup("a forked child could not let go of its parent's guests", errors)


os.register_at_fork(after_in_child=_let_go)
