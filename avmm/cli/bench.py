"""`avmm bench`: measurements, always as ratios to a baseline in the same run."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click
import trio

from avmm.bench import exits as bench_exits


@click.group()
def command() -> None:
    """Measure, always as a ratio to a baseline in the same run."""


@command.command()
@click.option(
    "--json", "as_json", is_flag=True, help="A list of objects: case, us, raw_us, ratio."
)
@click.option("--count", type=click.IntRange(10), default=10_000, show_default=True, help="Exits.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def exits(as_json: bool, count: int, rounds: int) -> None:
    """What an exit costs, as a ratio to a loop around KVM_RUN in C."""
    # The bar goes to standard error, and only to a terminal: the result can be piped.
    with click.progressbar(
        length=bench_exits.steps(rounds), label="measuring", file=sys.stderr
    ) as bar:
        rows = trio.run(bench_exits.measure, count, rounds, lambda: bar.update(1))
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        click.echo("\n".join(bench_exits.table(rows)))
