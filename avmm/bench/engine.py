"""What the software engine costs, next to this host's KVM, to QEMU's emulator (TCG), and to loops
in C on the same engine.

- A kernel, from the command's start to the guest's own end: next to KVM, and to QEMU's microvm.
- A stock kernel, to the moment at which it starts `/init`: next to QEMU's microvm.
- An exit that a device answers at once: next to a loop in C on the engine, and to KVM.
- A pause of one vCPU: next to a kick in C on the engine.

All run the same files. Kernels are unpacked once, because QEMU takes only ELF files, and all enter
them by PVH. Each round measures the baselines first. The report gives medians over the rounds, and
the median of the rounds' own ratios. What has no baseline here, or a baseline that fails, is
reported without a ratio and with the reason.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Final

import trio

from avmm import arch
from avmm.bench import exits, pause
from avmm.bench.qemu import MICROVM_TCG, QEMU
from avmm.bench.row import EngineRow, medians
from avmm.boot.image import open_image
from avmm.engine import KVM, SOFT
from avmm.errors import AvmmError
from avmm.outcome import CRASHED
from avmm.parts import build, dismantle

LOOP: Final = "C on the engine"
KVMS: Final = "KVM"
TCG: Final = "QEMU's TCG"

STOCK_CMDLINE: Final = "console=ttyS0 panic=-1"
"""What `avmm image build` gives its guests."""
_INIT: Final = b"Run /init as init process"
_MOST_SECONDS: Final = 120
_KINDS: Final = tuple((kind, ring) for kind in ("pio", "mmio") for ring in (0, 3))


@dataclass(frozen=True)
class Guest:
    """A kernel to measure with. `memory` is a size as options give it."""

    kernel: Path
    initrd: Path | None
    cmdline: str
    memory: str


@dataclass
class _Way:
    """One way to do what a row measures, and what it took in each round."""

    name: str
    measure: Callable[[], float]
    """Returns microseconds. Raises `AvmmError`."""
    wanted: float | None = None
    why: str | None = None
    """Why it cannot be measured, or not any more."""
    us: list[float | None] = field(default_factory=list)


def measure(
    kernel: Guest | None,
    stock: Guest | None,
    count: int,
    pauses: int,
    rounds: int,
    progress: Callable[[], None],
) -> list[EngineRow]:
    """All cases for which there is a guest. `count` is a number of exits.

    `progress` is called at each of `steps` steps. Raises `ConfigError` if a file cannot be read,
    and `AvmmError` if the software engine fails.
    """
    rows: list[EngineRow] = []
    with _unpacked(kernel) as started, _unpacked(stock) as stocked:
        if started is not None:
            kvm = _Way(KVMS, lambda: _us(_avmm(KVM, started)), wanted=0.2)
            tcg = _qemu(lambda: _us(_tcg(started)), 1.0)
            ours = _Way("kernel to its end", lambda: _us(_avmm(SOFT, started)))
            rows += _compare(ours, [kvm, tcg], rounds, progress)
        if stocked is not None:
            # avmm tells Linux the TSC's frequency (kvmclock). QEMU's TCG lets Linux measure it,
            # which fails on a busy host: then Linux has no clock, and hangs.
            known = replace(stocked, cmdline=f"{stocked.cmdline} tsc_early_khz={trio.run(_khz)}")
            tcg = _qemu(lambda: _us(_tcg(known), _INIT), 1.6)
            ours = _Way("stock kernel to /init", lambda: _us(_avmm(SOFT, stocked), _INIT))
            rows += _compare(ours, [tcg], rounds, progress)
    for kind, ring in _KINDS:
        rows += _compare(*_exits(kind, ring, count), rounds, progress)
    ours = _Way("pause, 1 vCPU", lambda: trio.run(pause.pauses, 1, pauses, SOFT))
    kicks = _Way(LOOP, lambda: trio.run(pause.kicks, pauses, SOFT))
    rows += _compare(ours, [kicks], rounds, progress)
    return rows


def steps(kernel: Guest | None, stock: Guest | None, rounds: int) -> int:
    """How often `measure` calls `progress`."""
    of_boots = (3 if kernel is not None else 0) + (2 if stock is not None else 0)
    return rounds * (of_boots + 3 * len(_KINDS) + 2)


def _compare(
    ours: _Way, baselines: Sequence[_Way], rounds: int, progress: Callable[[], None]
) -> list[EngineRow]:
    """Each row is `ours`, which must not fail, next to one of the baselines."""
    for _ in range(rounds):
        for base in baselines:
            base.us.append(_tried(base))
            progress()
        ours.us.append(ours.measure())
        progress()
    rows = []
    for base in baselines:
        pairs = [(us, raw) for us, raw in zip(ours.us, base.us, strict=True) if us is not None]
        us, raw_us, ratio = medians(pairs)
        rows.append(EngineRow(ours.name, us, raw_us, ratio, base.name, base.wanted, base.why))
    return rows


def _tried(base: _Way) -> float | None:
    if base.why is None:
        try:
            return base.measure()
        except AvmmError as error:
            base.why = str(error)
    return None


# -- exits --------------------------------------------------------------------------------------


def _exits(kind: str, ring: int, count: int) -> tuple[_Way, list[_Way]]:
    def served(engine: str) -> float:
        config = exits.config(kind, ring, count, engine)
        return trio.run(exits.served, config, kind, exits.AtOnce())

    def raw() -> float:
        return trio.run(exits.measure_raw, exits.config(kind, ring, count, SOFT))

    ours = _Way(f"{kind} ring{ring} at once", lambda: served(SOFT))
    return ours, [_Way(LOOP, raw), _Way(KVMS, lambda: served(KVM))]


# -- boots --------------------------------------------------------------------------------------


@contextmanager
def _unpacked(guest: Guest | None) -> Iterator[Guest | None]:
    """The guest with an unpacked kernel. Raises `ImageError` if a file cannot be read."""
    if guest is None:
        yield None
        return
    if guest.initrd is not None:
        open_image(guest.initrd).close()
    with tempfile.NamedTemporaryFile(prefix="avmm-bench-") as plain:
        plain.write(arch.host().unpacked_kernel(guest.kernel))
        plain.flush()
        yield replace(guest, kernel=Path(plain.name))


async def _khz() -> int:
    """The frequency of the guest's TSC, which is the host's."""
    parts = await build(exits.config("pio", 0, 1, SOFT))
    try:
        return parts.clock_khz
    finally:
        with trio.CancelScope(shield=True):
            await dismantle(parts)


def _avmm(engine: str, guest: Guest) -> list[str]:
    files = [str(guest.kernel), *(["--initrd", str(guest.initrd)] if guest.initrd else [])]
    options = ["--cmdline", guest.cmdline, "--memory", guest.memory]
    return [sys.executable, "-m", "avmm", "run", "--engine", engine, *files, *options]


def _tcg(guest: Guest) -> list[str]:
    files = ["-kernel", str(guest.kernel)]
    files += ["-initrd", str(guest.initrd)] if guest.initrd else []
    return [QEMU, *MICROVM_TCG, *files, "-append", guest.cmdline, "-m", guest.memory]


def _qemu(measure: Callable[[], float], wanted: float) -> _Way:
    why = None
    if shutil.which(QEMU) is None:
        why = f"{QEMU} is not installed (Debian: apt-get install qemu-system-x86)"
    return _Way(TCG, measure, wanted, why)


def _us(command: Sequence[str], mark: bytes | None = None) -> float:
    """How many microseconds a command takes until it has printed `mark`, or else to its end. Also
    a triple fault is an end, as Linux makes it for `reboot=t`.
    """
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        try:
            said = _read(process, mark, start + _MOST_SECONDS)
            if mark is None or mark not in said:
                process.wait(_MOST_SECONDS)
            seconds = time.perf_counter() - start
        finally:
            process.kill()
        if mark is None and process.returncode in (0, CRASHED):
            return seconds * 1e6
        if mark is not None and mark in said:
            return seconds * 1e6
        raise AvmmError(_failure(command, process.returncode, errors, said))


def _read(process: subprocess.Popen[bytes], mark: bytes | None, deadline: float) -> bytes:
    """All that it prints, up to the mark."""
    assert process.stdout is not None
    said = b""
    while mark is None or mark not in said:
        left = max(0.0, deadline - time.perf_counter())
        if not select.select([process.stdout], [], [], left)[0]:
            tail = said[-200:].decode(errors="replace")
            raise AvmmError(f"it is not done in {_MOST_SECONDS} s; its last output is {tail!r}")
        more = os.read(process.stdout.fileno(), 1 << 16)
        if not more:
            break
        said += more
    return said


def _failure(command: Sequence[str], status: int, errors: IO[bytes], said: bytes) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").splitlines()
    first = next((line for line in lines if line.strip()), "")
    told = first or repr(said[-200:].decode(errors="replace"))
    name = "avmm run" if command[0] == sys.executable else command[0]
    return f"{name} ended with {status}: {told}"
