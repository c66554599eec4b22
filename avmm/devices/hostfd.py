"""A host descriptor (terminal, pipe, file, socket) read and written from trio.

Non-blocking mode belongs to the open file, not to the descriptor. Setting it on standard output
would affect the shell, every other program on the terminal, and avmm's own messages. So a terminal
or pipe is opened again, which gives it a mode of its own. A file never has to be waited for. A
socket is told at each call not to wait.
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
"""A pipe that is writable accepts this many bytes without waiting, whatever its mode."""
_TIOCGPTN: Final = 0x80045430


class HostFd:
    """Reads from or writes to the file behind `fd`. `fd` itself is not changed."""

    def __init__(self, fd: int, flags: int) -> None:
        """`flags` is os.O_RDONLY or os.O_WRONLY. Raises `OSError` for a closed `fd`."""
        self._writing = trio.Lock()
        kind = os.fstat(fd).st_mode
        self._socket: socket.socket | None = None
        self._waits = stat.S_ISFIFO(kind) or os.isatty(fd)
        self.last = b""
        """The last byte that was written."""
        self.may_block = False
        """Whether `write_now` may wait for the reader, because the file could not be opened
        again."""
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(fd))
            self.fd = self._socket.fileno()
            return
        self.fd = -1
        if self._waits and os.get_blocking(fd):
            # If that is not permitted, as after `su`, reading and writing may block for a moment.
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
        """Write all of `data` in one piece, even if others write too. Raises `OSError` if the
        reading end is closed."""
        async with self._writing:
            while data:
                await self.writable()
                data = data[self.write_now([data[:_CHUNK]]) :]

    async def writable(self) -> None:
        """Return when `write_now` can probably write something. Somebody else may still be
        quicker."""
        if self._waits or self._socket:
            await trio.lowlevel.wait_writable(self.fd)
        else:
            await trio.lowlevel.checkpoint()

    def write_now(self, buffers: Sequence[bytes | memoryview]) -> int:
        """Write as many bytes of `buffers` (at most 1024 buffers) as it accepts without waiting.
        Returns how many. Raises `OSError` if the reading end is closed."""
        try:
            if self._socket:
                count = self._socket.sendmsg(buffers, (), socket.MSG_DONTWAIT)
            else:
                count = os.writev(self.fd, buffers)
        except BlockingIOError:
            return 0
        if count:
            self.last = _byte(buffers, count - 1)
        return count

    @property
    def is_socket(self) -> bool:
        """Whether it has to be told at each call not to wait."""
        return self._socket is not None

    def close(self) -> None:
        """Close the descriptor that this has made."""
        if self._socket:
            self._socket.close()
        else:
            os.close(self.fd)


def _byte(buffers: Sequence[bytes | memoryview], at: int) -> bytes:
    """The byte at this offset in all of the buffers."""
    for buffer in buffers:
        if at < len(buffer):
            return bytes(buffer[at : at + 1])
        at -= len(buffer)
    return b""


def _is_pty_master(fd: int) -> bool:
    """Is it the master of a pseudo-terminal? Opening that again would create another terminal."""
    try:
        fcntl.ioctl(fd, _TIOCGPTN, bytes(4))
    except OSError:
        return False
    return True
