"""How long a guest takes from start to its own end: `avmm run` against QEMU's microvm.

Both are started as commands, in turn, with the same kernel, initrd, command line and memory, and
are timed until they exit. Of QEMU's machines, microvm starts the fastest.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from avmm.bench.qemu import QEMU, microvm
from avmm.bench.row import BenchRow
from avmm.errors import AvmmError, ConfigError
from avmm.outcome import CRASHED


def measure(
    kernel: Path,
    initrd: Path | None,
    cmdline: str,
    memory: str,
    rounds: int,
    progress: Callable[[], None],
) -> list[BenchRow]:
    """Return one row, with medians over `rounds` and the median of the rounds' own ratios.

    `progress` is called at each of `steps(rounds)` steps. Raises `ConfigError` if QEMU is not
    installed, and `AvmmError` if either of the two ends with a status other than 0. A guest may
    also end by a triple fault, as Linux does for `reboot=t`.
    """
    if shutil.which(QEMU) is None:
        raise ConfigError(f"{QEMU} is not installed (Debian: apt-get install qemu-system-x86)")
    more = ["--initrd", str(initrd)] if initrd else []
    options = ["--cmdline", cmdline, "--memory", memory]
    ours = [sys.executable, "-m", "avmm", "run", str(kernel), *more, *options]
    with tempfile.NamedTemporaryFile() as plain:
        plain.write(_gunzipped(kernel))
        plain.flush()
        more = ["-initrd", str(initrd)] if initrd else []
        theirs = [QEMU, *microvm(), "-kernel", plain.name, *more, "-append", cmdline, "-m", memory]
        pairs = []
        for _ in range(rounds):
            base = _seconds(theirs)
            progress()
            pairs.append((_seconds(ours), base))
            progress()
    ratio = median(us / base for us, base in pairs)
    return [
        BenchRow(
            f"{kernel.name} to its end",
            median(us for us, _ in pairs) * 1e6,
            median(base for _, base in pairs) * 1e6,
            ratio,
        )
    ]


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return 2 * rounds


def _gunzipped(kernel: Path) -> bytes:
    try:
        data = kernel.read_bytes()
    except OSError as error:
        raise ConfigError(f"{kernel}: cannot be read: {error.strerror}") from None
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode not in (0, CRASHED):
        raise AvmmError(f"{command[0]} ended with {done.returncode}: {done.stderr[-500:]!r}")
    return seconds
