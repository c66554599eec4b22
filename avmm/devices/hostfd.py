"""A host descriptor (terminal, pipe, file, socket) read and written from trio.

Non-blocking mode belongs to the open file, not to the descriptor: set on standard output, it
would hit the shell, whatever else shares the terminal, and our own messages. So a terminal or
pipe is opened once more, for a mode of our own; a file is never waited for; a socket is told
at each call.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio

_CHUNK: Final = select.PIPE_BUF
"""A pipe that is writable takes so many bytes without waiting, whatever its mode."""
_TIOCGPTN: Final = 0x80045430


class HostFd:
    """Reads from or writes to what `fd` refers to, which itself is left as it is."""

    def __init__(self, fd: int, flags: int) -> None:
        """`flags` is os.O_RDONLY or os.O_WRONLY. Raises `OSError` for a closed `fd`."""
        self._writing = trio.Lock()
        kind = os.fstat(fd).st_mode
        self._socket: socket.socket | None = None
        self._waits = stat.S_ISFIFO(kind) or os.isatty(fd)
        self.may_block = False
        """Whether `write_now` may wait for who reads: no mode of our own could be had."""
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(fd))
            self.fd = self._socket.fileno()
            return
        self.fd = -1
        if self._waits and os.get_blocking(fd):
            # Not permitted, as after `su`: then reading and writing may block for a moment.
            own = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            with suppress(OSError):
                if not _is_pty_master(fd):
                    self.fd = os.open(f"/proc/self/fd/{fd}", flags | own)
            self.may_block = self.fd < 0
        if self.fd < 0:
            self.fd = os.dup(fd)

    async def read(self) -> bytes:
        """Some bytes, b"" at the end of input. Cancelling loses none."""
        while True:
            if self._waits or self._socket:
                await trio.lowlevel.wait_readable(self.fd)
            else:
                await trio.lowlevel.checkpoint()
            try:
                if self._socket:
                    return self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
                return os.read(self.fd, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                return b""  # a terminal that hung up

    async def write(self, data: bytes) -> None:
        """All of `data` in one piece, whoever else writes; raises `OSError` where nobody reads
        any more."""
        async with self._writing:
            while data:
                await self.writable()
                data = data[self.write_now([data[:_CHUNK]]) :]

    async def writable(self) -> None:
        """Return when `write_now` may take something, but for somebody else being quicker."""
        if self._waits or self._socket:
            await trio.lowlevel.wait_writable(self.fd)
        else:
            await trio.lowlevel.checkpoint()

    def write_now(self, buffers: Sequence[bytes | memoryview]) -> int:
        """As many bytes of `buffers`, at most 1024 of them, as it takes without waiting: how many.
        Raises `OSError` where nobody reads any more."""
        try:
            if self._socket:
                return self._socket.sendmsg(buffers, (), socket.MSG_DONTWAIT)
            return os.writev(self.fd, buffers)
        except BlockingIOError:
            return 0

    @property
    def is_socket(self) -> bool:
        """Whether it has to be told at each call not to wait."""
        return self._socket is not None

    def close(self) -> None:
        """Close our own descriptor."""
        if self._socket:
            self._socket.close()
        else:
            os.close(self.fd)


def _is_pty_master(fd: int) -> bool:
    """Opening such a one once more makes another terminal."""
    try:
        fcntl.ioctl(fd, _TIOCGPTN, bytes(4))
    except OSError:
        return False
    return True
