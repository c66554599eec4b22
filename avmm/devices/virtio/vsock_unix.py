"""A guest's sockets as unix sockets of the host, as with Firecracker and cloud-hypervisor.

- A program on the host connects to PATH and sends "CONNECT <port>\\n". If somebody in the guest
  listens at that port, the program gets "OK <host port>\\n", and from then on its socket is the
  connection. Otherwise its socket is closed.
- A program in the guest that connects to port P on the host reaches the unix socket PATH_P. It is
  refused if nobody listens there, or if the program on the host does not accept it.

**Each direction ends for itself.** If one side ends its direction, or no longer reads the other
one, the other side is told so, and what was sent before is delivered. A connection ends when both
directions have ended.

**A program that gives up** before the guest has answered frees its place. If it had sent data
along with its request, the data is still owed to the guest, and the request stays for a while.
"""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from os import PathLike, fspath
from typing import TYPE_CHECKING, Final, Protocol

import trio

from avmm.ctrl_c import protected
from avmm.devices import sockets
from avmm.errors import ConfigError
from avmm.threads import in_thread_shielded

if TYPE_CHECKING:
    from avmm.devices.virtio.vsock_stream import VsockStream

_CONNECT: Final = re.compile(rb"CONNECT (\d{1,10})\r?\n")
_LONGEST_LINE: Final = 32
_LINE_SECONDS: Final = 10.0
_CLIENTS: Final = 256
"""The most programs that are served at the same time, in each direction. Others wait or are
refused."""
_OWED_SECONDS: Final = 10.0
_HOST_SECONDS: Final = 1.5
"""How long the host's program may take to accept. A Linux guest's connect gives up after two
seconds (VSOCK_DEFAULT_CONNECT_TIMEOUT)."""
_BROKEN: Final = (trio.BrokenResourceError, trio.ClosedResourceError)
_LONGEST_PATH: Final = 107 - len("_4294967295")


class GuestSockets(Protocol):
    """What the guest's sockets must offer; `avmm.devices.virtio.vsock.Vsock` does."""

    async def connect(self, port: int) -> VsockStream: ...
    def listen(self, port: int | None) -> trio.abc.Listener[VsockStream]: ...


def listen(path: str | PathLike[str]) -> socket.socket:
    """Listen at PATH, until `close`. Raises `ConfigError` if that is not possible."""
    path = fspath(path)
    if len(path.encode()) > _LONGEST_PATH:
        raise ConfigError(f"vsock socket {path}: expected a path of at most {_LONGEST_PATH} bytes")
    return sockets.listen(path, "vsock", backlog=16)


async def serve_sockets(
    vsock: GuestSockets, listener: socket.socket, path: str | PathLike[str]
) -> None:
    """Serve PATH until cancelled, and close it."""
    path = fspath(path)
    free = trio.Semaphore(_CLIENTS)
    waiting = trio.socket.from_stdlib_socket(listener)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve_guest, vsock, path, free, nursery)
            while True:
                await free.acquire()
                client = await sockets.accept(waiting, f"vsock socket {path}")
                nursery.start_soon(_serve_client, vsock, trio.SocketStream(client), free)
    finally:
        await in_thread_shielded(sockets.close, listener, path)


@protected
async def _serve_client(
    vsock: GuestSockets, client: trio.SocketStream, free: trio.Semaphore
) -> None:
    with _one_of(free), suppress(*_BROKEN, OSError):
        async with client:
            port, rest = await _read_line(client)
            if port is None:
                return
            stream = await _connect_for(client, vsock, port, is_owed=bool(rest))
            if stream is None:
                return
            async with stream:
                with suppress(*_BROKEN):  # it may have gone, but what it sent is owed
                    await client.send_all(b"OK %d\n" % stream.host_port)
                await _join(client, stream, rest)


async def _connect_for(
    client: trio.SocketStream, vsock: GuestSockets, port: int, *, is_owed: bool
) -> VsockStream | None:
    """Connect to the guest's `port`. None if it is refused, or if the client goes away first. If
    the client's data `is_owed` to the guest, this waits for a while even then."""
    stream: VsockStream | None = None

    @protected
    async def give_up() -> None:
        await sockets.gone(client.socket)
        if is_owed or sockets.has_data(client.socket):
            await trio.sleep(_OWED_SECONDS)
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            with suppress(OSError):
                stream = await vsock.connect(port)
            nursery.cancel_scope.cancel()
    except BaseException:
        if stream is not None:
            stream.close()
        raise
    return stream


async def _read_line(client: trio.SocketStream) -> tuple[int | None, bytes]:
    """The port that was asked for, and the bytes that came after the line. None if the request is
    malformed."""
    data = b""
    with trio.move_on_after(_LINE_SECONDS):
        while b"\n" not in data:
            more = await client.receive_some(4096)
            data += more
            if not more or (b"\n" not in data and len(data) > _LONGEST_LINE):
                break
    match = _CONNECT.match(data)
    if match is None or (port := int(match[1])) >= 0xFFFF_FFFF:
        return None, b""
    return port, data[match.end() :]


@protected
async def _serve_guest(
    vsock: GuestSockets, path: str, free: trio.Semaphore, nursery: trio.Nursery
) -> None:
    async with vsock.listen(None) as requests:
        while True:
            stream = await requests.accept()
            try:
                free.acquire_nowait()
            except trio.WouldBlock:
                await stream.aclose()
            else:
                nursery.start_soon(_serve_request, path, stream, free)


@protected
async def _serve_request(path: str, stream: VsockStream, free: trio.Semaphore) -> None:
    with _one_of(free):
        async with stream:
            try:
                host = await sockets.connect(f"{path}_{stream.host_port}", _HOST_SECONDS)
            except OSError:
                return  # closing it unanswered refuses it
            async with host:
                stream.accept()
                await _join(host, stream, b"")


async def _join(host: trio.SocketStream, guest: VsockStream, first: bytes) -> None:
    """Copy in both directions, until both have ended. `first` goes to the guest first."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_copy_to_guest, host, guest, first)
        await _copy_to_host(guest, host)


async def _copy_to_host(guest: VsockStream, host: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):  # the guest has reset the connection
        while data := await guest.receive_some():
            try:
                await host.send_all(data)
            except _BROKEN:  # the program reads no more
                guest.stop_receiving()
                return
    _shut(host, socket.SHUT_RDWR if guest.has_ended else socket.SHUT_WR)


@protected
async def _copy_to_guest(host: trio.SocketStream, guest: VsockStream, first: bytes) -> None:
    data: bytes | bytearray = first
    while True:
        try:
            await guest.send_all(data)
        except _BROKEN:  # the guest reads no more
            _shut(host, socket.SHUT_RD)
            return
        try:
            data = await host.receive_some()
        except _BROKEN:  # the program has gone, and has left data of the guest's unread
            break
        if not data:
            break
    await guest.send_eof()
    await sockets.gone(host.socket)
    guest.stop_receiving()


def _shut(host: trio.SocketStream, how: int) -> None:
    with suppress(OSError):
        host.socket.shutdown(how)


@contextlib.contextmanager
def _one_of(free: trio.Semaphore) -> Iterator[None]:
    try:
        yield
    finally:
        free.release()
