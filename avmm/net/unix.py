"""Frames over a unix stream socket, each after its length (4 bytes, big endian).

This is the format of passt and of QEMU's `-netdev stream`. When the peer goes, the guest's link
goes down. If it had connected to us, the link comes up again with the next peer; there is one at a
time, and the others wait for their turn.
"""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from os import PathLike, fspath
from typing import Final

import trio

from avmm.devices import sockets
from avmm.devices.virtio.frame import MOST_BYTES, Backend, Frame
from avmm.errors import ConfigError
from avmm.threads import in_thread, in_thread_shielded

logger = logging.getLogger("avmm.net")

_LENGTH: Final = 4
_CHUNK: Final = 256 * 1024


class UnixStream(Backend):
    """Made by `connect` or `listen`; whoever makes it closes it.

    With `held` False it neither connects nor listens before `acquire`. `release` closes the
    connection: to the peer it looks as if the guest had gone, and as if it came back at `acquire`.
    """

    def __init__(self, path: str, *, listens: bool) -> None:
        self._path = path
        self._listens = listens
        self._listener: socket.socket | None = None
        self._peer: trio.socket.SocketType | None = None
        self._opened: socket.socket | None = None
        """The peer's socket, which `close` can close in any thread."""
        self._acquired = trio.Event()
        self._forget()

    def _forget(self) -> None:
        self._connected = trio.Event()
        self._received = bytearray()
        self._unsent = b""
        self._begun: Frame | None = None
        """A frame of which `_unsent` is the rest."""

    @classmethod
    def connect(cls, path: str | PathLike[str], *, held: bool = True) -> UnixStream:
        """Connect to the socket at `path`. Raises `ConfigError` if nobody listens there."""
        backend = cls(fspath(path), listens=False)
        if held:
            backend._hold(backend._open())
        return backend

    @classmethod
    def listen(cls, path: str | PathLike[str], *, held: bool = True) -> UnixStream:
        """Wait at `path` for one peer after the other. Raises `ConfigError` if that cannot be."""
        backend = cls(fspath(path), listens=True)
        if held:
            backend._hold(backend._open())
        return backend

    def _open(self) -> socket.socket:
        if self._listens:
            return sockets.listen(self._path, "net")
        try:
            return sockets.connect_now(self._path)
        except OSError as error:
            raise ConfigError(f"net socket {self._path}: {error.strerror or error}") from None

    def _hold(self, opened: socket.socket) -> None:
        if self._listens:
            self._listener = opened
        else:
            self._plug(opened)
        self._acquired.set()

    def _plug(self, opened: socket.socket) -> None:
        self._opened = opened
        self._peer = trio.socket.from_stdlib_socket(opened)
        self._connected.set()

    @property
    def is_connected(self) -> bool:
        """See `Backend`."""
        return self._peer is not None

    async def connected(self) -> None:
        """See `Backend`."""
        await trio.lowlevel.checkpoint()
        while self._peer is None:
            await self._acquired.wait()
            if self._listener is not None:
                with suppress(trio.ClosedResourceError):  # released meanwhile
                    listener = trio.socket.from_stdlib_socket(self._listener)
                    peer = await sockets.accept(listener, f"net socket {self._path}")
                    self._plug(await sockets.without_trio(peer))

    async def release(self) -> None:
        """See `Backend`."""
        listener, self._listener = self._listener, None
        if self._opened is not None:
            trio.lowlevel.notify_closing(self._opened)
        self.close()
        self._forget()
        if listener is not None:
            trio.lowlevel.notify_closing(listener)  # tasks that wait for a peer wait once more
            await in_thread_shielded(sockets.close, listener, self._path)

    async def acquire(self) -> None:
        """See `Backend`. If this is cancelled, it may hold the socket all the same."""
        if not self._acquired.is_set():
            self._hold(await in_thread(self._open))

    async def gone(self) -> None:
        """See `Backend`."""
        await self._connected.wait()
        peer = self._peer
        assert peer is not None
        if not self._listens:
            await trio.sleep_forever()
        await sockets.gone(peer)
        self._lose(peer)

    async def receive(self) -> Frame:
        """See `Backend`."""
        await self._connected.wait()
        peer = self._peer
        assert peer is not None
        while True:
            received = self._received
            length = int.from_bytes(received[:_LENGTH], "big")
            if length > MOST_BYTES:
                logger.warning("net: the peer sends a frame of %d bytes: the link is cut", length)
                self._lose(peer)
                raise trio.EndOfChannel
            if len(received) >= _LENGTH + length:
                data = bytes(received[_LENGTH : _LENGTH + length])
                del received[: _LENGTH + length]
                return Frame(data)
            more = b""
            with suppress(OSError):
                more = await peer.recv(_CHUNK)
            if not more:
                self._lose(peer)
                raise trio.EndOfChannel
            received += more

    def _lose(self, peer: trio.socket.SocketType) -> None:
        """The peer has gone. Where we listen, another one may come."""
        if self._listens and self._peer is peer:
            peer.close()
            self._opened = self._peer = None
            self._forget()

    async def send(self, frame: Frame) -> None:
        """See `Backend`."""
        peer = self._peer
        if peer is None:
            raise trio.BrokenResourceError("no peer yet")
        try:
            if self._begun != frame:
                await self._flush(peer)
                await trio.lowlevel.checkpoint()
                self._unsent = len(frame.data).to_bytes(_LENGTH, "big") + frame.data
                self._begun = frame
            await self._flush(peer)
        except (OSError, trio.ClosedResourceError) as error:
            with suppress(OSError):  # so that `receive` notices as well
                peer.shutdown(socket.SHUT_RDWR)
            raise trio.BrokenResourceError("the peer has gone") from error

    async def _flush(self, peer: trio.socket.SocketType) -> None:
        """Send the rest. If this is cancelled the stream stays intact, because what is left goes
        first next time."""
        while self._unsent:
            self._unsent = self._unsent[await peer.send(self._unsent) :]
        self._begun = None

    def close(self) -> None:
        """Close the sockets. If this listened at a path, the path is removed. Any thread may call
        it, while no task waits for a socket."""
        if self._opened is not None:
            self._opened.close()
            self._opened = self._peer = None
        if self._listener is not None:
            sockets.close(self._listener, self._path)
            self._listener = None
        self._acquired = trio.Event()
