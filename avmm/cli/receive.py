"""`avmm receive`: waits for a guest of another process, and becomes its VMM."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

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


@click.command()
@click.argument("source", metavar="unix:PATH|tcp:HOST:PORT|fd:N")
@options.arriving
@attend.control_option
@click.option(
    "--most-memory", metavar="SIZE", help="Refuse a guest with more RAM than this, like 2G."
)
@tls.options
def command(
    source: str,
    control_target: str | None,
    most_memory: str | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    **settings: Any,
) -> None:
    """Wait at unix:PATH or tcp:HOST:PORT for one guest, and run it from there on.

    It is sent by `avmm ctl PATH migrate`. Its disks, networks and sockets are named here, as many
    as it has. The command ends with the status that the guest ends with, or with 125 (2 where
    something is missing here) when it has refused the guest, which then runs on where it was.

    fd:N is a listening socket that the command was started with.

    Whoever can reach a TCP port without TLS can send it a guest: use TLS, or a unix socket.
    """
    at = Target.parse(source)
    proof = tls.chosen(at, tls_cert, tls_key, tls_ca)
    most = None if most_memory is None else parse_size(most_memory, "--most-memory")
    ends = console.parse(options.console_target(settings))
    chosen = options.given(settings)
    attend.end(*trio.run(_run, at, proof, ends, control_target, most, chosen))


async def _run(
    at: Target,
    proof: Tls | None,
    console_target: console.ConsoleTarget,
    control_target: str | None,
    most_memory: int | None,
    settings: dict[str, Any],
) -> tuple[Outcome, bytes]:
    with attend.opened(console_target, control_target) as ends:
        async with attend.expecting() as has_come:
            line = await _caller(at, proof)
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
    raise AssertionError("a guest was expected, and that was given up without a signal")


async def _caller(at: Target, proof: Tls | None) -> trio.abc.Stream:
    async with await transports.listen(str(at), tls=proof) as listener:
        click.echo(f"avmm: waiting at {listener.target} for a guest", err=True)
        line = await listener.accept()
    click.echo("avmm: a guest is on its way here", err=True)
    return line
