"""`avmm run`: boots a guest, and connects its console."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import trio

from avmm.boot.cmdline import inserted
from avmm.cli import attend, console, options
from avmm.config import MachineConfig, read_toml
from avmm.machine import Machine
from avmm.outcome import Outcome


@click.command()
@options.booting
@attend.options
@click.option(
    "--config",
    type=options.PATH,
    metavar="FILE",
    help="Settings from a TOML file; options override them.",
)
def command(
    control_target: str | None, grace: float, config: Path | None, **settings: Any
) -> None:
    """Run IMAGE (vmlinux, bzImage, ELF or multiboot; it may be compressed) or, without IMAGE, the
    bundled shell.

    The command ends with the guest's status. On a terminal, Ctrl-A is the escape key; Ctrl-A h
    lists the keys that may follow it.
    """
    from_file = read_toml(config) if config is not None else {}
    machine_config = MachineConfig.make(**from_file | options.given(settings))
    target = console.parse(machine_config.console)
    if target.virtio:
        cmdline = inserted(machine_config.cmdline, ["console=hvc0"])
        machine_config = replace(machine_config, cmdline=cmdline)
    attend.end(*trio.run(_run, machine_config, target, control_target, grace))


async def _run(
    config: MachineConfig, target: console.ConsoleTarget, control_target: str | None, grace: float
) -> tuple[Outcome, bytes]:
    with attend.opened(target, control_target, grace) as ends:
        async with Machine(config, devices=ends.devices(target.virtio)) as vm:
            return await ends.attend(vm), ends.undelivered
