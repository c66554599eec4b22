"""A process that does nothing but sleep, and notes how late it was woken.

    python -m avmm.bench.ticker

For each line of standard input it prints the longest lateness since the line before, in seconds.
What makes it late is the host, not avmm: it shares only the cores with the measured program.
"""

from __future__ import annotations

import os
import select
import time
from typing import Final

TICK: Final = 0.001
"""Seconds from one look at the clock to the next."""


def main() -> None:
    """Tick until the end of standard input."""
    worst = 0.0
    while True:
        before = time.perf_counter()
        asked, _, _ = select.select([0], [], [], TICK)
        if not asked:
            worst = max(worst, time.perf_counter() - before - TICK)
            continue
        if not os.read(0, 1):
            return
        os.write(1, f"{worst}\n".encode())
        worst = 0.0


if __name__ == "__main__":
    main()
