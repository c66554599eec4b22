"""How long `avmm run` takes from its start to the bundled guest's prompt, compared with a Python
that only imports trio. Both are commands, in turn, and the time includes the interpreter's start.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

from avmm.bench.row import BenchRow, medians
from avmm.bench.shell import PROMPT
from avmm.errors import AvmmError

_RUN: Final = [sys.executable, "-m", "avmm", "run"]
_BARE: Final = [sys.executable, "-c", "import trio"]


def measure(rounds: int, progress: Callable[[], None]) -> list[BenchRow]:
    """The one case. Blocks."""
    pairs = []
    for _ in range(rounds):
        begin = time.perf_counter()
        subprocess.run(_BARE, check=True)
        bare = time.perf_counter() - begin
        progress()
        pairs.append((_to_prompt() * 1e6, bare * 1e6))
        progress()
    return [BenchRow("avmm run, to its prompt", *medians(pairs))]


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return 2 * rounds


def _to_prompt() -> float:
    """In seconds. The guest ends with its input."""
    begin = time.perf_counter()
    with subprocess.Popen(_RUN, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as command:
        assert command.stdin is not None
        assert command.stdout is not None
        said = b""
        while PROMPT not in said:
            more = os.read(command.stdout.fileno(), 1 << 16)
            if not more:
                raise AvmmError(f"`avmm run` printed {said!r}; expected its guest's prompt")
            said += more
        took = time.perf_counter() - begin
        command.stdin.close()
        command.stdout.read()
    return took
