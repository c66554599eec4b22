"""The `avmm` command. Each subcommand has a small file of its own, which is imported only when it
is called.

Exit statuses: the guest's own; 2 if an option, a setting or a file cannot be used (as in click);
`FAILED` if avmm or a vCPU fails, in whatever way; 130 after Ctrl-C. `FAILED` is not 1, because a
debug exit uses 1 for success.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Final, NoReturn

import click

FAILED: Final = 125
_INTERRUPTED: Final = 128 + signal.SIGINT
COMMANDS: Final = {
    "run": "Run a guest (without IMAGE, the bundled shell).",
    "restore": "Run the guest of a snapshot from where it was.",
    "receive": "Wait for a guest from another process, and run it from where it was.",
    "ctl": "Steer a running guest: pause, snapshot, migrate and more.",
    "image": "Make guests from a distribution's packages.",
    "doctor": "Show what this host's KVM and the software engine offer, and whether avmm works "
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
        if not gc.isenabled():  # by `avmm_early`
            gc.freeze()
            gc.enable()
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would end with 1
            # The reader of our output has gone. Nothing more may be written on the way out.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
            sys.exit(128 + signal.SIGPIPE)

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


def main(arguments: list[str] | None = None) -> NoReturn:
    """What `avmm_early.main` calls; does not return."""
    try:
        status = cli.main(arguments, prog_name="avmm", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(_INTERRUPTED)
    except Exception as error:
        sys.exit(_failed(error))
    except BaseExceptionGroup as group:  # of interrupts, perhaps with something else
        if group.split(KeyboardInterrupt)[0] is None:
            raise
        sys.exit(_INTERRUPTED)


def _failed(error: Exception) -> int:
    """Say what went wrong. Returns the command's status, which never means success."""
    from avmm.errors import AvmmError, ConfigError  # noqa: PLC0415 - keep --help light

    errors = list(_single(error))
    for one in errors:
        if isinstance(one, AvmmError):
            click.echo("\n".join([f"avmm: {one}", *getattr(one, "__notes__", ())]), err=True)
        else:
            _report_bug(one)
    return 2 if all(isinstance(one, ConfigError) for one in errors) else FAILED


def _single(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group: the commands run nurseries, and each adds a group."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _single(one)
    else:
        yield error


def _report_bug(error: BaseException) -> None:
    where = traceback.extract_tb(error.__traceback__)
    place = f", at {where[-1].filename}:{where[-1].lineno}" if where else ""
    click.echo(
        f"avmm: unexpected {type(error).__name__}: {error}{place}. This is a bug of avmm, or the "
        "host failed in an unexpected way. Please report it, with what `avmm --log-level debug` "
        "prints and what led to it.",
        err=True,
    )
    logging.getLogger(__name__).debug("the error:", exc_info=error)
