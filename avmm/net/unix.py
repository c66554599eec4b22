"""Frames over a unix stream socket, each after its length (4 bytes, big endian).

So do passt and QEMU (`-netdev stream`) it. When the peer goes the guest's link goes down, for
good.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path
from typing import Final

import trio

from avmm.devices import sockets
from avmm.devices.virtio.frame import MOST_BYTES, Backend, Frame
from avmm.errors import ConfigError

logger = logging.getLogger("avmm.net")

_LENGTH: Final = 4
_CHUNK: Final = 256 * 1024


class UnixStream(Backend):
    """Made by `connect` or `listen`; whoever makes it closes it."""

    def __init__(self, listener: socket.socket | None, close: Callable[[], None]) -> None:
        self._listener = listener
        self._on_close = close
        self._peer: trio.socket.SocketType | None = None
        self._connected = trio.Event()
        self._received = bytearray()
        self._unsent = b""
        self._begun: Frame | None = None
        """A frame of which `_unsent` is the rest."""

    @classmethod
    def connect(cls, path: str | PathLike[str]) -> UnixStream:
        """Connect to who listens at `path`; raises `ConfigError` where nobody does."""
        peer = socket.socket(socket.AF_UNIX)
        peer.setblocking(False)
        try:
            peer.connect(fspath(path))
        except OSError as error:
            peer.close()
            raise ConfigError(f"net socket {fspath(path)}: {error.strerror or error}") from None
        backend = cls(None, lambda: None)
        backend._plug(trio.socket.from_stdlib_socket(peer))
        return backend

    @classmethod
    def listen(cls, path: str | PathLike[str]) -> UnixStream:
        """Wait at `path` for one peer; raises `ConfigError` where that cannot be."""
        path = fspath(path)
        listener = sockets.listen(path, "net")

        def close() -> None:
            listener.close()
            with suppress(FileNotFoundError):
                Path(path).unlink()

        return cls(listener, close)

    def _plug(self, peer: trio.socket.SocketType) -> None:
        self._peer = peer
        self._connected.set()

    @property
    def is_connected(self) -> bool:
        """See `Backend`."""
        return self._peer is not None

    async def connected(self) -> None:
        """See `Backend`."""
        if self._peer is None and self._listener is not None:
            peer, _ = await trio.socket.from_stdlib_socket(self._listener).accept()
            self._plug(peer)
        await trio.lowlevel.checkpoint()

    async def receive(self) -> Frame:
        """See `Backend`."""
        await self._connected.wait()
        assert self._peer is not None
        while True:
            received = self._received
            length = int.from_bytes(received[:_LENGTH], "big")
            if length > MOST_BYTES:
                logger.warning("net: the peer sends a frame of %d bytes: cut off", length)
                raise trio.EndOfChannel
            if len(received) >= _LENGTH + length:
                data = bytes(received[_LENGTH : _LENGTH + length])
                del received[: _LENGTH + length]
                return Frame(data)
            try:
                more = await self._peer.recv(_CHUNK)
            except OSError:
                raise trio.EndOfChannel from None
            if not more:
                raise trio.EndOfChannel
            received += more

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
        except OSError as error:
            raise trio.BrokenResourceError("the peer has gone") from error

    async def _flush(self, peer: trio.socket.SocketType) -> None:
        """Send the rest. Cancelled, the stream is still whole: what is left goes first."""
        while self._unsent:
            self._unsent = self._unsent[await peer.send(self._unsent) :]
        self._begun = None

    def close(self) -> None:
        """Close the sockets; the one that was made by `listen` is removed."""
        if self._peer is not None:
            self._peer.close()
        self._on_close()
