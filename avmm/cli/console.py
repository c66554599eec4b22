"""Where the command connects the guest's console: stdio, pty, unix:PATH or file:PATH.

That is the serial port, or, with "virtio:" before it, the first port of a virtio console.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from avmm.cli import terminal
from avmm.devices.console import ConsoleStream
from avmm.devices.hostfd import HostFd
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.port import Port
from avmm.ends import listen
from avmm.errors import AvmmError, ConfigError
from avmm.machine import Machine

_BATCH_SECONDS: Final = 0.004
END_OF_INPUT: Final = b"\x04"
"""Ctrl-D: what a terminal sends for the end of input, and so do we when a pipe ends."""


@dataclass(frozen=True)
class Target:
    """A parsed `--console`."""

    kind: str
    path: str = ""
    virtio: bool = False
    """Whether it is the virtio console rather than the serial one."""


def parse(text: str) -> Target:
    """Raises `ConfigError` for what is no console target."""
    device, colon, rest = text.partition(":")
    virtio = device == "virtio"
    target = (rest if colon else "stdio") if virtio else text
    kind, colon, path = target.partition(":")
    if target in ("stdio", "pty"):
        return Target(kind, virtio=virtio)
    if kind in ("unix", "file") and colon and path:
        return Target(kind, path, virtio)
    raise ConfigError(
        f"console {text!r}: expected stdio, pty, unix:PATH or file:PATH, or virtio, virtio:pty, "
        "virtio:unix:PATH or virtio:file:PATH"
    )


async def connect(target: Target, vm: Machine, virtio: Console | None) -> None:
    """Connect the guest's console, until the guest has ended and its output is delivered.

    With a `virtio` console, that one; what is written to the serial port then is dropped.
    """
    connected = _KINDS[target.kind]
    if virtio is None:
        await connected(target, vm, vm.console)
        return
    await vm.console.aclose()
    async with trio.open_nursery() as nursery:
        if target.kind == "stdio" and os.isatty(0):
            nursery.start_soon(_follow_size, virtio)
        await connected(target, vm, next(iter(virtio.ports.values())))
        nursery.cancel_scope.cancel()


async def _follow_size(virtio: Console) -> None:
    """The guest's terminal is as large as ours."""
    with trio.open_signal_receiver(signal.SIGWINCH) as signals:
        virtio.resize(*os.get_terminal_size(0))
        async for _ in signals:
            virtio.resize(*os.get_terminal_size(0))


async def _stdio(target: Target, vm: Machine, stream: ConsoleStream) -> None:
    stdin, stdout = 0, 1
    interactive = os.isatty(stdin)
    with ExitStack() as stack:
        source = stack.enter_context(closing(HostFd(stdin, os.O_RDONLY)))
        sink = stack.enter_context(closing(HostFd(stdout, os.O_WRONLY)))
        if interactive:
            stack.enter_context(terminal.raw(stdin))
        async with trio.open_nursery() as nursery:
            if interactive:
                nursery.start_soon(_type, source, sink, vm, stream)
            else:
                nursery.start_soon(_pipe, source, stream)
            try:
                await _write_out(stream, stdout, sink)
            except OSError as error:
                if interactive:
                    vm.stop(status=128 + signal.SIGHUP)  # the terminal has gone
                elif isinstance(error, BrokenPipeError | ConnectionResetError):
                    vm.stop(status=128 + signal.SIGPIPE)  # as `avmm run | head` has to end
                else:
                    raise AvmmError(f"standard output: {error.strerror}") from None
            nursery.cancel_scope.cancel()


async def _write_out(stream: ConsoleStream, fd: int, sink: HostFd) -> None:
    """Everything that the guest prints to `fd`, which is also `sink`, until it has ended."""
    if isinstance(stream, Port):
        await stream.write_to(fd)
    else:
        await _output(stream, sink.write)


async def _output(stream: ConsoleStream, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Everything that the guest prints, until it has ended."""
    async for data in stream:
        await write(bytes(data))
        # The first byte goes out at once; what follows is taken in batches, because a wake-up
        # for each byte would cost the guest more than printing it.
        await trio.sleep(_BATCH_SECONDS)


async def _pipe(source: HostFd, stream: ConsoleStream) -> None:
    """Input that is no terminal: as it is, then the end of input."""
    last = b"\n"
    with suppress(trio.BrokenResourceError):
        while data := await source.read():
            await stream.send_all(data)
            last = data[-1:]
        # Ctrl-D ends the input only on an empty line: first end the one that is begun.
        await stream.send_all(END_OF_INPUT if last in b"\r\n" else b"\r" + END_OF_INPUT)


async def _type(source: HostFd, sink: HostFd, vm: Machine, stream: ConsoleStream) -> None:
    """Input from a person, who may also talk to avmm itself.

    What is typed goes through a channel, so that a guest which reads nothing does not keep the
    escape from working.
    """
    escape = terminal.Escape()
    send, receive = trio.open_memory_channel[bytes](256)
    async with trio.open_nursery() as nursery, AsyncExitStack() as pause:
        nursery.start_soon(_forward, receive, stream)
        is_paused = False
        while typed := await source.read():
            for part in escape.feed(typed):
                if isinstance(part, bytes):
                    try:
                        send.send_nowait(part)
                    except trio.WouldBlock:  # the guest has left 256 keystrokes unread
                        await sink.write(b"\a")
                elif part is terminal.Command.HELP:
                    await sink.write(terminal.HELP.encode())
                elif part is terminal.Command.QUIT:
                    vm.stop()
                elif is_paused:
                    await pause.aclose()
                    is_paused = False
                    await sink.write(b"\r\navmm: running\r\n")
                else:
                    await pause.enter_async_context(vm.paused())
                    is_paused = True
                    await sink.write(b"\r\navmm: paused, Ctrl-A p lets the guest run on\r\n")
        vm.stop(status=128 + signal.SIGHUP)


async def _forward(typed: trio.MemoryReceiveChannel[bytes], stream: ConsoleStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in typed:
            await stream.send_all(data)


async def _pty(target: Target, vm: Machine, stream: ConsoleStream) -> None:
    # Our own descriptor of the far end stays open: without it, the near end would give an
    # error whenever nobody is connected.
    near, far = os.openpty()
    try:
        async with trio.lowlevel.FdStream(near) as host:
            with terminal.raw(far):
                print(f"avmm: the console is {os.ttyname(far)}", file=sys.stderr, flush=True)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_from_pty, host, stream)
                    await _output(stream, host.send_all)
                    nursery.cancel_scope.cancel()
    finally:
        os.close(far)


async def _from_pty(host: trio.lowlevel.FdStream, stream: ConsoleStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in host:
            await stream.send_all(data)


async def _file(target: Target, vm: Machine, stream: ConsoleStream) -> None:
    try:
        fd = os.open(target.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(f"console file {target.path}: {error.strerror}") from None
    try:
        with closing(HostFd(fd, os.O_WRONLY)) as sink:
            await _write_out(stream, fd, sink)
    except OSError as error:
        raise AvmmError(f"console file {target.path}: {error.strerror}") from None
    finally:
        os.close(fd)


async def _unix(target: Target, vm: Machine, stream: ConsoleStream) -> None:
    """One client at a time; what the guest prints meanwhile waits in the port's buffer."""
    listener = listen(target.path)
    try:
        while (connection := await _next_client(listener, vm)) is not None:
            await _serve_client(trio.SocketStream(connection), stream)
    finally:
        listener.close()
        with suppress(FileNotFoundError):
            Path(target.path).unlink()


async def _next_client(
    listener: trio.socket.SocketType, vm: Machine
) -> trio.socket.SocketType | None:
    """Whoever connects next; None once the guest has ended."""
    connection = None
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await vm.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        connection, _ = await listener.accept()
        nursery.cancel_scope.cancel()
    return connection


async def _serve_client(client: trio.SocketStream, stream: ConsoleStream) -> None:
    """Until the client leaves, or the guest has ended and its last output is sent."""
    async with client, trio.open_nursery() as nursery:

        async def listen() -> None:
            with suppress(trio.BrokenResourceError):
                async for data in client:
                    await stream.send_all(data)
            nursery.cancel_scope.cancel()

        nursery.start_soon(listen)
        with suppress(trio.BrokenResourceError):
            await _output(stream, client.send_all)
        nursery.cancel_scope.cancel()


_KINDS: Final[dict[str, Callable[[Target, Machine, ConsoleStream], Awaitable[None]]]] = {
    "stdio": _stdio,
    "pty": _pty,
    "unix": _unix,
    "file": _file,
}
