"""`avmm receive`: waits for a guest from another process, and becomes its VMM."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Final, cast

import click
import trio

from avmm.arrivals import receive
from avmm.cli import attend, console, options, tls
from avmm.config import HostSettings
from avmm.options import parse_size
from avmm.outcome import Outcome
from avmm.transfer import transports
from avmm.transfer.targets import Target
from avmm.transfer.tls import Tls

logger = logging.getLogger(__name__)

_HELLO_SECONDS: Final = 5.0
_MOST_CALLERS: Final = 32


@click.command()
@click.argument("source", metavar="unix:PATH|tcp:HOST:PORT|fd:N")
@options.arriving
@attend.options
@click.option(
    "--most-memory", metavar="SIZE", help="Refuse a guest with more RAM than this, like 2G."
)
@tls.options
def command(
    source: str,
    control_target: str | None,
    grace: float,
    most_memory: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    tls_peer: str | None,
    **settings: Any,
) -> None:
    """Wait at unix:PATH or tcp:HOST:PORT for one guest, and run it from where it was.

    `avmm ctl PATH migrate` sends it. Give one option for each of its disks, networks and sockets,
    to say what they are on this host. The command ends with the guest's status. If it refuses the
    guest, it ends with 125, or with 2 if an option is missing, and the guest runs on where it was.

    With fd:N the command uses a listening socket that it has inherited.

    Whoever can reach a TCP port without TLS can send it a guest: use TLS, or a unix socket.
    """
    at = Target.parse(source)
    proof = tls.chosen(at, tls_cert, tls_key, tls_ca, tls_peer)
    most = None if most_memory is None else parse_size(most_memory, "--most-memory")
    ends = console.parse(options.console_target(settings))
    chosen = options.given(settings)
    attend.end(*trio.run(_run, at, proof, ends, control_target, grace, most, chosen))


async def _run(
    at: Target,
    proof: Tls | None,
    console_target: console.ConsoleTarget,
    control_target: str | None,
    grace: float,
    most_memory: int | None,
    settings: dict[str, Any],
) -> tuple[Outcome, bytes]:
    with attend.opened(console_target, control_target, grace) as ends:
        async with attend.expecting() as has_come:
            line = await _caller(at, proof, ends)
            if line is None:
                click.echo("avmm: stopped before a guest came", err=True)
                sys.exit(0)
            try:
                async with receive(
                    line,
                    devices=lambda told: ends.devices(told.has_hvc),
                    most_memory=most_memory,
                    **cast("HostSettings", settings),
                ) as vm:
                    has_come()
                    await transports.close(line)
                    return await ends.attend(vm), ends.undelivered
            finally:
                await transports.close(line)
    raise AssertionError("the wait for a guest was cancelled without a signal")


async def _first_source(
    listener: transports.Listener, stopped: trio.Event
) -> trio.abc.Stream | None:
    """The first caller that begins as a source of a guest does. A port scan, a health check or a
    caller that says nothing does not keep the guest from coming: several are heard at once, each
    for a short while. None if this is `stopped` first."""
    chosen: list[trio.abc.Stream] = []
    free = trio.Semaphore(_MOST_CALLERS)

    async def hear(line: trio.abc.Stream) -> None:
        try:
            why = "it has said nothing"
            with trio.move_on_after(_HELLO_SECONDS):
                why = await transports.why_no_source(line)
                if not why and not chosen:
                    chosen.append(line)
                    nursery.cancel_scope.cancel()
                    return
            logger.warning("a caller was turned away: %s", why)
        finally:
            free.release()
            if line not in chosen:
                await trio.aclose_forcefully(line)

    try:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await stopped.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            while True:
                await free.acquire()
                nursery.start_soon(hear, await listener.accept())
    except BaseException:
        for line in chosen:
            await trio.aclose_forcefully(line)
        raise
    return chosen[0] if chosen else None


async def _caller(at: Target, proof: Tls | None, ends: attend.Ends) -> trio.abc.Stream | None:
    stopped = trio.Event()
    async with await transports.listen(str(at), tls=proof) as listener:
        click.echo(f"avmm: waiting at {listener.target} for a guest", err=True)
        async with ends.awaiting(listener.target, stopped.set):
            line = await _first_source(listener, stopped)
    if line is not None:
        click.echo("avmm: a guest is on its way here", err=True)
    return line
