"""`avmm image`: makes a guest from a distribution's packages."""

from __future__ import annotations

from pathlib import Path

import click

from avmm.image import build as builder
from avmm.image import kernel as kernels
from avmm.image.added import Added
from avmm.image.packages import Package

PATH = click.Path(path_type=Path)


@click.group()
def command() -> None:
    """Make guests from a distribution's packages that you have downloaded."""


@command.command("build")
@click.argument("packages", nargs=-1, required=True, type=PATH)
@click.option(
    "--output",
    "-o",
    type=PATH,
    default=Path("guest"),
    show_default=True,
    help="The folder to create.",
)
@click.option("--module", "modules", multiple=True, help="A kernel module to load; repeatable.")
@click.option("--script", type=PATH, help="Run this in the guest instead of a shell.")
@click.option(
    "--add",
    "added",
    metavar="FILE:PATH",
    multiple=True,
    help="Put FILE, or a folder with all that is in it, into the guest at PATH. If PATH ends with "
    "a slash, it is the folder into which FILE goes. Repeatable.",
)
def build(
    packages: tuple[Path, ...],
    output: Path,
    modules: tuple[str, ...],
    script: Path | None,
    added: tuple[str, ...],
) -> None:
    """Make a guest for `avmm run --config` from PACKAGES.

    PACKAGES are the .deb files of a kernel and of busybox-static. From Linux 6.19 on, Debian's
    kernel is in several packages: linux-binary-*, linux-modules-* and linux-base-*.

    The guest loads its modules, gets addresses by DHCP, and starts a shell on its console. The
    shell's exit status becomes the status of the run.
    """
    made = builder.build(
        packages,
        output,
        modules=modules,
        script=script,
        added=[Added.parse(text) for text in added],
        progress=lambda step: click.echo(f"{step} ...", err=True),
    )
    click.echo(
        f"Linux {made.release}, {len(made.modules)} modules, initramfs of "
        f"{made.size / (1 << 20):.1f} MiB, memory {made.memory}; start it with\n"
        f"  avmm run --config {made.config}"
    )


@command.command("kernel")
@click.argument("package", type=PATH)
@click.option("--output", "-o", type=PATH, help="[default: vmlinuz-RELEASE]")
def kernel(package: Path, output: Path | None) -> None:
    """Extract the kernel from PACKAGE, which is a .deb file."""
    release, target = kernels.extract(Package(package), output)
    click.echo(f"{target}: Linux {release}")
