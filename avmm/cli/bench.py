"""`avmm bench`: measures avmm, always compared with a baseline from the same run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import click
import trio

from avmm.bench import boot as bench_boot
from avmm.bench import density as bench_density
from avmm.bench import engine as bench_engine
from avmm.bench import exits as bench_exits
from avmm.bench import fork as bench_fork
from avmm.bench import many as bench_many
from avmm.bench import migration as bench_migration
from avmm.bench import pause as bench_pause
from avmm.bench import snapshot as bench_snapshot
from avmm.bench import stall as bench_stall
from avmm.bench import start as bench_start
from avmm.bench import virtio as bench_virtio
from avmm.bench import whole as bench_whole
from avmm.bench.row import BenchRow, FigureRow, ManyRow, SizeRow, SpeedRow, StallRow
from avmm.cli import picture
from avmm.cli.plot import draw
from avmm.errors import ConfigError
from avmm.options import parse_size

_Command = TypeVar("_Command", bound=Callable[..., object])
Measure = Callable[[Callable[[], None]], Sequence[BenchRow | SizeRow | SpeedRow]]


def _json(keys: str) -> Callable[[_Command], _Command]:
    help_ = f"Print a list of JSON objects with {keys}."
    return click.option("--json", "as_json", is_flag=True, help=help_)


JSON = _json("case, us, raw_us and ratio")
ROUNDS = click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)

MEMORY = click.option("--memory", default="512M", show_default=True, metavar="SIZE")


@click.group()
def command() -> None:
    """Measure avmm, always compared with a baseline from the same run."""


@command.command()
@JSON
@ROUNDS
@click.option("--count", type=click.IntRange(10), default=10_000, show_default=True, help="Exits.")
def exits(as_json: bool, count: int, rounds: int) -> None:
    """What an exit costs, as a ratio to a loop around KVM_RUN in C."""
    _run(
        lambda progress: trio.run(bench_exits.measure, count, rounds, progress),
        bench_exits.steps(rounds),
        as_json,
    )


@command.command()
@_json("case, per_second, raw_per_second and ratio")
@ROUNDS
@click.option("--count", type=click.IntRange(10), default=20_000, show_default=True, help="Exits.")
@click.option("--guests", type=click.IntRange(1), default=4, show_default=True)
@click.option("--idle", type=click.IntRange(0), default=100, show_default=True, help="Guests.")
def many(as_json: bool, rounds: int, count: int, guests: int, idle: int) -> None:
    """How fast several guests in one program exit, as a ratio to programs of their own.

    Also, how fast one exits beside idle ones, as a ratio to its speed alone.
    """
    with _progress(bench_many.steps(rounds)) as progress:
        rows = trio.run(bench_many.measure, count, guests, idle, rounds, progress)
    if as_json:
        _print_json(rows)
        return
    click.echo(f"{'case':42} {'exits/s':>9} {'raw':>9} {'× raw':>7}")
    for row in rows:
        click.echo(
            f"{row.case:42} {row.per_second:9.0f} {row.raw_per_second:9.0f} {row.ratio:7.2f}"
        )


@command.command()
@JSON
@ROUNDS
@click.option("--count", type=click.IntRange(10), default=200, show_default=True, help="Pauses.")
def pause(as_json: bool, count: int, rounds: int) -> None:
    """The time until all vCPUs are parked, as a ratio to a kick in C."""
    _run(
        lambda progress: trio.run(bench_pause.measure, count, rounds, progress),
        bench_pause.steps(rounds),
        as_json,
    )


@command.command()
@click.argument("kernel", type=click.Path(path_type=Path))
@click.option("--initrd", type=click.Path(path_type=Path))
@click.option("--cmdline", default="", metavar="TEXT")
@click.option("--memory", default="64M", show_default=True, metavar="SIZE")
@JSON
@ROUNDS
def boot(
    kernel: Path, initrd: Path | None, cmdline: str, memory: str, as_json: bool, rounds: int
) -> None:
    """The time from a guest's start to its end, as a ratio to QEMU's.

    KERNEL must be a guest that ends by itself. QEMU runs it on its microvm.
    """

    def measure(progress: Callable[[], None]) -> list[BenchRow]:
        return bench_boot.measure(kernel, initrd, cmdline, memory, rounds, progress)

    _run(measure, bench_boot.steps(rounds), as_json)


@command.command()
@click.argument("kernel", required=False, type=click.Path(path_type=Path))
@click.option("--initrd", type=click.Path(path_type=Path))
@click.option("--cmdline", default="", metavar="TEXT")
@click.option("--memory", default="64M", show_default=True, metavar="SIZE")
@click.option(
    "--stock",
    type=click.Path(path_type=Path),
    metavar="KERNEL",
    help="A distribution's kernel, such as that of `avmm image build`.",
)
@click.option("--stock-initrd", type=click.Path(path_type=Path))
@click.option(
    "--stock-cmdline", default=bench_engine.STOCK_CMDLINE, show_default=True, metavar="TEXT"
)
@click.option("--stock-memory", default="256M", show_default=True, metavar="SIZE")
@click.option("--count", type=click.IntRange(10), default=10_000, show_default=True, help="Exits.")
@click.option("--pauses", type=click.IntRange(10), default=200, show_default=True)
@_json("case, baseline, us, raw_us, ratio, wanted and why")
@ROUNDS
def engine(
    kernel: Path | None,
    initrd: Path | None,
    cmdline: str,
    memory: str,
    stock: Path | None,
    stock_initrd: Path | None,
    stock_cmdline: str,
    stock_memory: str,
    count: int,
    pauses: int,
    as_json: bool,
    rounds: int,
) -> None:
    """The software engine, as a ratio to KVM, QEMU's TCG and loops in C.

    KERNEL, a guest that ends by itself, is timed from its start to its end. The stock kernel is
    timed until it starts /init. QEMU runs both on its microvm. Exits and pauses are always
    measured. What cannot be measured on this host is told below the table.
    """
    own = _guest(kernel, initrd, cmdline, memory, "--initrd", "KERNEL")
    given = _guest(stock, stock_initrd, stock_cmdline, stock_memory, "--stock-initrd", "--stock")
    with _progress(bench_engine.steps(own, given, rounds)) as progress:
        rows = bench_engine.measure(own, given, count, pauses, rounds, progress)
    if as_json:
        _print_json(rows)
        return
    head = f"{'case':22} {'next to':15} {'µs':>10} {'raw µs':>10} {'× raw':>7} {'wanted':>7}"
    click.echo(head)
    for row in rows:
        raw = "-" if row.raw_us is None else f"{row.raw_us:.1f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        wanted = "-" if row.wanted is None else f"≤ {row.wanted:.1f}"
        click.echo(
            f"{row.case:22} {row.baseline:15} {row.us:10.1f} {raw:>10} {ratio:>7} {wanted:>7}"
        )
    for row in rows:
        if row.why is not None:
            click.echo(f"{row.case} next to {row.baseline}: {row.why}")


def _guest(
    kernel: Path | None, initrd: Path | None, cmdline: str, memory: str, option: str, needed: str
) -> bench_engine.Guest | None:
    if kernel is None:
        if initrd is not None:
            raise ConfigError(f"{option} {initrd}: expected also {needed}")
        return None
    parse_size(memory, "--memory" if needed == "KERNEL" else "--stock-memory")
    return bench_engine.Guest(kernel, initrd, cmdline, memory)


@command.command()
@JSON
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--count", type=click.IntRange(10), default=10_000, show_default=True, help="Requests."
)
def virtio(as_json: bool, count: int, rounds: int) -> None:
    """Notifications, console and disk, as a ratio to QEMU's devices.

    The same guest runs on both.
    """
    _run(
        lambda progress: bench_virtio.measure(count, rounds, progress),
        bench_virtio.steps(rounds),
        as_json,
    )


@command.command()
@JSON
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@MEMORY
def migration(as_json: bool, rounds: int, memory: str) -> None:
    """Live migration over a unix socket, as a ratio to QEMU's.

    Both move the same guest.
    """
    size = parse_size(memory, "--memory")
    _run(
        lambda progress: trio.run(bench_migration.measure, size, rounds, progress),
        bench_migration.steps(rounds),
        as_json,
    )


@command.command()
@JSON
@ROUNDS
@MEMORY
@click.option("--clones", type=click.IntRange(1), default=50, show_default=True)
def snapshot(as_json: bool, rounds: int, memory: str, clones: int) -> None:
    """Snapshots, restores and clones, as a ratio to QEMU's or a boot.

    Writing a snapshot is compared with QEMU, and restores and clones with a boot.
    """
    size = parse_size(memory, "--memory")
    _run(
        lambda progress: trio.run(bench_snapshot.measure, size, rounds, clones, progress),
        bench_snapshot.steps(rounds, clones),
        as_json,
    )


@command.command()
@JSON
@ROUNDS
def start(as_json: bool, rounds: int) -> None:
    """The time from `avmm run` to its prompt, as a ratio to Python's import of trio."""
    _run(
        lambda progress: bench_start.measure(rounds, progress),
        bench_start.steps(rounds),
        as_json,
    )


@command.command()
@_json("case, unit, ours, baseline and ratio")
@click.option("--guests", type=click.IntRange(1), default=100, show_default=True)
def density(as_json: bool, guests: int) -> None:
    """What an idle guest costs in CPU time, memory and descriptors (next to a bare VM's)."""
    with _progress(bench_density.steps(guests)) as progress:
        rows = trio.run(bench_density.measure, guests, progress)
    if as_json:
        _print_json(rows)
        return
    click.echo(f"{'case':24} {'ours':>8} {'bare':>8} {'× bare':>7}")
    for row in rows:
        bare = "-" if row.baseline is None else f"{row.baseline:.1f}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        click.echo(f"{row.case:24} {row.ours:8.1f} {bare:>8} {ratio:>7} {row.unit}".rstrip())


@command.command()
@JSON
@ROUNDS
@click.option("--clones", type=click.IntRange(1), default=50, show_default=True)
def fork(as_json: bool, rounds: int, clones: int) -> None:
    """Clones, one and many at once, as a ratio to the bare requests to KVM."""
    _run(
        lambda progress: trio.run(bench_fork.measure, clones, rounds, progress),
        bench_fork.steps(rounds),
        as_json,
    )


@command.command(name="all")
@_json("bench, case, unit, ours, baseline, ratio, least, most and is_noisy")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw the ratios, with matplotlib.",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print a Markdown table.")
@ROUNDS
@click.option("--exits", type=click.IntRange(10), default=10_000, show_default=True)
@click.option("--guests", type=click.IntRange(1), default=4, show_default=True)
@click.option("--idle", type=click.IntRange(1), default=100, show_default=True, help="Guests.")
@click.option("--clones", type=click.IntRange(1), default=50, show_default=True)
@click.option("--pauses", type=click.IntRange(1), default=200, show_default=True)
@click.option("--requests", type=click.IntRange(10), default=5_000, show_default=True)
@MEMORY
def whole(
    as_json: bool,
    plot: Path | None,
    as_markdown: bool,
    rounds: int,
    exits: int,
    guests: int,
    idle: int,
    clones: int,
    pauses: int,
    requests: int,
    memory: str,
) -> None:
    """Everything but boot, engine and stall, some rounds of it, with the spread of each ratio.

    A case whose rounds differ by more than a quarter is too noisy to tell. What is compared with
    QEMU has no ratio if QEMU is not installed.
    """
    if as_json and as_markdown:
        raise ConfigError("--json and --markdown: expected one of them")
    sizes = bench_whole.Sizes(
        exits=exits,
        guests=guests,
        idle=idle,
        clones=clones,
        pauses=pauses,
        requests=requests,
        memory=parse_size(memory, "--memory"),
    )
    if plot is not None:
        picture.demand(plot, "--plot")
    with _progress(bench_whole.steps(rounds, sizes)) as progress:
        rows = bench_whole.measure(rounds, sizes, progress)
    if plot is not None:
        draw(plot, rows)
    if as_json:
        _print_json(rows)
        return
    if as_markdown:
        click.echo("| | case | avmm | baseline | ratio | spread |\n|---|---|---|---|---|---|")
    else:
        head = f"{'bench':9} {'case':42} {'ours':>10} {'baseline':>10}"
        click.echo(f"{head} {'ratio':>6}  {'spread':13} unit")
    for row in rows:
        _print_whole(row, as_markdown)


def _print_whole(row: bench_whole.WholeRow, as_markdown: bool) -> None:
    ours = _number(row.ours)
    baseline = "-" if row.baseline is None else _number(row.baseline)
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    spread = "-" if row.least is None else f"{row.least:.2f} to {row.most:.2f}"
    noisy = "too noisy to tell" if row.is_noisy else ""
    if as_markdown:
        cells = [
            row.bench,
            row.case,
            f"{ours} {row.unit}",
            baseline if row.baseline is None else f"{baseline} {row.unit}",
            noisy or ratio,
            spread,
        ]
        click.echo(f"| {' | '.join(cells)} |")
        return
    line = f"{row.bench:9} {row.case:42} {ours:>10} {baseline:>10} {ratio:>6}  {spread:13}"
    click.echo(f"{line} {row.unit}{', ' if noisy else ''}{noisy}")


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 1000 else f"{figure:.1f}"


@command.command()
@click.option(
    "--kernel",
    type=click.Path(path_type=Path),
    help="A compressed kernel to boot, such as Debian's. Without this option, the bundled "
    "guest, compressed.",
)
@_json("case, ms, most_ms, blocked_ms and idle_ms")
@ROUNDS
@MEMORY
def stall(kernel: Path | None, as_json: bool, rounds: int, memory: str) -> None:
    """How long the program's other tasks wait while avmm works.

    avmm makes, moves and leaves guests. Those that are cloned, saved and moved have written to all
    of their memory. A task that sleeps a millisecond, over and over, notes how late it is woken.
    Each figure is its longest lateness: the median and the maximum over the rounds, minus the 99th
    percentile while nothing is done. "blocked" is the median without the time in which the thread
    waited for a core of a busy host. "beside" is the baseline: how late another process was, which
    only sleeps. What is late there is the host's.
    """
    size = parse_size(memory, "--memory")
    with _progress(bench_stall.steps(rounds)) as progress:
        rows = trio.run(bench_stall.measure, kernel, size, rounds, progress)
    if as_json:
        _print_json(rows)
        return
    click.echo(f"{'case':24} {'ms':>8} {'most ms':>8} {'blocked':>8} {'beside':>8} {'idle ms':>8}")
    for row in rows:
        blocked = "-" if row.blocked_ms is None else f"{row.blocked_ms:.1f}"
        click.echo(
            f"{row.case:24} {row.ms:8.1f} {row.most_ms:8.1f} {blocked:>8} {row.beside_ms:8.1f} "
            f"{row.idle_ms:8.1f}"
        )


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, shown only if that is a terminal. So the result can be
    piped.
    """
    with click.progressbar(length=steps, label="measuring", file=sys.stderr) as bar:
        yield lambda: bar.update(1)


def _print_json(
    rows: Sequence[
        BenchRow | FigureRow | ManyRow | SizeRow | SpeedRow | StallRow | bench_whole.WholeRow
    ],
) -> None:
    click.echo(json.dumps([asdict(row) for row in rows], indent=2))


def _run(measure: Measure, steps: int, as_json: bool) -> None:
    with _progress(steps) as progress:
        rows = measure(progress)
    if as_json:
        _print_json(rows)
        return
    click.echo(f"{'case':24} {'µs':>8} {'raw µs':>8} {'× raw':>7}")
    for row in rows:
        ours, raw = _values(row)
        has_no_baseline = raw is None or row.ratio is None
        compared = f"{'-':>8} {'-':>7}" if has_no_baseline else f"{raw:8.1f} {row.ratio:7.2f}"
        click.echo(f"{row.case:24} {ours:8.1f} {compared}")


def _values(row: BenchRow | SizeRow | SpeedRow) -> tuple[float, float | None]:
    if isinstance(row, SizeRow):
        return row.kib, row.raw_kib
    if isinstance(row, SpeedRow):
        return row.mib_per_second, row.raw_mib_per_second
    return row.us, row.raw_us
