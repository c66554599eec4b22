"""`avmm ctl`: steers a running guest through its control socket (`avmm.control.server`).

Exit statuses: 2 for input that cannot be; `UNKNOWN` where nobody knows which side runs a guest
that was handed over; 130 where Ctrl-C gave it up, and the guest stays; 125 for other failures.
"""

from __future__ import annotations

import json
import math
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from avmm.cli.attend import PATH
from avmm.errors import AvmmError, ConfigError
from avmm.memory.ram import parse_size
from avmm.transfer import targets
from avmm.transfer.targets import Target

UNKNOWN: Final = 3
_MOST_LINE: Final = 1 << 20
_VERSION: Final = 1
Answer = dict[str, Any]


def _ignore(event: Answer) -> None:
    pass


class Client:
    """A connection to a control socket."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"control socket {path}: {error.strerror or error}") from None
        self._lines = self._socket.makefile("rb")
        versions = self._next().get("control")
        if type(versions) is not list or _VERSION not in versions:
            raise AvmmError(f"{path} does not speak version {_VERSION} of the control protocol")

    def _next(self) -> Answer:
        """The next line of the other side's."""
        try:
            line = self._lines.readline(_MOST_LINE)
            answer = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError) as error:
            raise AvmmError(f"{self._path}: no control socket of avmm's: {error}") from None
        if not line:
            raise AvmmError(f"{self._path}: it has gone before it answered")
        if type(answer) is not dict:
            raise AvmmError(f"{self._path}: no control socket of avmm's")
        return answer

    def ask(
        self, command: str, on_event: Callable[[Answer], object] = _ignore, **arguments: Any
    ) -> Answer:
        """The answer to `command`, result or error; arguments that are None are left out.

        Ctrl-C has it given up, and the answer then says what has become of it.
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        request = json.dumps({"command": command, **given}).encode() + b"\n"
        try:
            self._socket.sendall(request)
            return self._answer(on_event)
        except KeyboardInterrupt:
            self._socket.shutdown(socket.SHUT_WR)
            return self._answer(_ignore)
        except OSError as error:
            raise AvmmError(f"{self._path}: {error.strerror}") from None

    def _answer(self, on_event: Callable[[Answer], object]) -> Answer:
        while True:
            answer = self._next()
            if "event" not in answer:
                return answer
            on_event(answer)


def result(answer: Answer, path: Path, given_up: str = "given up") -> Answer:
    """Of an answer; ends the command, and says why, where there is none."""
    if "error" not in answer:
        return dict(answer["result"])
    kind, text = answer.get("kind"), answer["error"]
    if kind == "Cancelled":
        click.echo(f"avmm: {given_up}", err=True)
        sys.exit(128 + signal.SIGINT)
    if kind == "HandOverUnknownError":
        click.echo(f"avmm: {text}", err=True)
        click.echo(f"avmm: to decide: avmm ctl {path} settle here, or there", err=True)
        sys.exit(UNKNOWN)
    raise (ConfigError if kind in ("ConfigError", "RequestError") else AvmmError)(text)


def _seconds(
    context: click.Context, parameter: click.Parameter, value: float | None
) -> float | None:
    """More than none, and not for ever."""
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"{value:g}: expected seconds, above 0")
    return value


DEADLINE = click.option(
    "--deadline",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    help="Give up where the guest does not come to a standstill by then.",
)


@click.group()
@click.argument("path", type=PATH)
@click.pass_context
def command(context: click.Context, path: Path) -> None:
    """Steer the guest whose control socket is at PATH (`--control unix:PATH`)."""
    context.obj = Path(str(path).removeprefix("unix:"))


@command.command("status")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def status(path: Path, as_json: bool) -> None:
    """Tell what the guest is and does."""
    told = result(Client(path).ask("status"), path)
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    click.echo(f"{told['state']}: {_state(told)}")


def _state(told: Answer) -> str:
    from avmm.cli.progress import size  # noqa: PLC0415

    parts = [f"{told['cpus']} vCPU{'s' * (told['cpus'] > 1)}", f"{size(told['memory'])} of RAM"]
    parts.append(f"process {told['pid']}")
    holders = [f"{who} ({n})" for who, n in told["pauses"].items() if n]
    if holders:
        parts.append(f"paused by {' and '.join(holders)}")
    if told["migration"]:
        moving = told["migration"]
        parts.append(f"on its way to {moving['target']}, round {moving.get('round', 0)}")
    if told["unsettled"]:
        parts.append(told["unsettled"])
    return ", ".join(parts)


@command.command("pause")
@DEADLINE
@click.pass_obj
def pause(path: Path, deadline: float | None) -> None:
    """Let the guest stand still until `resume`.

    Pauses count: it runs on when each is undone, and that of Ctrl-A p, too.
    """
    answer = Client(path).ask("pause", deadline=deadline)
    _say_pauses(result(answer, path, "the pause was given up, the guest runs on"))


@command.command("resume")
@click.pass_obj
def resume(path: Path) -> None:
    """Undo one `pause`."""
    _say_pauses(result(Client(path).ask("resume"), path))


def _say_pauses(told: Answer) -> None:
    holders = [f"{who} ({n})" for who, n in told["pauses"].items() if n]
    click.echo(f"paused by {' and '.join(holders)}" if holders else "running")


@command.command("snapshot")
@click.argument("file", type=PATH)
@DEADLINE
@click.pass_obj
def snapshot(path: Path, file: Path, deadline: float | None) -> None:
    """Write the guest to FILE, for `avmm restore`; it runs on.

    What its disks hold is not in FILE: pause the guest and copy them as well, where they are
    written.
    """
    from avmm.cli.progress import seconds, shown, size  # noqa: PLC0415 - tqdm

    client, totals = Client(path), dict[int, int]()
    with shown() as progress:

        def on_event(event: Answer) -> None:
            total = totals.setdefault(event["round"], event["pages_left"])
            progress.show({**event, "pages_sent": total - event["pages_left"]})

        answer = client.ask("snapshot", on_event, file=str(file.absolute()), deadline=deadline)
    told = result(answer, path, f"given up: {file} is as it was, and the guest runs on")
    on_disk = file.stat().st_blocks * 512
    click.echo(f"{file}: {size(on_disk)} on disk, in {seconds(told['seconds'])}")


@command.command("migrate", short_help="Hand the guest over to an `avmm receive`.")
@click.argument("target", metavar="unix:PATH|tcp:HOST:PORT")
@click.option("--bandwidth", metavar="SIZE", help="At most so many bytes a second, like 100M.")
@click.option(
    "--downtime",
    type=float,
    callback=_seconds,
    metavar="SECONDS",
    help="How long the guest may stand still.  [default: 0.1]",
)
@DEADLINE
@targets.tls_options
@click.option("--report", type=PATH, metavar="FILE.png", help="Draw a picture of it.")
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
    report: Path | None,
) -> None:
    """Hand the running guest over to the `avmm receive` at unix:PATH or tcp:HOST:PORT.

    Ctrl-C gives it up, and the guest stays. Ends with status 3 where the guest was handed over and
    no answer came: then it stands still here until you `settle` it.
    """
    from avmm.cli.progress import seconds, shown, size  # noqa: PLC0415 - tqdm
    from avmm.cli.timeline import Timeline, demand  # noqa: PLC0415

    to = Target.parse(target)
    if to.kind == "unix":
        to = Target("unix", path=str(Path(to.path).absolute()))
    tls = targets.tls(to, tls_cert, tls_key, tls_ca)
    if tls is not None:
        tls.context(server=False)  # what is wrong with the files is said by who was given them
    rate = None if bandwidth is None else parse_size(bandwidth)
    if report is not None:
        demand(report)
    client, timeline = Client(path), Timeline(str(to))
    with shown() as progress:

        def on_event(event: Answer) -> None:
            progress.show(event)
            timeline.add(event)

        answer = client.ask(
            "migrate",
            on_event,
            target=str(to),
            bandwidth=rate,
            downtime=downtime,
            deadline=deadline,
            tls=tls and {n: str(p.absolute()) for n, p in vars(tls).items()},
        )
    if report is not None:
        timeline.draw(report, answer.get("result"), answer.get("error", ""))
    told = result(answer, path, "the migration was given up, the guest stays")
    click.echo(
        f"the guest has moved to {told['target']}: {size(told['bytes_sent'])} in "
        f"{seconds(told['total'])}, {told['rounds']} rounds, downtime "
        f"{seconds(told['downtime'])}"
    )


@command.command("settle", short_help="Say where a guest runs that nobody has heard of.")
@click.argument("where", type=click.Choice(["here", "there"]))
@click.pass_obj
def settle(path: Path, where: str) -> None:
    """Say where a guest runs that was handed over without an answer.

    there: it runs at the destination; it is ended here. here: it certainly does not run there and
    never will; it runs on here. A guest that runs on both sides destroys its disks.
    """
    result(Client(path).ask("settle", runs=where), path)
    click.echo("the guest runs on here" if where == "here" else "the guest is ended here")


@command.command("stop")
@click.pass_obj
def stop(path: Path) -> None:
    """End the guest, as if its power had gone."""
    result(Client(path).ask("stop"), path)
    click.echo("the guest has ended")
