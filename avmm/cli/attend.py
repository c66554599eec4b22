"""A guest and those who attend to it: what `avmm run`, `receive` and `restore` share.

The host's ends (console, control socket) are opened first; then there may be a guest, whose
console is connected until it has ended, while signals end it and the control socket is served.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import replace
from typing import Any, Final, NoReturn

import click
import trio

from avmm.cli import console
from avmm.control import holds, server
from avmm.control.verbs import Control
from avmm.devices.virtio.console import Console
from avmm.errors import ConfigError
from avmm.machine import Machine
from avmm.outcome import Cause, Outcome
from avmm.parts.placing import Unplaced, virtio

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LAST_OUTPUT_SECONDS: Final = 1.0
_MOST_SHOWN: Final = 400


def control_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--control."""
    option = click.option(
        "--control",
        "control_target",
        metavar="unix:PATH",
        help="A socket, for its user alone, by which `avmm ctl PATH` steers the guest.",
    )
    return option(command)


class Ends:
    """The host's ends of one guest. Made by `opened`."""

    def __init__(
        self,
        target: console.ConsoleTarget,
        end: console.ConsoleEnd,
        listener: trio.socket.SocketType | None,
    ) -> None:
        self._target = target
        self._end = end
        self._listener = listener
        self._virtio: Console | None = None

    def devices(self, has_hvc: bool) -> list[Unplaced]:
        """The devices that the guest's console takes: its virtio console, where it has one.

        Raises `ConfigError` where it has none that is asked for.
        """
        if has_hvc:
            self._virtio = Console()
            return [virtio(self._virtio)]
        if self._target.virtio:
            raise ConfigError("console: the guest has no virtio console, but a serial one")
        return []

    async def attend(self, vm: Machine) -> Outcome:
        """Until the guest has ended, and its output is delivered.

        One that has moved has where to as its outcome's detail.
        """
        async with holds.opened(vm) as held:
            control = Control(vm, held)
            async with trio.open_nursery() as nursery:
                await nursery.start(_stop_on_signal, vm, nursery.cancel_scope)
                async with AsyncExitStack() as stack:
                    if self._listener is not None:
                        await stack.enter_async_context(server.served(self._listener, control))
                    # Returns by itself when the guest has ended and the last of its output is
                    # out.
                    await self._end.connect(vm, self._virtio, held)
                nursery.cancel_scope.cancel()
        outcome = await vm.wait()
        if outcome.cause is Cause.MOVED:
            return replace(outcome, detail=control.moved_to)
        return outcome

    @property
    def undelivered(self) -> bytes:
        """What was typed when the guest had gone already."""
        return self._end.undelivered


@contextmanager
def opened(target: console.ConsoleTarget, control_target: str | None) -> Iterator[Ends]:
    """The host's ends inside the block. Raises `ConfigError` where they cannot be."""
    with _control_socket(control_target) as listener, console.opened(target) as end:
        yield Ends(target, end, listener)


def _control_socket(
    target: str | None,
) -> AbstractContextManager[trio.socket.SocketType | None]:
    if target is None:
        return nullcontext()
    kind, _, path = target.partition(":")
    if kind != "unix" or not path:
        raise ConfigError(f"control {target!r}: expected unix:PATH")
    return server.listening(path)


async def _stop_on_signal(
    vm: Machine, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]
) -> None:
    """SIGINT, SIGTERM and SIGHUP end the guest, so that the terminal is put back on the way out.

    Output that nobody takes within a second is given up then.
    """
    with trio.open_signal_receiver(*_ENDING) as signals:
        task_status.started()
        async for number in signals:
            vm.stop(status=128 + number)
            await trio.sleep(_LAST_OUTPUT_SECONDS)
            scope.cancel()


@asynccontextmanager
async def expecting() -> AsyncIterator[Callable[[], None]]:
    """A guest is expected inside the block: one of these signals cancels it, and ends the command
    with the same status as if there were a guest already.

    What it gives is to be called when there is one, and `Ends.attend` minds the signals.
    """
    ended_by: list[int] = []
    watch = trio.CancelScope()

    async def mind(task_status: trio.TaskStatus[None]) -> None:
        with watch, trio.open_signal_receiver(*_ENDING) as signals:
            task_status.started()
            async for number in signals:
                ended_by.append(number)
                nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(mind)
            yield watch.cancel
            watch.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None  # the block's own: that it is in a nursery is ours
    if ended_by:
        sys.exit(128 + ended_by[0])


def end(outcome: Outcome, undelivered: bytes = b"") -> NoReturn:
    """End the command as the guest has ended, and say how where its status does not."""
    if outcome.cause is Cause.MOVED:
        click.echo(f"avmm: the guest has moved to {outcome.detail}", err=True)
        if undelivered:
            click.echo(f"avmm: this did not reach it any more: {_shown(undelivered)}", err=True)
    elif outcome.cause is not Cause.EXIT and outcome.cause is not Cause.STOPPED:
        click.echo(f"avmm: the guest ended: {outcome}", err=True)
    sys.exit(outcome.status & 0xFF)


def _shown(data: bytes) -> str:
    text = repr(os.fsdecode(data[:_MOST_SHOWN]))
    return text if len(data) <= _MOST_SHOWN else f"{text} and {len(data) - _MOST_SHOWN} bytes more"
