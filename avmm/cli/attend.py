"""What `avmm run`, `receive` and `restore` share: a guest's console, control socket and signals.

The host's ends (console and control socket) are opened before the guest exists. While the guest
runs, its console is connected, signals end it, and the control socket is served.
"""

from __future__ import annotations

import logging
import math
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
from avmm.control.verbs import Control, NoGuestYet
from avmm.devices.virtio.console import Console
from avmm.errors import AvmmError, ConfigError
from avmm.machine import Machine
from avmm.outcome import Cause, Outcome
from avmm.parts.placing import Unplaced, virtio

logger = logging.getLogger(__name__)

_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_SECONDS: Final = 30.0
_LAST_OUTPUT_SECONDS: Final = 1.0
_MOST_SHOWN: Final = 400
_BY_CONTROL: Final = "through its control socket"
_HALTED: Final = 133
"""The status for a guest that has halted for good. Nobody can tell whether it was done or had
given up, so this is not the status of success."""


def _number(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """Check that it is a number: FloatRange accepts "nan"."""
    if math.isnan(value):
        raise click.BadParameter(f"{value:g}: expected a number of seconds")
    return value


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--control and --grace."""
    control = click.option(
        "--control",
        "control_target",
        metavar="unix:PATH",
        help="Make a socket for `avmm ctl PATH`. Only your user may connect to it.",
    )
    grace = click.option(
        "--grace",
        type=click.FloatRange(min=0, max=1e6),
        callback=_number,
        default=_GRACE_SECONDS,
        show_default=True,
        metavar="SECONDS",
        help="On SIGTERM, press the guest's power button, and end the guest if it has not shut "
        "down after this time. A second SIGTERM ends it at once.",
    )
    return control(grace(command))


class Ends:
    """The host's ends of one guest. Made by `opened`."""

    def __init__(
        self,
        target: console.ConsoleTarget,
        end: console.ConsoleEnd,
        listener: trio.socket.SocketType | None,
        grace: float,
    ) -> None:
        self._grace = grace
        self._target = target
        self._end = end
        self._listener = listener
        self._virtio: Console | None = None

    def devices(self, has_hvc: bool) -> list[Unplaced]:
        """The devices that the guest's console needs: a virtio console, if it has one.

        Raises `ConfigError` if the user asked for a virtio console and the guest has none.
        """
        if has_hvc:
            self._virtio = Console()
            return [virtio(self._virtio)]
        if self._target.virtio:
            raise ConfigError("console: the guest has no virtio console, but a serial one")
        return []

    @asynccontextmanager
    async def awaiting(self, where: str, stop: Callable[[], None]) -> AsyncIterator[None]:
        """Serve the control socket while this process waits for a guest at `where`, inside the
        block. Whoever asks to end it has `stop` called."""
        async with AsyncExitStack() as stack:
            if self._listener is not None:
                control = NoGuestYet(where, stop)
                await stack.enter_async_context(server.served(self._listener, control))
            yield

    async def attend(self, vm: Machine) -> Outcome:
        """Connect and serve the guest until it has ended and its output is delivered.

        If the guest has moved, the outcome's detail says where to.
        """
        async with holds.opened(vm) as held:
            control = Control(vm, held)
            async with trio.open_nursery() as nursery:
                await nursery.start(_stop_on_signal, vm, nursery.cancel_scope, self._grace)
                nursery.start_soon(_stop_when_halted, vm)
                async with AsyncExitStack() as stack:
                    if self._listener is not None:
                        await stack.enter_async_context(server.served(self._listener, control))
                    # This returns when the guest has ended and all of its output is written.
                    await self._end.connect(vm, self._virtio, held)
                nursery.cancel_scope.cancel()
        outcome = await vm.wait()
        if outcome.cause is Cause.MOVED:
            return replace(outcome, detail=control.moved_to)
        if outcome.cause is Cause.STOPPED and control.was_stopped:
            return replace(outcome, detail=_BY_CONTROL)
        return outcome

    @property
    def undelivered(self) -> bytes:
        """What was typed after the guest had gone."""
        return self._end.undelivered


@contextmanager
def opened(
    target: console.ConsoleTarget, control_target: str | None, grace: float
) -> Iterator[Ends]:
    """The host's ends, open inside the block. After SIGTERM the guest has `grace` seconds to shut
    down. Raises `ConfigError` if one cannot be opened."""
    with _control_socket(control_target) as listener, console.opened(target) as end:
        yield Ends(target, end, listener, grace)


def _control_socket(
    target: str | None,
) -> AbstractContextManager[trio.socket.SocketType | None]:
    if target is None:
        return nullcontext()
    kind, _, path = target.partition(":")
    if kind != "unix" or not path:
        raise ConfigError(f"control {target!r}: expected unix:PATH")
    server.preload()
    return server.listening(path)


@contextmanager
def ending_signals() -> Iterator[AsyncIterator[int]]:
    """The signals that end a guest, as they come, except those that were ignored before."""
    if heeded := _heeded(*_ENDING):
        with trio.open_signal_receiver(*heeded) as signals:
            yield signals
    else:
        yield _never()


def _heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


async def _never() -> AsyncIterator[int]:
    await trio.sleep_forever()
    yield 0


async def _stop_on_signal(
    vm: Machine, scope: trio.CancelScope, grace: float, *, task_status: trio.TaskStatus[None]
) -> None:
    """SIGINT, SIGTERM and SIGHUP end the guest, so that the terminal is put back on the way out.

    The first SIGTERM presses its power button, and gives it `grace` seconds to shut down. A guest
    that is paused or listens to no button is ended at once.

    Output that nobody reads within a second after the end is dropped. A signal that was ignored
    when the command began stays ignored: `nohup` and a shell's `&` rely on that.

    From now on until the process is over, SIGTERM and SIGHUP do not end it in their own way: one
    that comes while the command is on its way out would leave its sockets and a raw terminal.
    """
    before: list[int] = []
    for one in _heeded(signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, lambda number, frame: before.append(number))
    with ending_signals() as signals:
        for came in before:  # just now, to be handled below
            signal.raise_signal(came)
        task_status.started()
        number = await anext(signals)
        if number == signal.SIGTERM and grace and _was_asked(vm):
            with trio.move_on_after(grace) as waiting:
                number = await anext(signals)
            if waiting.cancelled_caught:
                click.echo(f"avmm: the guest has not shut down within {grace:g} s", err=True)
        while True:
            vm.stop(status=128 + number)
            await trio.sleep(_LAST_OUTPUT_SECONDS)
            scope.cancel()
            number = await anext(signals)


def _was_asked(vm: Machine) -> bool:
    """Ask the guest to shut down. Returns False if that would be in vain."""
    if vm.is_paused:
        return False
    try:
        vm.powerdown()
    except AvmmError as error:
        logger.info("%s", error)
        return False
    click.echo(
        "avmm: the guest was asked to shut down; a second SIGTERM ends it at once", err=True
    )
    return True


async def _stop_when_halted(vm: Machine) -> None:
    """A guest that has halted for good would keep the command for ever."""
    await vm.halted()
    click.echo(
        "avmm: the guest has halted all of its CPUs, with interrupts off: nothing can wake it",
        err=True,
    )
    vm.stop(status=_HALTED)


@asynccontextmanager
async def expecting() -> AsyncIterator[Callable[[], None]]:
    """Wait for a guest inside the block. A signal cancels the block, and ends the command with the
    same status as if the guest were already there.

    Call the function that it yields when the guest has come; from then on `Ends.attend` handles
    the signals.
    """
    ended_by: list[int] = []
    watch = trio.CancelScope()

    async def mind(task_status: trio.TaskStatus[None]) -> None:
        with watch, ending_signals() as signals:
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
        # The exception of the block itself. The caller need not know that a nursery ran it.
        raise group.exceptions[0] from None
    if ended_by:
        sys.exit(128 + ended_by[0])


def end(outcome: Outcome, undelivered: bytes = b"") -> NoReturn:
    """End the command with the guest's status. If the status alone does not say how the guest
    ended, print that.
    """
    if outcome.cause is Cause.MOVED:
        click.echo(f"avmm: the guest has moved to {outcome.detail}", err=True)
        if undelivered:
            click.echo(
                f"avmm: the guest had moved before it got this input: {_shown(undelivered)}",
                err=True,
            )
    elif outcome.detail == _BY_CONTROL:
        click.echo(f"avmm: the guest was ended {_BY_CONTROL}", err=True)
    elif outcome.cause is not Cause.EXIT and outcome.cause is not Cause.STOPPED:
        click.echo(f"avmm: the guest ended: {outcome}", err=True)
    # Python gives a signal its default action on the way out, but not if it is ignored.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(outcome.status & 0xFF)


def _shown(data: bytes) -> str:
    text = repr(os.fsdecode(data[:_MOST_SHOWN]))
    return text if len(data) <= _MOST_SHOWN else f"{text} and {len(data) - _MOST_SHOWN} more bytes"
