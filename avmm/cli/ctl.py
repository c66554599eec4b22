"""`avmm ctl`: steers a running guest through its control socket (`avmm.control`).

Exit statuses: 2 if an option, a path or a target cannot be used; `UNKNOWN` if the guest was handed
over and it is not known which side runs it; 130 if Ctrl-C cancelled the command, and the guest
runs on here; 125 for other failures.
"""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

import click
import trio

from avmm.cli import picture, tls
from avmm.cli.options import PATH
from avmm.control import client, verbs
from avmm.control.client import Client
from avmm.control.protocol import GivenUp
from avmm.control.verbs import Moved, Pauses, Progress, SnapshotTaken, Status
from avmm.errors import AvmmError, HandOverUnknownError
from avmm.options import parse_size
from avmm.transfer.targets import Target

UNKNOWN: Final = 3
_INTERRUPTED: Final = 128 + signal.SIGINT

_Answer = TypeVar("_Answer")


def _asked(
    path: Path, ask: Callable[[Client], Awaitable[_Answer]], given_up: str = "given up"
) -> _Answer:
    """Connect to the guest at `path`, and return the answer to what `ask` asks."""
    with _statuses(path, given_up):
        return trio.run(_ask, path, ask)


@contextmanager
def _statuses(path: Path, given_up: str) -> Iterator[None]:
    """Ends the command if a failure inside the block has a status of its own."""
    try:
        yield
    except GivenUp:
        click.echo(f"avmm: {given_up}", err=True)
        sys.exit(_INTERRUPTED)
    except HandOverUnknownError as error:
        click.echo(f"avmm: {error}", err=True)
        click.echo(
            f"avmm: decide with `avmm ctl {path} settle here` or `avmm ctl {path} settle there`",
            err=True,
        )
        sys.exit(UNKNOWN)


async def _ask(path: Path, ask: Callable[[Client], Awaitable[_Answer]]) -> _Answer:
    """Ctrl-C cancels the command, and the answer then says what became of it. A second Ctrl-C ends
    the wait for that answer.
    """
    answer: _Answer | AvmmError = AvmmError("it is not known what became of it")
    async with await client.connect(path) as connection, trio.open_nursery() as nursery:

        async def mind_interrupts(task_status: trio.TaskStatus[None]) -> None:
            with trio.open_signal_receiver(signal.SIGINT) as signals:
                task_status.started()
                await anext(signals)
                with suppress(
                    AvmmError
                ):  # the connection is cut; the task that waits for the answer notices
                    await connection.give_up()
                await anext(signals)
            nursery.cancel_scope.cancel()

        await nursery.start(mind_interrupts)
        try:
            answer = await ask(connection)
        except AvmmError as error:  # raised after the nursery, which would put it in a group
            answer = error
        nursery.cancel_scope.cancel()
    if isinstance(answer, AvmmError):
        raise answer
    return answer


def _seconds(
    context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    """Check that it is above 0 and finite."""
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g}: expected a number of seconds above 0")
    return value


DEADLINE = click.option(
    "--deadline",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    help=verbs.Pause.help("deadline"),
)


@click.group()
@click.argument("path", type=PATH)
@click.pass_context
def command(context: click.Context, path: Path) -> None:
    """Steer the guest whose control socket is at PATH (`--control unix:PATH`)."""
    context.obj = Path(str(path).removeprefix("unix:"))


@command.command("status", help=verbs.GetStatus.help())
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.pass_obj
def status(path: Path, as_json: bool) -> None:
    told = _asked(path, Client.status)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    click.echo(f"{told['state']}: {_state(told)}")


def _state(told: Status) -> str:
    from avmm.cli.progress import size  # noqa: PLC0415

    parts = []
    if told["cpus"]:  # 0 if there is no guest yet
        parts.append(f"{told['cpus']} vCPU{'s' * (told['cpus'] > 1)}")
        parts.append(f"{size(told['memory'])} of RAM")
    if told.get("engine") == "soft":
        parts.append("on the software engine")
    parts.append(f"process {told['pid']}")
    if holders := _holders(told["pauses"]):
        parts.append(f"paused by {holders}")
    if told["migration"]:
        moving = told["migration"]
        parts.append(f"on its way to {moving['target']}, round {moving.get('round', 0)}")
    if told["unsettled"]:
        parts.append(told["unsettled"])
    return ", ".join(parts)


def _holders(pauses: Mapping[str, int]) -> str:
    return " and ".join(f"{who} ({count})" for who, count in pauses.items() if count)


@command.command("pause", short_help=verbs.Pause.help())
@DEADLINE
@click.pass_obj
def pause(path: Path, deadline: float | None) -> None:
    """Let the guest stand still until `resume`.

    Pauses are counted: the guest runs on when every pause is undone, including that of Ctrl-A p.
    """
    _say_pauses(
        _asked(
            path,
            lambda guest: guest.pause(deadline),
            "the pause was cancelled, and the guest runs on",
        )
    )


@command.command("resume", help=verbs.Resume.help())
@click.pass_obj
def resume(path: Path) -> None:
    _say_pauses(_asked(path, Client.resume))


def _say_pauses(told: Pauses) -> None:
    holders = _holders(told["pauses"])
    click.echo(f"paused by {holders}" if holders else "running")


@command.command("snapshot", short_help=verbs.TakeSnapshot.help())
@click.argument("file", type=PATH)
@DEADLINE
@click.pass_obj
def snapshot(path: Path, file: Path, deadline: float | None) -> None:
    """Write the guest to FILE, for `avmm restore`. The guest runs on.

    FILE does not contain what the guest's disks hold. If the guest writes to them, pause it and
    copy them as well.
    """
    from avmm.cli.progress import seconds, shown, size  # noqa: PLC0415 - tqdm

    totals = dict[int, int]()
    with shown() as bar:

        def on_progress(told: Progress) -> None:
            total = totals.setdefault(told["round"], told["pages_left"])
            bar.show({**told, "pages_sent": total - told["pages_left"]})

        async def ask(guest: Client) -> SnapshotTaken:
            return await guest.snapshot(file, deadline=deadline, on_progress=on_progress)

        told = _asked(path, ask, f"cancelled: {file} is unchanged, and the guest runs on")
    on_disk = file.stat().st_blocks * 512
    click.echo(f"{file}: {size(on_disk)} on disk, in {seconds(told['seconds'])}")


@command.command("migrate", short_help=verbs.Migrate.help())
@click.argument("target", metavar="unix:PATH|tcp:HOST:PORT")
@click.option(
    "--bandwidth",
    metavar="SIZE",
    help=verbs.Migrate.help("bandwidth").replace(".", ", like 100M."),
)
@click.option(
    "--downtime",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    help=f"{verbs.Migrate.help('downtime')}  [default: {verbs.Migrate.downtime}]",
)
@DEADLINE
@tls.options
@click.option(
    "--report", type=PATH, metavar="FILE.png", help="Draw the migration as a picture in this file."
)
@click.pass_obj
def migrate(
    path: Path,
    target: str,
    bandwidth: str | None,
    downtime: float | None,
    deadline: float | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    tls_peer: str | None,
    report: Path | None,
) -> None:
    """Hand the running guest over to the `avmm receive` at unix:PATH or tcp:HOST:PORT.

    Ctrl-C cancels the migration, and the guest stays. If the guest was handed over and no answer
    came, the command ends with status 3, and the guest stands still here until you `settle` it.
    """
    from avmm.cli.progress import seconds, shown, size  # noqa: PLC0415 - tqdm
    from avmm.cli.timeline import Timeline  # noqa: PLC0415

    to = Target.parse(target, fd=False)
    proof = tls.chosen(to, tls_cert, tls_key, tls_ca, tls_peer)
    if proof is not None:
        proof.context(server=False)  # whoever opens these files reports what is wrong with them
    rate = None if bandwidth is None else parse_size(bandwidth, "--bandwidth")
    if report is not None:
        picture.demand(report, "--report")
    timeline = Timeline(target)

    def draw(moved: Moved | None, why: str = "") -> None:
        if report is not None:
            timeline.draw(report, moved, why)

    with _statuses(path, "the migration was cancelled, and the guest stays here"):
        try:
            with shown() as bar:

                def on_progress(told: Progress) -> None:
                    bar.show(told)
                    timeline.add(told)

                async def ask(guest: Client) -> Moved:
                    return await guest.migrate(
                        target,
                        tls=proof,
                        bandwidth=rate,
                        downtime=downtime,
                        deadline=deadline,
                        on_progress=on_progress,
                    )

                told = trio.run(_ask, path, ask)
        except AvmmError as error:
            draw(None, str(error))
            raise
    draw(told)
    click.echo(
        f"the guest has moved to {told['target']}: {size(told['bytes_sent'])} in "
        f"{seconds(told['total'])}, {told['rounds']} rounds, downtime "
        f"{seconds(told['downtime'])}"
    )


@command.command("settle", short_help=verbs.Settle.help())
@click.argument("where", type=click.Choice(["here", "there"]))
@click.pass_obj
def settle(path: Path, where: str) -> None:
    """Say where the guest runs, if it was handed over and no answer came.

    there: the guest runs at the destination, so it is ended here. here: you are sure that it does
    not run there and never will, so it runs on here. A guest that runs on both sides destroys its
    disks.
    """
    _asked(path, lambda guest: guest.settle(runs_here=where == "here"))
    click.echo("the guest runs on here" if where == "here" else "the guest has ended here")


@command.command("powerdown", help=verbs.Powerdown.help())
@click.option(
    "--deadline",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    help=verbs.Powerdown.help("deadline"),
)
@click.pass_obj
def powerdown(path: Path, deadline: float | None) -> None:
    given_up = "no longer waiting: the button was pressed, and the guest may shut down yet"
    _asked(path, lambda guest: guest.powerdown(deadline), given_up)
    click.echo("the guest has ended")


@command.command("stop", help=verbs.Stop.help())
@click.pass_obj
def stop(path: Path) -> None:
    _asked(path, Client.stop)
    click.echo("the guest has ended")
