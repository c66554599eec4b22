"""The `avmm` command. Each subcommand has a small file of its own, which is imported only when it
is called.

Exit statuses: the guest's own; 2 if an option, a setting or a file cannot be used (as in click);
`FAILED` if avmm or a vCPU fails while the guest runs. `FAILED` is not 1, because a debug exit uses
1 for success.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any, Final

import click

FAILED: Final = 125
COMMANDS: Final = {
    "run": "Run a guest (without IMAGE, the bundled shell).",
    "restore": "Run the guest of a snapshot from where it was.",
    "receive": "Wait for a guest from another process, and run it from where it was.",
    "ctl": "Steer a running guest: pause, snapshot, migrate and more.",
    "image": "Make guests from a distribution's packages.",
    "doctor": "Show what this host's KVM offers, what avmm uses of it, and whether avmm works "
    "here.",
    "bench": "Measure avmm, always compared with a baseline from the same run.",
}


class Commands(click.Group):
    """Finds `avmm.cli.<name>.command` on demand, so that no command imports what only another one
    needs.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"avmm.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="avmm")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="warning",
    show_default=True,
    help="How much avmm logs on standard error while it runs.",
)
def cli(log_level: str) -> None:
    """Run small KVM guests."""
    logging.basicConfig(format="avmm: %(message)s", level=log_level.upper(), stream=sys.stderr)


def main(arguments: list[str] | None = None) -> Any:
    """The command's entry point; does not return."""
    from avmm.errors import AvmmError, ConfigError  # noqa: PLC0415 - keep --help light

    _fill_standard_descriptors()

    try:
        return cli.main(arguments, prog_name="avmm")
    except (AvmmError, BaseExceptionGroup) as error:
        alone: BaseException = error
        while isinstance(alone, BaseExceptionGroup) and len(alone.exceptions) == 1:
            alone = alone.exceptions[0]  # the commands run nurseries, and each adds a group
        if isinstance(alone, ConfigError):
            click.echo(f"avmm: {alone}", err=True)
            sys.exit(2)
        if isinstance(alone, AvmmError):
            lines = ["avmm: " + str(alone), *getattr(alone, "__notes__", ())]
            click.echo("\n".join(lines), err=True)
            sys.exit(FAILED)
        raise


def _fill_standard_descriptors() -> None:
    """If one of these descriptors is closed (`avmm run <&-`), open /dev/null there, before another
    file takes its number.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
