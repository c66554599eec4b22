"""A port of a virtio console: two bounded buffers, and the host's end of them as a trio stream.

**Output** (the guest's). While its buffer is full, the device takes no more output, and the guest
waits. Linux waits for hvc0 in a loop that holds a lock, so a console that nobody reads would hang
its guest. So if there is no room for `stall` seconds, the port is *stalled*: until somebody reads,
its buffer is a ring that keeps the newest output and counts what is `lost`. With `stall=0` it is
always a ring. With `stall=math.inf`, the default for ports that are not consoles, nothing is ever
lost.

**Input** waits until the guest has the port open: Linux throws away what comes before.

Everything here runs in trio, so there is no lock.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from select import PIPE_BUF
from typing import Any, Final

import trio

from avmm.ctrl_c import protected
from avmm.devices.console import ConsoleStream
from avmm.devices.hostfd import HostFd
from avmm.devices.state import DeviceState
from avmm.errors import ConfigError
from avmm.plain import FLAG, Bytes, Int

logger = logging.getLogger("avmm.virtio")

_LONGEST_NAME: Final = 255


class Waiters:
    """Lets tasks wait for a change. A task looks at the state first, waits, and looks again."""

    def __init__(self) -> None:
        self._lot = trio.lowlevel.ParkingLot()

    async def wait(self) -> None:
        """Until the next `set`."""
        await self._lot.park()

    def set(self) -> None:
        """Let them all look again."""
        self._lot.unpark_all()


class PortState(DeviceState, version=1):
    """The saved state of a port. `Port.check` bounds the two buffers by their sizes."""

    ready = FLAG
    is_open = FLAG
    output = Bytes()
    input = Bytes()
    stalled = FLAG
    lost = Int(0, 1 << 63)


class Port(ConsoleStream):
    """The host's end of a port: a trio stream (see `ConsoleStream`), with events.

    `name` is its name in the guest (Linux: /dev/virtio-ports/NAME). With `console`, Linux uses the
    port as a console; hvc0 is the first one. Sizes are in bytes, `stall` in seconds: see above.
    """

    def __init__(
        self,
        name: str,
        *,
        console: bool = False,
        output_size: int = 64 * 1024,
        input_size: int = 4096,
        stall: float | None = None,
    ) -> None:
        super().__init__(self)
        if not 0 < len(name.encode()) <= _LONGEST_NAME or "\0" in name:
            raise ConfigError(f"port name {name!r}: expected 1 to {_LONGEST_NAME} bytes")
        for what, size in (("output_size", output_size), ("input_size", input_size)):
            if type(size) is not int or size < 1:
                raise ConfigError(f"port {name}: {what} is {size!r}, expected a number of bytes")
        if stall is None:
            stall = 1.0 if console else math.inf
        if not stall >= 0:
            raise ConfigError(f"port {name}: stall is {stall!r}, expected a number of seconds")
        self.name = name
        self.is_console = console
        self.output_size = output_size
        self.input_size = input_size
        self.stall = stall
        self.lost = 0
        """How many bytes the guest wrote that nobody read in time."""
        self.is_open = False
        """Does the guest have the port open?"""
        self.is_connected = True
        """Is the host's end open?"""
        self.ready = False
        """Does the guest's driver know the port?"""
        self.output = bytearray()
        self.input = bytearray()
        self.stalled = False
        self.drained = Waiters()
        """Wakes the device: there may be room for output."""
        self.wanted = Waiters()
        """Wakes the device: there may be input for a guest that wants it."""
        self._output = Waiters()
        self._room = Waiters()
        self._changed = Waiters()
        self._finished = False
        self._released = False
        self._full_since: float | None = None
        self._sink: HostFd | None = None
        self._sink_error: OSError | None = None
        self.written_last = b""
        """The last byte that `write_to` has written."""
        self.on_close: Callable[[], None] = lambda: None
        """The device sets this; it is called when the host closes its end."""

    # -- the host's side ---------------------------------------------------------------------

    @protected
    async def opened(self) -> None:
        """Return when the guest has opened the port. Raises `trio.BrokenResourceError` if the
        guest ends before that."""
        await self._until(True)

    @protected
    async def closed(self) -> None:
        """Return when the guest has closed the port, or has ended."""
        await self._until(False)

    async def _until(self, is_open: bool) -> None:
        await trio.lowlevel.checkpoint()
        while self.is_open is not is_open:
            if self._finished:
                raise trio.BrokenResourceError("the guest has ended")
            await self._changed.wait()

    @protected
    async def write_to(self, fd: int) -> None:
        """Receive all output until the guest ends, and write it to `fd`: a file, pipe, terminal or
        socket, whose own mode is not changed. The near end of a pseudoterminal should not block.

        Bytes that `fd` accepts at once go there directly from guest memory. Only the rest is
        buffered. Cancelling loses nothing. Raises `OSError` if `fd` fails. The bytes that it did
        not accept can still be received.
        """
        with self._receiving, closing(HostFd(fd, os.O_WRONLY)) as sink:
            self._sink = sink
            self.written_last = b""
            try:
                await trio.lowlevel.checkpoint()
                while self._ahead or self._has_output() or not self._finished:
                    if self._ahead or self._has_output():
                        await sink.writable()
                        self._write_oldest(sink)
                    else:
                        await self._output.wait()
                    if self._sink is None:
                        raise self._sink_error or trio.ClosedResourceError()
            finally:
                self.written_last = sink.last
                self._sink = self._sink_error = None

    def _write_oldest(self, sink: HostFd) -> None:
        """Write the oldest output, as much as the sink accepts at once. There may be none left,
        because somebody has thrown it away, or has moved the guest, while we waited."""
        if not self._ahead and not self._has_output():
            return
        most = PIPE_BUF if sink.may_block else None
        oldest = self._ahead or self.output
        with memoryview(oldest) as whole, whole[:most] as waiting:
            count = sink.write_now([waiting])
        if oldest is self._ahead:
            del self._ahead[:count]
        else:
            self._has_read(count)

    # The methods that `ConsoleStream` needs of its cable.

    def _take(self, most: int | None) -> bytes | None:
        if not self.is_connected:
            raise trio.ClosedResourceError("this end of the port was closed")
        if self._released:
            return b"" if self._finished else None
        output = self.output
        data = bytes(output if most is None else output[:most])
        self._has_read(len(data))
        return data if data or self._finished else None

    def _has_output(self) -> bool:
        return bool(self.output) and not self._released

    def _has_read(self, count: int) -> None:
        """Take `count` bytes of output out of the buffer for the reader."""
        if count:
            del self.output[:count]
            self._full_since = None
            if self.stalled and len(self.output) < self.output_size:
                self.stalled = False
                if self.lost and self.stall:
                    logger.warning("port %s: read again; %d bytes were lost", self.name, self.lost)
            self.drained.set()

    def _feed(self, data: memoryview) -> int:
        if not self._has_room():
            return 0
        part = data[: self.input_size - len(self.input)]
        self.input += part
        self.wanted.set()
        return len(part)

    def _has_room(self) -> bool:
        if not self.is_connected:
            raise trio.ClosedResourceError("this end of the port was closed")
        if self._finished:
            raise trio.BrokenResourceError("the guest has ended")
        return not self._released and len(self.input) < self.input_size

    def _close(self) -> None:
        if self.is_connected:
            self.is_connected = False
            self._sink = None
            self.lost += len(self.output)
            self.output.clear()
            for waiters in (self._output, self._room, self.drained):
                waiters.set()
            self.on_close()

    # -- the device's side -------------------------------------------------------------------

    async def room(self) -> int:
        """How many bytes of output to take from the guest next. Waits until this is more than
        0."""
        while True:
            if not self.is_connected or self.stalled:
                return self.output_size
            if (room := self.output_size - len(self.output)) > 0:
                return room
            now = trio.current_time()
            if self._full_since is None:
                self._full_since = now
            if (wait := self._full_since + self.stall - now) <= 0:
                self.stalled, self._full_since = True, None
                if self.stall:
                    logger.warning(
                        "port %s: nobody has read the guest's output for %g s: from now on the "
                        "oldest output is lost, until somebody reads",
                        self.name,
                        self.stall,
                    )
            else:
                with trio.move_on_after(wait):
                    await self.drained.wait()

    @property
    def sink(self) -> HostFd | None:
        """The sink to which output can go directly, because all earlier output has gone there.
        None if there is none."""
        if self._ahead or self.output or self._sink is None or self._sink.may_block:
            return None
        return self._sink

    def write_now(self, buffers: Sequence[memoryview]) -> int:
        """Write the guest's output to the `sink`, as much as it accepts at once, possibly nothing.
        If the sink fails, it is removed."""
        if (sink := self.sink) is None:
            return 0
        try:
            return sink.write_now(buffers)
        except OSError as error:
            self._sink, self._sink_error = None, error
            self._output.set()
            return 0

    def give(self, data: bytes) -> None:
        """Add output of the guest to the buffer: at most as much as `room` returned."""
        if not self.is_connected:
            self.lost += len(data)
            return
        self.output += data
        if (excess := len(self.output) - self.output_size) > 0:
            del self.output[:excess]
            self.lost += excess
        self._output.set()

    async def some_input(self) -> bytearray:
        """The input, as soon as there is some and the guest has the port open."""
        while not (self.input and self.is_open):
            await self.wanted.wait()
        return self.input

    def took(self, count: int) -> None:
        """The guest has received `count` bytes of the input."""
        del self.input[:count]
        self._room.set()

    def set_open(self, is_open: bool) -> None:
        """The guest has opened or closed the port."""
        self.is_open = is_open
        self._changed.set()
        self.wanted.set()

    def forget(self) -> None:
        """The driver has gone and no longer knows the port."""
        self.ready = False
        self.set_open(False)

    def release(self) -> None:
        """The guest is leaving and takes all bytes under way along: nothing more is received or
        accepted here."""
        self._released = True

    def acquire(self) -> None:
        """The guest continues here. Does nothing if it was not leaving."""
        self._released = False
        for waiters in (self._output, self._room):
            waiters.set()

    def finish(self) -> None:
        """The guest has ended: output ends after what is buffered."""
        self._finished = True
        self.is_open = False
        for waiters in (self._output, self._room, self._changed):
            waiters.set()

    def save(self) -> dict[str, Any]:
        """Its state and all bytes under way."""
        return PortState.plain(
            ready=self.ready,
            is_open=self.is_open,
            output=bytes(self.output),
            input=bytes(self.input),
            stalled=self.stalled,
            lost=self.lost,
        )

    def check(self, state: Mapping[str, object]) -> PortState:
        """Check what `save` returned, for `load`. Raises `DeviceError` if it is not a state of
        this port."""
        return PortState.load(
            f"port {self.name}",
            state,
            output=Bytes(most=self.output_size),
            input=Bytes(most=self.input_size),
        )

    def load(self, saved: PortState) -> None:
        """Restore a checked state."""
        self.ready, self.stalled, self.lost = saved.ready, saved.stalled, saved.lost
        self.output, self.input = bytearray(saved.output), bytearray(saved.input)
        self._full_since = None
        if not self.is_connected:
            self.lost += len(self.output)
            self.output.clear()
        self.set_open(saved.is_open)
        for waiters in (self._output, self._room):
            waiters.set()
