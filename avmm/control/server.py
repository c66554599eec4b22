"""The server of the control socket: takes commands from clients, and carries them out on one
machine.

A client that ends its side of the connection, or closes it, gives up the pause, snapshot or
migration that it is waiting for. The server still answers, and says what has become of it. A pause
that was answered outlives its client (`avmm.control.holds`).

**Hostile input.** Only the socket's owner may connect (mode 0600). A line may have up to
`protocol.MOST_REQUEST` bytes. If a client sends more than that while its command is under way, the
server stops reading and treats the client as gone. A client that does not read its events loses
them, and makes nobody but itself wait.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib import import_module
from os import PathLike, fspath
from typing import Final

import trio

from avmm.control import holds, protocol
from avmm.control.protocol import GivenUp
from avmm.control.verbs import Control, Progress, RequestError
from avmm.ctrl_c import protected
from avmm.devices import sockets
from avmm.errors import AvmmError
from avmm.machine import Machine
from avmm.threads import in_thread

logger = logging.getLogger(__name__)

_LATER: Final = (
    "avmm.snapshot",
    "avmm.transfer.source",
    "avmm.transfer.states",
    "avmm.transfer.connection",
    "avmm.transfer.tls",
    "msgpack",
    "encodings.idna",  # for the name of a host
)
_MOST_CLIENTS: Final = 32
_MOST_EVENTS: Final = 256
_LAST_WORDS_SECONDS: Final = 1.0


@protected
async def serve(
    vm: Machine,
    path: str | PathLike[str],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Let `avmm ctl PATH`, or an `avmm.control.Client`, steer this machine.

        async with avmm.Machine(...) as vm, trio.open_nursery() as nursery:
            await nursery.start(avmm.control.serve, vm, "/run/guest.ctl")

    Only this user may connect to the socket at `path`. `nursery.start` returns when clients can
    connect. The function itself returns when the guest has ended and every client has its last
    answer, or a second later. Cancelling it ends the service at once. In both cases the socket is
    removed, and pauses that clients asked for are undone. Raises `ConfigError` if no socket can be
    made at `path`.
    """
    await in_thread(preload)
    with listening(path) as listener:
        async with holds.opened(vm) as held, served(listener, Control(vm, held)):
            task_status.started()
            await vm.wait()


def preload() -> None:
    """Import what a snapshot or a migration would import when it is asked for. The guest may then
    have run for months, and the files may be those of another avmm. Blocks."""
    protocol.greeting()
    for name in _LATER:
        import_module(name)


@contextmanager
def listening(path: str | PathLike[str]) -> Iterator[trio.socket.SocketType]:
    """A control socket that listens at `path` inside the block. Raises `ConfigError`."""
    path = fspath(path)
    listener = trio.socket.from_stdlib_socket(sockets.listen(path, "control", 16))
    try:
        yield listener
    finally:
        sockets.close(listener, path)


@asynccontextmanager
async def served(listener: trio.socket.SocketType, control: Control) -> AsyncIterator[None]:
    """Serve clients inside the block. A client that still waits for an answer when the block ends
    has a second to get it."""
    clients: set[_Conversation] = set()

    @protected
    async def converse(client: _Conversation) -> None:
        clients.add(client)
        try:
            await client.run()
        finally:
            clients.remove(client)

    @protected
    async def accept(nursery: trio.Nursery) -> None:
        while True:
            connection = await sockets.accept(listener, "control socket")
            if len(clients) < _MOST_CLIENTS:
                stream = trio.SocketStream(connection)
                nursery.start_soon(converse, _Conversation(stream, control))
            else:
                connection.close()

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(accept, nursery)
            yield
            accepting.cancel_scope.cancel()
        for client in clients:
            client.finish()
        nursery.cancel_scope.deadline = trio.current_time() + _LAST_WORDS_SECONDS


class _Conversation:
    """The server's side of one connection."""

    def __init__(self, stream: trio.SocketStream, control: Control) -> None:
        self._stream = stream
        self._control = control
        self._lines = protocol.Lines(protocol.MOST_REQUEST)
        self._idle = trio.CancelScope()
        self._has_ended = self._is_last = False

    async def run(self) -> None:
        with suppress(trio.BrokenResourceError):
            async with self._stream:
                await self._stream.send_all(protocol.greeting())
                while await self._serve_one():
                    pass

    def finish(self) -> None:
        """Take no more commands. One that is under way is still answered."""
        self._is_last = True
        self._idle.cancel()

    async def _serve_one(self) -> bool:
        line = None
        try:
            with self._idle:
                line = await self._next()
        except RequestError as error:
            await self._stream.send_all(protocol.failure(error))
            return False
        if line is None:
            return False
        self._idle = trio.CancelScope()
        await self._stream.send_all(await self._answer(line))
        return not self._is_last

    async def _next(self) -> bytes | None:
        """The client's next line; None at the end. Raises `RequestError`."""
        while (line := self._lines.next()) is None:
            if not await self._hear():
                return None
        return line

    async def _answer(self, line: bytes) -> bytes:
        """Do the command in this line, and send events meanwhile. Returns the last line."""
        try:
            verb = protocol.parse_request(line)
        except AvmmError as error:
            return protocol.failure(error)
        events, told = trio.open_memory_channel[Progress](_MOST_EVENTS)

        def emit(progress: Progress) -> None:
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                events.send_nowait(progress)

        answer = protocol.failure(GivenUp("cancelled, because its client has gone"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, told)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as watch:
                    if verb.is_long:
                        watch.start_soon(self._cancel_at_end, scope)
                    try:
                        answer = protocol.result(await verb.run(self._control, emit))
                    except AvmmError as error:
                        answer = protocol.failure(error)
                    except Exception as error:  # a bug, which must not end the guest
                        logger.exception("%s", line[:200])
                        answer = protocol.failure(AvmmError(f"a bug: {error!r}"))
                    watch.cancel_scope.cancel()
            events.close()
        return answer

    @protected
    async def _tell(self, told: trio.MemoryReceiveChannel[Progress]) -> None:
        with suppress(trio.BrokenResourceError):  # the client has gone, which `_hear` notices
            async with told:
                async for progress in told:
                    await self._stream.send_all(protocol.event(progress))

    @protected
    async def _cancel_at_end(self, scope: trio.CancelScope) -> None:
        """Cancel when the client has ended its side, or has sent too much."""
        while not self._lines.is_full and await self._hear():
            pass
        scope.cancel()

    async def _hear(self) -> bool:
        """Take the next bytes from the client. Returns False if the client has ended its side."""
        if not self._has_ended:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                data = await self._stream.receive_some(4096)
                self._lines.feed(data)
                self._has_ended = not data
                return bool(data)
            self._has_ended = True
        return False
