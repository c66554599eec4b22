"""The control socket of a running guest: one JSON object a line, both ways.

Who connects is greeted with

    {"avmm": "0.1.0", "control": [1]}

`control` lists the versions of this protocol that are spoken; there is one. Then each line of the
client's is a command, with its arguments beside it, and they are done one after the other:

    {"command": "status"}
    {"command": "pause", "deadline": 2.0}           deadline in seconds, may be left out
    {"command": "resume"}
    {"command": "snapshot", "file": "/absolute/path", "deadline": 2.0}
    {"command": "migrate", "target": "tcp:host:4000", "bandwidth": 100000000, "downtime": 0.1,
     "deadline": 2.0, "tls": {"cert": "/a", "key": "/b", "ca": "/c"}}       all but target optional
    {"command": "settle", "runs": "here"}           or "there"; `avmm.Machine.settle`
    {"command": "stop"}

Each is answered by one line, before which there may be any number of events:

    {"event": "progress", ...}
    {"result": {...}}
    {"error": "what the user reads", "kind": "ConfigError"}

`kind` is the name of one of `avmm.errors`, "Cancelled", or "RequestError" for a line that is no
command. Who ends its side of the connection, or closes it, cancels the pause, snapshot or
migration that it waits for; its answer is still sent, and says what has become of it. A pause
that is answered outlives its client (`avmm.control.holds`).

**Hostile input.** The socket is its user's alone (mode 0600). A line has at most `_MOST_LINE`
bytes; of a client that sends more than that while its command is under way nothing is read any
more, and it counts as one who has gone. A client that does not read loses events, and keeps nobody
but itself waiting.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn

import trio

from avmm.control.holds import CONTROL, Holds
from avmm.devices import sockets
from avmm.errors import AvmmError, ConfigError, HandOverUnknownError
from avmm.machine import Machine
from avmm.progress import MigrationProgress, SnapshotProgress
from avmm.transfer import targets
from avmm.transfer.targets import Target, Tls

logger = logging.getLogger(__name__)

VERSIONS: Final = (1,)
_MOST_LINE: Final = 64 * 1024
_MOST_CLIENTS: Final = 32
_MOST_EVENTS: Final = 256
_LAST_WORDS_SECONDS: Final = 1.0
_NOBODY_KNOWS: Final = "nobody knows where it runs"

Emit = Callable[[dict[str, Any]], None]
Arguments = Mapping[str, Any]


class RequestError(AvmmError):
    """A line that is no command of this protocol."""


class Control:
    """What the control socket can do with one machine."""

    def __init__(self, vm: Machine, holds: Holds) -> None:
        self._vm = vm
        self._holds = holds
        self._target: Target | None = None
        self._progress: dict[str, Any] | None = None
        self._unsettled = ""
        self._copied = ""
        self.moved_to = ""
        """Where the guest has gone to, or perhaps has."""

    # -- commands --------------------------------------------------------------------------

    async def status(self, arguments: Arguments, emit: Emit) -> dict[str, Any]:
        """What the guest is and does."""
        vm = self._vm
        state = "paused" if vm.is_paused else "running"
        if vm.is_unsettled:
            state = "unsettled"
        elif self._target is not None:
            state = "migrating"
        await trio.lowlevel.checkpoint()
        return {
            "state": state,
            "pauses": self._holds.counts,
            "cpus": vm.config.cpus,
            "memory": vm.config.memory,
            "pid": os.getpid(),
            "migration": self._target and {"target": str(self._target), **(self._progress or {})},
            "unsettled": (self._unsettled or _NOBODY_KNOWS) if vm.is_unsettled else None,
        }

    async def pause(self, arguments: Arguments, emit: Emit) -> dict[str, Any]:
        """Hold the guest once more."""
        await self._holds.hold(CONTROL, arguments.get("deadline"))
        return {"pauses": self._holds.counts}

    async def resume(self, arguments: Arguments, emit: Emit) -> dict[str, Any]:
        """Undo one pause of the control socket's."""
        if not self._holds.counts[CONTROL]:
            others = f"; it is paused by {self._holds}" if str(self._holds) else ""
            raise AvmmError(f"no pause of the control socket's holds the guest{others}")
        await self._holds.let_go(CONTROL)
        return {"pauses": self._holds.counts}

    async def snapshot(self, arguments: Arguments, emit: Emit) -> dict[str, Any]:
        """Write a snapshot."""
        path = Path(arguments["file"])
        if not path.is_absolute():
            raise RequestError(f"file {str(path)!r}: expected an absolute path")

        def tell(progress: SnapshotProgress) -> None:
            emit({"event": "progress", **asdict(progress)})

        deadline = arguments.get("deadline")
        begin = trio.current_time()
        with self._copying("a snapshot is being written"):
            await self._vm.snapshot(path, deadline=deadline, on_progress=tell)
        return {"seconds": trio.current_time() - begin}

    async def migrate(self, arguments: Arguments, emit: Emit) -> dict[str, Any]:
        """Hand the guest over."""
        target = Target.parse(arguments["target"])
        tls = targets.tls(target, **_tls_paths(arguments.get("tls", {})))
        context = tls.context(server=False) if isinstance(tls, Tls) else None
        if self._vm.is_unsettled:
            raise AvmmError("the guest was handed over, and waits for settle")
        if str(self._holds):
            raise AvmmError(
                f"the guest is paused by {self._holds}, and would run at its destination: "
                "let it run on first"
            )
        begin = 0.0

        def tell(progress: MigrationProgress) -> None:
            fields = asdict(progress) | {"seconds": trio.current_time() - begin}
            self._progress = {
                name: None if math.isinf(value) else value for name, value in fields.items()
            }
            emit({"event": "progress", **self._progress})

        with self._copying("the guest is being migrated"):
            self._target, self._holds.refusal = target, "it is being migrated"
            self.moved_to = str(target)
            try:
                stream = await targets.connect(target, context)
                begin = trio.current_time()
                try:
                    report = await self._vm.migrate(
                        stream,
                        target_downtime=arguments.get("downtime", 0.1),
                        bandwidth=arguments.get("bandwidth"),
                        deadline=arguments.get("deadline"),
                        on_progress=tell,
                    )
                finally:
                    await targets.close(stream)
            except HandOverUnknownError as error:
                self._unsettled = str(error)
                logger.error("%s", error)
                raise
            finally:
                self._target = self._progress = None
                self._holds.refusal = _NOBODY_KNOWS if self._vm.is_unsettled else ""
        return {"target": str(target), **asdict(report)}

    @contextmanager
    def _copying(self, what: str) -> Iterator[None]:
        """RAM is copied inside the block, for one at a time."""
        if self._copied:
            raise AvmmError(f"not now: {self._copied}")
        self._copied = what
        try:
            yield
        finally:
            self._copied = ""

    async def settle(self, arguments: Arguments, emit: Emit) -> dict[str, Any]:
        """The operator's decision after a hand-over of which nobody knows."""
        if arguments["runs"] not in ("here", "there"):
            raise RequestError(f"runs {arguments['runs']!r}: expected 'here' or 'there'")
        await self._vm.settle(runs_here=arguments["runs"] == "here")
        self._unsettled = self._holds.refusal = ""
        return {"runs": arguments["runs"]}

    async def stop(self, arguments: Arguments, emit: Emit) -> dict[str, Any]:
        """End the guest."""
        self._vm.stop()
        await self._vm.wait()
        return {}


@dataclass(frozen=True)
class _Command:
    run: Callable[[Control, Arguments, Emit], Awaitable[dict[str, Any]]]
    required: Mapping[str, Callable[[str, Any], Any]]
    optional: Mapping[str, Callable[[str, Any], Any]]
    is_long: bool = False
    """Is it cancelled when its client has gone?"""


def _text(name: str, value: Any) -> str:
    if type(value) is str and value and "\0" not in value:
        with suppress(UnicodeEncodeError):
            os.fsencode(value)
            return value
    raise RequestError(f"{name}: expected text")


def _positive(name: str, value: Any) -> float:
    if type(value) in (int, float) and 0 < value < 1 << 63:
        return float(value)
    raise RequestError(f"{name}: expected a number above 0 and below 2**63")


def _tls(name: str, value: Any) -> dict[str, str]:
    if type(value) is not dict or set(value) != {"cert", "key", "ca"}:
        raise RequestError("tls: expected cert, key and ca")
    return {part: _text(f"tls {part}", path) for part, path in value.items()}


def _tls_paths(paths: Mapping[str, str]) -> dict[str, Path | None]:
    return {name: Path(paths[name]) if name in paths else None for name in ("cert", "key", "ca")}


_COMMANDS: Final[dict[str, _Command]] = {
    "status": _Command(Control.status, {}, {}),
    "pause": _Command(Control.pause, {}, {"deadline": _positive}, is_long=True),
    "resume": _Command(Control.resume, {}, {}),
    "snapshot": _Command(Control.snapshot, {"file": _text}, {"deadline": _positive}, is_long=True),
    "migrate": _Command(
        Control.migrate,
        {"target": _text},
        {"bandwidth": _positive, "downtime": _positive, "deadline": _positive, "tls": _tls},
        is_long=True,
    ),
    "settle": _Command(Control.settle, {"runs": _text}, {}),
    "stop": _Command(Control.stop, {}, {}),
}


def _parse(line: bytes) -> tuple[_Command, dict[str, Any]]:
    try:
        request = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise RequestError("this is no JSON in one line") from None
    if type(request) is not dict:
        raise RequestError("expected an object with a command in it")
    name = request.pop("command", None)
    command = _COMMANDS.get(name) if type(name) is str else None
    if command is None:
        raise RequestError(f"no such command; known are {', '.join(_COMMANDS)}")
    known = {**command.required, **command.optional}
    if unknown := set(request) - set(known):
        takes = ", ".join(known) or "no arguments"
        raise RequestError(f"{name}: unknown argument {min(unknown)[:40]!r}; it takes {takes}")
    if missing := set(command.required) - set(request):
        raise RequestError(f"{name}: expected {', '.join(sorted(missing))}")
    return command, {key: known[key](key, value) for key, value in request.items()}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")


# -- its clients --------------------------------------------------------------------------------


class _Lines:
    """The lines of a client, none longer than `_MOST_LINE`."""

    def __init__(self, client: trio.SocketStream) -> None:
        self._client = client
        self._data = bytearray()
        self._ended = False

    async def next(self) -> bytes | None:
        """The next line; None at the end. Raises `RequestError` for one that is too long."""
        while (end := self._data.find(b"\n")) < 0:
            if len(self._data) > _MOST_LINE:
                raise RequestError(f"a line of more than {_MOST_LINE} bytes")
            if not await self._more():
                return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        return line

    async def ended(self) -> None:
        """Return when the client will say nothing more, or too much."""
        while len(self._data) <= _MOST_LINE and await self._more():
            pass

    async def _more(self) -> bool:
        if not self._ended:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                data = await self._client.receive_some(4096)
                self._data += data
                self._ended = not data
                return bool(data)
            self._ended = True
        return False


class _Client:
    def __init__(self, stream: trio.SocketStream, control: Control) -> None:
        self._stream = stream
        self._control = control
        self._lines = _Lines(stream)
        self._idle = trio.CancelScope()
        self._is_last = False

    async def serve(self) -> None:
        greeting = {"avmm": version("avmm"), "control": list(VERSIONS)}
        with suppress(trio.BrokenResourceError):
            async with self._stream:
                await self._say(greeting)
                while await self._serve_one():
                    pass

    def finish(self) -> None:
        """Take no more commands; one that is under way is answered."""
        self._is_last = True
        self._idle.cancel()

    async def _say(self, what: Mapping[str, Any]) -> None:
        await self._stream.send_all(json.dumps(what).encode() + b"\n")

    async def _serve_one(self) -> bool:
        line = None
        try:
            with self._idle:
                line = await self._lines.next()
        except RequestError as error:
            await self._say(_error(error))
            return False
        if line is None:
            return False
        self._idle = trio.CancelScope()
        await self._answer(line)
        return not self._is_last

    async def _answer(self, line: bytes) -> None:
        try:
            command, arguments = _parse(line)
        except RequestError as error:
            await self._say(_error(error))
            return
        events, told = trio.open_memory_channel[dict[str, Any]](_MOST_EVENTS)

        def emit(event: dict[str, Any]) -> None:
            with suppress(trio.WouldBlock, trio.BrokenResourceError):
                events.send_nowait(event)

        answer: dict[str, Any] = {"error": "given up, its client has gone", "kind": "Cancelled"}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell, told)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as watch:
                    if command.is_long:
                        watch.start_soon(self._cancel_at_end, scope)
                    try:
                        answer = {"result": await command.run(self._control, arguments, emit)}
                    except AvmmError as error:
                        answer = _error(error)
                    except Exception as error:  # a bug, of which the guest does not die
                        logger.exception("%s", line[:200])
                        answer = {"error": f"a bug: {error!r}", "kind": "AvmmError"}
                    watch.cancel_scope.cancel()
            events.close()
        await self._say(answer)

    async def _tell(self, told: trio.MemoryReceiveChannel[dict[str, Any]]) -> None:
        with suppress(trio.BrokenResourceError):  # gone; that shows where its lines are read
            async with told:
                async for event in told:
                    await self._say(event)

    async def _cancel_at_end(self, scope: trio.CancelScope) -> None:
        await self._lines.ended()
        scope.cancel()


def _error(error: AvmmError) -> dict[str, Any]:
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    return {"error": text, "kind": type(error).__name__}


@contextmanager
def listening(target: str | None) -> Iterator[trio.socket.SocketType | None]:
    """The socket of `--control` inside the block, if there is to be one. Raises `ConfigError`."""
    if target is None:
        yield None
        return
    kind, _, path = target.partition(":")
    if kind != "unix" or not path:
        raise ConfigError(f"control {target!r}: expected unix:PATH")
    with closing(trio.socket.from_stdlib_socket(sockets.listen(path, "control", 16))) as listener:
        try:
            yield listener
        finally:
            with suppress(FileNotFoundError):
                Path(path).unlink()


@asynccontextmanager
async def served(listener: trio.socket.SocketType | None, control: Control) -> AsyncIterator[None]:
    """Serve clients inside the block. After it, who waits for an answer has a second to get it."""
    clients: set[_Client] = set()

    async def serve(client: _Client) -> None:
        clients.add(client)
        try:
            await client.serve()
        finally:
            clients.remove(client)

    async def accept(nursery: trio.Nursery) -> None:
        assert listener is not None
        while True:
            connection, _ = await listener.accept()
            if len(clients) < _MOST_CLIENTS:
                nursery.start_soon(serve, _Client(trio.SocketStream(connection), control))
            else:
                connection.close()

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as accepting:
            if listener is not None:
                accepting.start_soon(accept, nursery)
            yield
            accepting.cancel_scope.cancel()
        for client in clients:
            client.finish()
        nursery.cancel_scope.deadline = trio.current_time() + _LAST_WORDS_SECONDS
