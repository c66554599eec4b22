"""`avmm restore`: runs the guest of a snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click
import trio

from avmm.arrivals import restore
from avmm.cli import attend, console, options
from avmm.config import HostSettings
from avmm.outcome import Outcome


@click.command()
@click.argument("file", type=options.PATH)
@options.arriving
@attend.options
@click.option("--verify", is_flag=True, help="Read all of FILE first, and compare its checksums.")
def command(
    file: Path, control_target: str | None, grace: float, verify: bool, **settings: Any
) -> None:
    """Run the guest of the snapshot FILE from where it was.

    Give one option for each of its disks, networks and sockets, to say what they are on this host.
    The disks must hold what they held when the snapshot was taken. FILE must not be changed while
    the guest runs. The command ends with the guest's status.
    """
    target = console.parse(options.console_target(settings))
    chosen = options.given(settings)
    attend.end(*trio.run(_run, file, target, control_target, grace, verify, chosen))


async def _run(
    file: Path,
    target: console.ConsoleTarget,
    control_target: str | None,
    grace: float,
    verify: bool,
    settings: dict[str, Any],
) -> tuple[Outcome, bytes]:
    with attend.opened(target, control_target, grace) as ends:
        machine = restore(
            file,
            devices=lambda told: ends.devices(told.has_hvc),
            verify=verify,
            **cast("HostSettings", settings),
        )
        async with machine as vm:
            return await ends.attend(vm), ends.undelivered
