"""The `avmm` command: one small file a subcommand, imported only when it is called.

Exit statuses: what the guest ended with; 2 for input that cannot be (as click has it);
`FAILED` where avmm or a vCPU fails while it runs. That is not 1, which a debug exit gives for
success.
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
    "run": "Run a guest; without IMAGE the bundled shell.",
    "restore": "Run the guest of a snapshot from where it was.",
    "receive": "Wait for a guest of another process, and run it from there on.",
    "ctl": "Steer a running guest: pause, snapshot, migrate and more.",
    "image": "Make guests from a distribution's packages.",
    "doctor": "Tell what this host's KVM offers and what avmm makes of it.",
    "bench": "Measure, always as a ratio to a baseline in the same run.",
}


class Commands(click.Group):
    """Finds `avmm.cli.<name>.command` on demand, so that no command pays for another."""

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
    help="What avmm says on standard error while it runs.",
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
    """Where one is closed (`avmm run <&-`), put /dev/null there, before another file takes it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
