"""Where the command connects the guest's console: stdio, pty, unix:PATH or file:PATH.

The console is the serial port or, with "virtio:" in front, the first port of a virtio console.

The host's end is opened before the guest exists. A guest that has come from another process must
not be lost because a file cannot be created.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import trio

from avmm.cli import clients, terminal
from avmm.control.holds import CONTROL, TERMINAL, Holds, PauseRefused
from avmm.devices import sockets
from avmm.devices.console import ConsoleStream
from avmm.devices.hostfd import HostFd
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.port import Port
from avmm.ends import listen
from avmm.errors import AvmmError, ConfigError
from avmm.feeder import Feeder
from avmm.machine import Machine
from avmm.outcome import Cause

logger = logging.getLogger(__name__)

_BATCH_SECONDS: Final = 0.004
_MOST_LOG_LINES: Final = 1000
_LAST_KEYS_SECONDS: Final = 0.2
END_OF_INPUT: Final = b"\x04"
"""Ctrl-D. A terminal sends it for the end of input, and avmm sends it when a pipe ends."""


@dataclass(frozen=True)
class ConsoleTarget:
    """A parsed `--console`."""

    kind: str
    path: str = ""
    virtio: bool = False
    """Is it the virtio console, not the serial port?"""


def parse(text: str) -> ConsoleTarget:
    """Parse `--console`. Raises `ConfigError` if `text` is not a console target."""
    device, colon, rest = text.partition(":")
    virtio = device == "virtio"
    target = (rest if colon else "stdio") if virtio else text
    kind, colon, path = target.partition(":")
    if target in ("stdio", "pty"):
        return ConsoleTarget(kind, virtio=virtio)
    if kind in ("unix", "file") and colon and path:
        return ConsoleTarget(kind, path, virtio)
    raise ConfigError(
        f"console {text!r}: expected stdio, pty, unix:PATH or file:PATH, or virtio, virtio:pty, "
        "virtio:unix:PATH or virtio:file:PATH"
    )


class Input:
    """Sends input to the guest, and keeps what did not reach it, so that it can be reported."""

    def __init__(self, stream: ConsoleStream) -> None:
        self._stream = stream
        self.undelivered = b""
        """Input that the guest did not get, because it had ended or moved."""

    async def send(self, data: bytes) -> bool:
        """Send `data`. Returns whether the guest is still there and will get it."""
        sent = False
        try:
            with suppress(trio.BrokenResourceError):
                await self._stream.send_all(data)
                sent = True
        finally:
            if not sent:
                self.undelivered += data[self._stream.accepted :]
        return sent

    async def forward(self, keys: trio.MemoryReceiveChannel[bytes]) -> None:
        """Send what comes through `keys`, until cancelled."""
        try:
            async for data in keys:
                await self.send(data)
        finally:
            with suppress(trio.WouldBlock):
                while True:
                    self.undelivered += keys.receive_nowait()


Connect: TypeAlias = Callable[[Machine, ConsoleStream, Input, Holds], Awaitable[None]]


@contextmanager
def opened(target: ConsoleTarget) -> Iterator[ConsoleEnd]:
    """The host's end of a console, open inside the block. Raises `ConfigError` if it cannot be
    opened.
    """
    with _KINDS[target.kind](target) as connected:
        yield ConsoleEnd(target, connected)


class ConsoleEnd:
    """The host's end of a console, open."""

    def __init__(self, target: ConsoleTarget, connected: Connect) -> None:
        self._target = target
        self._connected = connected
        self.undelivered = b""
        """Input that came after the guest had gone to another process."""

    async def connect(self, vm: Machine, virtio: Console | None, holds: Holds) -> None:
        """Connect the guest's console, until the guest has ended and its output is delivered.

        With a `virtio` console, that one is connected, and what the guest writes to the serial
        port is dropped.
        """
        if virtio is None:
            await self._converse(vm, vm.console, holds)
            return
        await vm.console.aclose()
        async with trio.open_nursery() as nursery:
            if self._target.kind == "stdio" and os.isatty(0):
                nursery.start_soon(_follow_size, virtio)
            await self._converse(vm, next(iter(virtio.ports.values())), holds)
            nursery.cancel_scope.cancel()

    async def _converse(self, vm: Machine, stream: ConsoleStream, holds: Holds) -> None:
        typed = Input(stream)
        await self._connected(vm, stream, typed, holds)
        self.undelivered = typed.undelivered


async def _follow_size(virtio: Console) -> None:
    """Keep the guest's terminal as large as this one."""
    with trio.open_signal_receiver(signal.SIGWINCH) as signals:
        virtio.resize(*os.get_terminal_size(0))
        async for _ in signals:
            virtio.resize(*os.get_terminal_size(0))


@contextmanager
def _stdio(target: ConsoleTarget) -> Iterator[Connect]:
    with (
        closing(HostFd(0, os.O_RDONLY)) as source,
        closing(HostFd(1, os.O_WRONLY)) as sink,
    ):
        yield partial(_connect_stdio, source, sink)


async def _connect_stdio(
    source: HostFd, sink: HostFd, vm: Machine, stream: ConsoleStream, typed: Input, holds: Holds
) -> None:
    interactive = os.isatty(0)
    with ExitStack() as stack:
        own = stack.enter_context(terminal.raw(0)) if interactive else None
        async with trio.open_nursery() as nursery:
            if own is not None:
                nursery.start_soon(_type, source, sink, vm, typed, holds, own)
                nursery.start_soon(_tell_pauses, holds, sink)
                log = stack.enter_context(_logged(stream, sink))
                nursery.start_soon(log.tell)
                nursery.start_soon(own.follow)
            else:
                nursery.start_soon(_pipe, source, typed)
            try:
                await _write_out(stream, 1, sink)
            except OSError as error:
                if interactive:
                    vm.stop(status=128 + signal.SIGHUP)  # the terminal has gone
                elif isinstance(error, BrokenPipeError | ConnectionResetError):
                    vm.stop(status=128 + signal.SIGPIPE)  # so that `avmm run | head` ends
                else:
                    raise AvmmError(f"standard output: {error.strerror}") from None
            nursery.cancel_scope.cancel()
        last = stream.written_last if isinstance(stream, Port) else sink.last
        if interactive and last not in b"\r\n":
            with suppress(OSError):  # the terminal may have gone
                await sink.write(b"\r\n")  # so that the shell's prompt begins a line
        if interactive and (await vm.wait()).cause is Cause.MOVED:
            # Discard what was typed for the guest, so that the shell does not run it as its next
            # command.
            with trio.move_on_after(_LAST_KEYS_SECONDS):
                while keys := await source.read():
                    typed.undelivered += keys


class _Log:
    """What avmm logs while the guest's console is this terminal. A line waits until the guest's
    output from before it is written."""

    def __init__(self, stream: ConsoleStream, sink: HostFd) -> None:
        self._stream = stream
        self._sink = sink
        self._lines: deque[str] = deque(maxlen=_MOST_LOG_LINES)
        self._has_some = trio.Event()
        self._is_over = False

    def take(self, line: str) -> None:
        self._lines.append(line)
        self._has_some.set()
        if self._is_over:  # a thread logged it just before the end
            self._print()

    async def tell(self) -> None:
        while True:
            await self._has_some.wait()
            self._has_some = trio.Event()
            while self._lines:
                await self._output_received()  # it is written, or its writer has the sink's lock
                line = self._lines[0]
                with suppress(OSError):  # the terminal has gone, which others notice as well
                    await self._sink.write(f"\r\n{line}\r\n".encode())
                if self._lines[0] is line:  # else it had to make room
                    self._lines.popleft()

    async def _output_received(self) -> None:
        while self._stream.has_output:  # noqa: ASYNC110 - only its one reader can be woken for it
            await trio.sleep(_BATCH_SECONDS)

    def end(self) -> None:
        """Print what is left, and what still comes, at once."""
        self._is_over = True
        self._print()

    def _print(self) -> None:
        while self._lines:
            print(self._lines.popleft(), end="\r\n", file=sys.stderr, flush=True)


@contextmanager
def _logged(stream: ConsoleStream, sink: HostFd) -> Iterator[_Log]:
    log = _Log(stream, sink)
    with terminal.log_lines_to(log.take):
        yield log
    log.end()


async def _write_out(stream: ConsoleStream, fd: int, sink: HostFd) -> None:
    """Write everything that the guest prints to `fd` until it has ended. `sink` is the same
    descriptor.
    """
    if isinstance(stream, Port):
        await stream.write_to(fd)
    else:
        await _output(stream, sink.write)


async def _output(stream: ConsoleStream, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Write everything that the guest prints, until it has ended."""
    async for data in stream:
        await write(bytes(data))
        # The first byte goes out at once; the rest is taken in batches, because waking up for each
        # byte would cost the guest more than printing it.
        await trio.sleep(_BATCH_SECONDS)


async def _pipe(source: HostFd, typed: Input) -> None:
    """Input that does not come from a terminal: send it unchanged, then send the end of input."""
    last = b"\n"
    while data := await source.read():
        if not await typed.send(data):
            return
        last = data[-1:]
    # Ctrl-D ends the input only on an empty line, so an unfinished line is ended first.
    if not await typed.send(END_OF_INPUT if last in b"\r\n" else b"\r" + END_OF_INPUT):
        typed.undelivered = b""


async def _type(
    source: HostFd, sink: HostFd, vm: Machine, typed: Input, holds: Holds, own: terminal.Raw
) -> None:
    """Input from a person, who may also talk to avmm itself.

    What is typed goes through a channel, so that the escape key works even if the guest reads
    nothing.
    """
    escape = terminal.Escape()
    send, receive = trio.open_memory_channel[bytes](256)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(typed.forward, receive)
        while keys := await source.read():
            for part in escape.feed(keys):
                if isinstance(part, bytes):
                    try:
                        send.send_nowait(part)
                    except trio.WouldBlock:  # the guest has left 256 keystrokes unread
                        await sink.write(b"\a")
                elif part is terminal.Command.HELP:
                    await sink.write(terminal.HELP.encode())
                elif part is terminal.Command.QUIT:
                    vm.stop()
                elif part is terminal.Command.SUSPEND:
                    own.suspend()
                else:
                    await sink.write(f"\r\navmm: {await _toggle(holds)}\r\n".encode())
        vm.stop(status=128 + signal.SIGHUP)


async def _tell_pauses(holds: Holds, sink: HostFd) -> None:
    """Tell the person at the terminal what others do with the guest."""
    told = False
    while True:
        while told is (holds.counts[CONTROL] > 0):
            await holds.changed()
        told = not told
        text = "paused by `avmm ctl`" if told else (str(holds) and "still paused") or "running"
        with suppress(OSError):  # the terminal has gone, which others notice as well
            await sink.write(f"\r\navmm: {text}\r\n".encode())


async def _toggle(holds: Holds) -> str:
    """Pause the guest, or let it run on. Returns which of the two was done, in words."""
    if holds.counts[TERMINAL]:
        await holds.let_go(TERMINAL)
        return f"still paused by {holds}" if str(holds) else "running"
    try:
        await holds.hold(TERMINAL)
    except PauseRefused as error:
        return str(error)
    return "paused; press Ctrl-A p to let the guest run on"


@contextmanager
def _pty(target: ConsoleTarget) -> Iterator[Connect]:
    # Our own descriptor of the far end stays open: without it, the near end would give an
    # error whenever nobody is connected.
    near, far = os.openpty()
    try:
        with closing(os.fdopen(near, "r+b", buffering=0)) as file, terminal.raw(far):
            os.set_blocking(near, False)
            print(f"avmm: the console is {os.ttyname(far)}", file=sys.stderr, flush=True)
            yield partial(_connect_pty, file.fileno(), far)
    finally:
        os.close(far)


async def _connect_pty(
    near: int, far: int, vm: Machine, stream: ConsoleStream, typed: Input, holds: Holds
) -> None:
    async with _fed(stream, typed) as feeder:
        await clients.serve_pty(near, far, vm, stream, feeder)


@asynccontextmanager
async def _fed(stream: ConsoleStream, typed: Input) -> AsyncIterator[Feeder]:
    """Deliver what is put into the feeder, inside the block. What is left is `typed`'s."""
    feeder = Feeder(stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feeder.run)
        yield feeder
        nursery.cancel_scope.cancel()
    typed.undelivered = bytes(feeder.waiting)


@contextmanager
def _file(target: ConsoleTarget) -> Iterator[Connect]:
    try:
        fd = os.open(target.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(f"console file {target.path}: {error.strerror}") from None
    try:
        with closing(HostFd(fd, os.O_WRONLY)) as sink:
            yield partial(_connect_file, target.path, fd, sink)
    finally:
        os.close(fd)


async def _connect_file(
    path: str,
    fd: int,
    sink: HostFd,
    vm: Machine,
    stream: ConsoleStream,
    typed: Input,
    holds: Holds,
) -> None:
    try:
        await _write_out(stream, fd, sink)
    except OSError as error:
        logger.warning(
            "console file %s: %s; the guest runs on, and what it prints from now on is lost",
            path,
            error.strerror,
        )
        async for _ in stream:
            pass


@contextmanager
def _unix(target: ConsoleTarget) -> Iterator[Connect]:
    listener = listen(target.path)
    try:
        yield partial(_connect_unix, listener)
    finally:
        sockets.close(listener, target.path)


async def _connect_unix(
    listener: trio.socket.SocketType,
    vm: Machine,
    stream: ConsoleStream,
    typed: Input,
    holds: Holds,
) -> None:
    async with _fed(stream, typed) as feeder:
        await clients.serve_unix(listener, vm, stream, feeder)


_KINDS: Final[dict[str, Callable[[ConsoleTarget], AbstractContextManager[Connect]]]] = {
    "stdio": _stdio,
    "pty": _pty,
    "unix": _unix,
    "file": _file,
}
