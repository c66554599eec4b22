"""A host descriptor (terminal, pipe, file, socket) read and written from trio.

Non-blocking mode belongs to the open file, not to the descriptor: set on standard output, it
would hit the shell, whatever else shares the terminal, and our own messages. So a terminal or
pipe is opened once more, for a mode of our own; a file is never waited for; a socket is told
at each call.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

import trio

_CHUNK = 4096


class HostFd:
    """Reads from or writes to what `fd` refers to, which itself is left as it is."""

    def __init__(self, fd: int, flags: int) -> None:
        """`flags` is os.O_RDONLY or os.O_WRONLY. Raises `OSError` for a closed `fd`."""
        self._writing = trio.Lock()
        kind = os.fstat(fd).st_mode
        self._socket: socket.socket | None = None
        self._waits = stat.S_ISFIFO(kind) or os.isatty(fd)
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(fd))
            self._fd = self._socket.fileno()
            return
        self._fd = -1
        if self._waits:
            # Not permitted, as after `su`: then reading and writing may block for a moment.
            with suppress(OSError):
                own = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._fd = os.open(f"/proc/self/fd/{fd}", flags | own)
        if self._fd < 0:
            self._fd = os.dup(fd)

    async def read(self) -> bytes:
        """Some bytes, b"" at the end of input. Cancelling loses none."""
        while True:
            if self._waits or self._socket:
                await trio.lowlevel.wait_readable(self._fd)
            else:
                await trio.lowlevel.checkpoint()
            try:
                if self._socket:
                    return self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
                return os.read(self._fd, _CHUNK)
            except BlockingIOError:
                continue
            except OSError:
                return b""  # a terminal that hung up

    async def write(self, data: bytes) -> None:
        """All of `data` in one piece, whoever else writes; raises `OSError` where nobody reads
        any more."""
        async with self._writing:
            while data:
                data = data[await self._write_some(data[:_CHUNK]) :]

    async def _write_some(self, data: bytes) -> int:
        if self._waits or self._socket:
            await trio.lowlevel.wait_writable(self._fd)
        else:
            await trio.lowlevel.checkpoint()
        with suppress(BlockingIOError):
            if self._socket:
                return self._socket.send(data, socket.MSG_DONTWAIT)
            return os.write(self._fd, data)
        return 0

    def close(self) -> None:
        """Close our own descriptor."""
        if self._socket:
            self._socket.close()
        else:
            os.close(self._fd)
