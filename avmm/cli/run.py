"""`avmm run`: a guest with its console."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import trio

from avmm.boot import Protocol
from avmm.cli import attend, console
from avmm.cli.attend import PATH
from avmm.config import UNCLAIMED, MachineConfig, read_toml
from avmm.machine import Machine
from avmm.outcome import Outcome
from avmm.vcpu.completion import CompletionMode


class PortNumber(click.ParamType[int | str]):
    """An I/O port, or "none"."""

    name = "port"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value == "none":
            return "none"
        try:
            return int(str(value), 0)
        except ValueError:
            self.fail(f"{value!r} is no port: expected a number like 0xf4, or 'none'", param, ctx)


@click.command()
@click.argument("image", required=False, type=PATH)
@click.option("--initrd", type=PATH, help="Initial RAM disk, or the first module.")
@click.option("--module", "modules", type=PATH, multiple=True, help="Another module; repeatable.")
@click.option(
    "--rom",
    "roms",
    metavar="ADDRESS=FILE",
    multiple=True,
    help="Read-only memory at ADDRESS; repeatable.",
)
@click.option("--cmdline", metavar="TEXT", help="The guest's command line.")
@click.option("--memory", metavar="SIZE", help="RAM, like 64M or 2G.  [default: 64M]")
@click.option("--cpus", type=int, metavar="N", help="Number of vCPUs.  [default: 1]")
@click.option(
    "--console",
    "console_target",
    metavar="TARGET",
    help="stdio, pty, unix:PATH or file:PATH; virtio, or virtio: before one of these, is hvc0.  "
    "[default: stdio]",
)
@click.option(
    "--debug-exit",
    type=PortNumber(),
    help="Port that ends the run with status (value << 1 | 1), or none.  [default: 0xf4]",
)
@click.option("--flat", metavar="MODE@ADDRESS", help="Run IMAGE as it is, like real@0x7c00.")
@click.option(
    "--protocol",
    type=click.Choice([protocol.value for protocol in Protocol]),
    help="How a Linux kernel is entered.  [default: auto]",
)
@click.option(
    "--disk",
    "disks",
    metavar="FILE[,ro][,overlay][,serial=NAME]",
    multiple=True,
    help="A virtio disk (vda, vdb, ...); ro: read-only, overlay: changes are thrown away; "
    "repeatable.",
)
@click.option("--rng/--no-rng", default=None, help="A virtio source of entropy.")
@click.option(
    "--balloon/--no-balloon",
    default=None,
    help="A virtio memory balloon; the guest's free memory goes back to the host, too.",
)
@click.option(
    "--vsock", metavar="cid=N[,unix=PATH]", help="A virtio socket device, found at unix sockets."
)
@click.option(
    "--net",
    metavar="LINK[,mac=..][,mtu=..]",
    multiple=True,
    help="A virtio network device; LINK is tap=NAME, unix=PATH or listen=PATH; repeatable.",
)
@click.option("--acpi/--no-acpi", default=None, help="ACPI tables.  [default: acpi]")
@click.option(
    "--unclaimed",
    type=click.Choice(list(UNCLAIMED)),
    help="Level at which accesses that no device claims are reported.  [default: info]",
)
@click.option(
    "--completion",
    type=click.Choice([mode.value for mode in CompletionMode]),
    help="Which exits are completed before a state is saved.  [default: auto]",
)
@click.option(
    "--completion-capability",
    type=int,
    metavar="NUMBER",
    help="KVM_CAP_NEEDS_COMPLETION's number in this host's kernel, if it has one.",
)
@attend.control_option
@click.option("--config", type=PATH, metavar="FILE", help="Settings from TOML; options win.")
def command(
    image: Path | None,
    modules: tuple[Path, ...],
    roms: tuple[str, ...],
    disks: tuple[str, ...],
    console_target: str | None,
    control_target: str | None,
    config: Path | None,
    net: tuple[str, ...],
    **options: Any,
) -> None:
    """Run IMAGE (vmlinux, bzImage, ELF, multiboot; may be compressed), or the bundled shell.

    The command ends with the status that the guest ends with. On a terminal, Ctrl-A is the
    escape: Ctrl-A h lists what follows it.
    """
    settings = read_toml(config) if config is not None else {}
    options |= {"kernel": image, "console": console_target, "modules": modules or None}
    repeated = {"roms": roms, "disks": disks, "net": net}
    options |= {name: list(values) or None for name, values in repeated.items()}
    settings |= {name: value for name, value in options.items() if value is not None}
    machine_config = MachineConfig.make(**settings)
    target = console.parse(machine_config.console)
    if target.virtio:
        cmdline = f"{machine_config.cmdline} console=hvc0".lstrip()
        machine_config = replace(machine_config, cmdline=cmdline)
    attend.end(*trio.run(_run, machine_config, target, control_target))


async def _run(
    config: MachineConfig, target: console.ConsoleTarget, control_target: str | None
) -> tuple[Outcome, bytes]:
    with attend.opened(target, control_target) as ends:
        async with Machine(config, devices=ends.devices(target.virtio)) as vm:
            return await ends.attend(vm), ends.undelivered
