"""The client of the control socket: steers a guest that runs in another process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Final, TypeVar, cast

import trio

from avmm.control import protocol, verbs
from avmm.control.protocol import Event, Failure, NoControlSocket, Result
from avmm.control.verbs import (
    Moved,
    Pauses,
    Progress,
    RequestError,
    Settled,
    SnapshotTaken,
    Status,
    Stopped,
)
from avmm.ctrl_c import protected
from avmm.devices import sockets
from avmm.errors import AvmmError, ConfigError
from avmm.transfer.targets import Target
from avmm.transfer.tls import Tls

_CHUNK: Final = 64 * 1024

_Answer = TypeVar("_Answer", Status, Pauses, SnapshotTaken, Moved, Settled, Stopped)


def _ignore(progress: Progress) -> None:
    pass


@protected
async def connect(path: str | PathLike[str]) -> Client:
    """Connect to the control socket at `path`, which `avmm run --control unix:PATH` or
    `avmm.control.serve` has made.

        async with await avmm.control.connect("/run/guest.ctl") as client:
            print((await client.status())["state"])

    Raises `ConfigError` if nobody listens at `path`, and `NoControlSocket` if something other than
    a control socket answers. If it is cancelled, nothing stays open.
    """
    path = fspath(path)
    try:
        stream = await sockets.connect(path)
    except OSError as error:
        raise ConfigError(f"control socket {path}: {error.strerror or error}") from None
    client = Client(stream, path)
    try:
        await client.greet()
    except BaseException:
        await trio.aclose_forcefully(client)
        raise
    return client


class Client(trio.abc.AsyncResource):
    """A connection to a control socket, made by `connect`. Close it when you are done with it.

    The other side does one thing at a time. While a task waits for an answer, a call from another
    task raises `trio.BusyResourceError`. Each method raises the same `AvmmError` that was raised
    on the other side, `GivenUp` after `give_up`, and `AvmmError` if the other side goes away.

    Cancelling a method closes the connection. The other side then gives up a pause, a snapshot or
    a migration, but you do not learn whether it was done before. Use `give_up` to learn that.
    """

    def __init__(self, stream: trio.SocketStream, path: str) -> None:
        self._stream = stream
        self._path = path
        self._lines = protocol.Lines(protocol.MOST_ANSWER)
        self._is_asking = False

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def give_up(self) -> None:
        """Give up the pause, snapshot or migration that another task is waiting for.

        That task gets the answer: `GivenUp` is raised there, or the result is returned if it was
        done before. This client can ask for nothing more after that.
        """
        with self._named():
            await self._stream.send_eof()

    # -- what can be asked ------------------------------------------------------------------

    async def status(self) -> Status:
        """The guest's state."""
        return await self._ask(verbs.GetStatus, Status)

    async def pause(self, deadline: float | None = None) -> Pauses:
        """Let the guest stand still until `resume`. Raises `avmm.PauseTimeout` if the guest does
        not stand still within `deadline` seconds. Pauses are counted, and outlive this client.
        """
        return await self._ask(verbs.Pause, Pauses, deadline=deadline)

    async def resume(self) -> Pauses:
        """Undo one `pause`. The guest runs on when all pauses are undone."""
        return await self._ask(verbs.Resume, Pauses)

    async def snapshot(
        self,
        file: str | PathLike[str],
        *,
        deadline: float | None = None,
        on_progress: Callable[[Progress], object] = _ignore,
    ) -> SnapshotTaken:
        """Have the guest's process write the guest to `file`; see `avmm.Machine.snapshot`."""
        path = str(Path(file).absolute())
        return await self._ask(
            verbs.TakeSnapshot, SnapshotTaken, on_progress, file=path, deadline=deadline
        )

    async def migrate(
        self,
        target: str,
        *,
        tls: Tls | None = None,
        bandwidth: float | None = None,
        downtime: float | None = None,
        deadline: float | None = None,
        on_progress: Callable[[Progress], object] = _ignore,
    ) -> Moved:
        """Hand the guest over to an `avmm receive` or `avmm.receive` at `target`, which is
        "unix:PATH" or "tcp:HOST:PORT"; see `avmm.connect` and `avmm.Machine.migrate`.

        The guest's process connects, and reads the files of `tls`.
        """
        to = Target.parse(target, fd=False)
        if to.kind == "unix":
            to = Target("unix", path=str(Path(to.path).absolute()))
        files = None
        if tls is not None:
            files = {
                name: str(Path(getattr(tls, name)).absolute()) for name in ("cert", "key", "ca")
            }
            if tls.peer is not None:
                files["peer"] = tls.peer
        return await self._ask(
            verbs.Migrate,
            Moved,
            on_progress,
            target=str(to),
            tls=files,
            bandwidth=bandwidth,
            downtime=downtime,
            deadline=deadline,
        )

    async def settle(self, *, runs_here: bool) -> Settled:
        """Say where the guest runs after an `avmm.HandOverUnknownError`; see
        `avmm.Machine.settle`."""
        return await self._ask(verbs.Settle, Settled, runs="here" if runs_here else "there")

    async def powerdown(self, deadline: float | None = None) -> Stopped:
        """Press the guest's power button; see `avmm.Machine.powerdown`. Returns when the guest has
        ended. Raises `AvmmError` if it does not within `deadline` seconds; it runs on then."""
        return await self._ask(verbs.Powerdown, Stopped, deadline=deadline)

    async def stop(self) -> Stopped:
        """End the guest, as if its power had failed. Returns when it has ended."""
        return await self._ask(verbs.Stop, Stopped)

    # -- how --------------------------------------------------------------------------------

    async def greet(self) -> None:
        """Receive the greeting of the other side; `connect` does that."""
        with self._named():
            protocol.parse_greeting(await self._next())

    @protected
    async def _ask(
        self,
        verb: type[verbs.Verb],
        kind: type[_Answer],
        on_progress: Callable[[Progress], object] = _ignore,
        **arguments: object,
    ) -> _Answer:
        if self._is_asking:
            raise trio.BusyResourceError("another task is already using this client")
        self._is_asking = True
        try:
            with self._named():
                await self._stream.send_all(protocol.request(verb.name, arguments))
            while isinstance(heard := await self._hear(kind), Event):
                on_progress(heard.progress)
        except BaseException:  # a late answer would be taken for the answer to the next command
            await trio.aclose_forcefully(self._stream)
            raise
        finally:
            self._is_asking = False
        if isinstance(heard, Failure):
            raise heard.error
        return cast(_Answer, heard.answer)

    async def _hear(self, kind: type[_Answer]) -> Event | Result | Failure:
        with self._named():
            heard = protocol.parse_answer(await self._next())
            if isinstance(heard, Result) and set(kind.__annotations__) - set(heard.answer):
                raise NoControlSocket(f"expected {kind.__name__}, not {heard.answer}")
        return heard

    async def _next(self) -> bytes:
        """The next line from the other side."""
        try:
            while (line := self._lines.next()) is None:
                data = await self._stream.receive_some(_CHUNK)
                if not data:
                    raise AvmmError("the connection was closed before the answer came")
                self._lines.feed(data)
        except RequestError as error:
            raise NoControlSocket(str(error)) from None
        return line

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Put the socket's path in front of errors that are raised inside the block."""
        try:
            yield
        except trio.BrokenResourceError:
            raise AvmmError(
                f"{self._path}: the connection was closed before the answer came"
            ) from None
        except AvmmError as error:
            raise type(error)(f"{self._path}: {error}") from None
