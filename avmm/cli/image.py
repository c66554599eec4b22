"""`avmm image`: makes a guest from a distribution's packages."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import click

from avmm.errors import ConfigError
from avmm.image import build as builder
from avmm.image import kernel as kernels
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
    help="Put FILE into the guest at PATH; repeatable.",
)
def build(
    packages: tuple[Path, ...],
    output: Path,
    modules: tuple[str, ...],
    script: Path | None,
    added: tuple[str, ...],
) -> None:
    """Make a guest for `avmm run --config` from PACKAGES.

    PACKAGES are the .deb files of a kernel and of busybox-static.

    The guest loads its modules, gets addresses by DHCP, and starts a shell on its console. The
    shell's exit status becomes the status of the run.
    """
    made = builder.build(
        packages,
        output,
        modules=modules,
        script=script,
        added=dict(_added(text) for text in added),
        progress=lambda step: click.echo(f"{step} ...", err=True),
    )
    click.echo(
        f"Linux {made.release}, {len(made.modules)} modules, initramfs of "
        f"{made.size / (1 << 20):.1f} MiB; start it with\n  avmm run --config {made.config}"
    )


@command.command("kernel")
@click.argument("package", type=PATH)
@click.option("--output", "-o", type=PATH, help="[default: vmlinuz-RELEASE]")
def kernel(package: Path, output: Path | None) -> None:
    """Extract the kernel from PACKAGE, which is a .deb file."""
    deb = Package(package)
    release = kernels.release(deb)
    target = output or Path(f"vmlinuz-{release}")
    kernels.extract(deb, target)
    click.echo(f"{target}: Linux {release}")


def _added(text: str) -> tuple[PurePosixPath, Path]:
    source, colon, target = text.rpartition(":")
    if not colon or not source or not target.startswith("/"):
        raise ConfigError(f"--add {text!r}: expected FILE:PATH with an absolute PATH")
    return PurePosixPath(target), Path(source)
