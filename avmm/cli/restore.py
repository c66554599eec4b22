"""`avmm restore`: a guest out of a snapshot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import trio

from avmm.arrivals import restore
from avmm.cli import attend, console
from avmm.outcome import Outcome


@click.command()
@click.argument("file", type=attend.PATH)
@attend.link_options
@click.option("--verify", is_flag=True, help="Read all of FILE first, and compare its checksums.")
def command(
    file: Path,
    console_target: str,
    control_target: str | None,
    disks: tuple[str, ...],
    net: tuple[str, ...],
    **options: Any,
) -> None:
    """Run the guest of the snapshot FILE from where it was.

    Its disks, networks and sockets are named here, as many as it has; disks must hold what they
    did then. FILE must not be changed while the guest runs. The command ends with the status that
    the guest ends with.
    """
    links = {"disks": disks, "net": net, **options}
    attend.end(*trio.run(_run, file, console.parse(console_target), control_target, links))


async def _run(
    file: Path,
    console_target: console.ConsoleTarget,
    control_target: str | None,
    links: dict[str, Any],
) -> tuple[Outcome, bytes]:
    with attend.opened(console_target, control_target) as ends:
        machine = restore(file, devices=lambda told: ends.devices(told.has_hvc), **links)
        async with machine as vm:
            return await ends.attend(vm), ends.undelivered
