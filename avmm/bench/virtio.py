"""What virtio requests cost: the bundled guest `rings` on avmm's devices, and on QEMU's.

The guest drives the rings itself by polling, and measures its requests with the TSC. QEMU's
microvm runs the same guest on its own devices with the same backend: consoles write to /dev/null,
and disks are a raw file in the page cache. If QEMU is not installed, there is no ratio.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from avmm import guests
from avmm.bench.qemu import QEMU, microvm
from avmm.bench.row import RateRow, medians
from avmm.devices.virtio.block import VirtioBlock
from avmm.devices.virtio.console import Console
from avmm.devices.virtio.port import Port
from avmm.disks import RawDisk
from avmm.errors import AvmmError
from avmm.machine import Machine
from avmm.parts.placing import virtio

_DISK_BYTES: Final = 64 << 20
_KIB: Final = 1024
_QEMU_SECONDS: Final = 600
_MODERN: Final = (
    # Without ACPI, QEMU names its virtio devices on the guest's command line.
    *("-machine", "acpi=off", "-global", "virtio-mmio.force-legacy=false", "-m", "64M"),
    *("-device", "isa-debug-exit"),
)


@dataclass(frozen=True)
class Case:
    """What the guest should do. `bytes` is the size of one request."""

    kind: str
    op: str
    bytes: int
    depth: int
    share: float = 1.0
    """The share of the `count` requests that this case makes. It is smaller for large requests,
    because they take longer.
    """

    @property
    def name(self) -> str:
        if self.kind == "notify":
            return "notify"
        return f"{self.kind} {self.op} {self.bytes // _KIB} KiB x{self.depth}"

    def cmdline(self, count: int) -> str:
        """The guest's command line."""
        count = max(1, int(count * self.share))
        return (
            f"kind={self.kind} op={self.op} bytes={self.bytes} depth={self.depth} "
            f"count={count} warmup={count // 10}"
        )


CASES: Final = (
    Case("notify", "write", 4 * _KIB, 1),
    Case("console", "write", 4 * _KIB, 8),
    Case("console", "write", 64 * _KIB, 8, 0.2),
    *(Case("block", op, 4 * _KIB, depth) for op in ("read", "write") for depth in (1, 16)),
    *(Case("block", op, 64 * _KIB, 4, 0.2) for op in ("read", "write")),
)


def measure(count: int, rounds: int, progress: Callable[[], None]) -> list[RateRow]:
    """All cases, `count` requests (fewer of large ones) in each of `rounds` rounds.

    The rows have medians over the rounds, and the median of the rounds' own ratios. `progress` is
    called at each of `steps(rounds)` steps. Raises `AvmmError` if a guest reports no result.
    """
    has_qemu = shutil.which(QEMU) is not None
    rows = []
    with tempfile.TemporaryDirectory(prefix="avmm-bench-") as folder:
        disk = Path(folder, "disk")
        disk.write_bytes(os.urandom(1 << 20) * (_DISK_BYTES >> 20))
        for case in CASES:
            pairs = []
            for _ in range(rounds):
                base = _theirs(case, count, disk) if has_qemu else None
                progress()
                cycles, khz = trio.run(_ours, case, count, disk)
                pairs.append((cycles / khz * 1000, None if base is None else base / khz * 1000))
                progress()
            us, raw_us, ratio = medians(pairs)
            rows.append(
                RateRow(
                    case.name,
                    us,
                    raw_us,
                    ratio,
                    1e6 / us,
                    0.0 if case.kind == "notify" else case.bytes / us,
                )
            )
    return rows


def steps(rounds: int) -> int:
    """How often `measure` calls `progress`."""
    return 2 * rounds * len(CASES)


async def _ours(case: Case, count: int, disk: Path) -> tuple[float, int]:
    """The cycles that a request takes on avmm, and the frequency of the TSC in kHz."""
    with closing(RawDisk(disk)) as backend, ExitStack() as stack:
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, null)
        port = Port("hvc0", console=True)
        model = VirtioBlock(backend) if case.kind == "block" else Console(port)
        async with (
            Machine(
                kernel=guests.path("rings"),
                devices=[virtio(model)],
                cmdline=case.cmdline(count),
                acpi=False,
            ) as vm,
            trio.open_nursery() as nursery,
        ):
            if case.kind != "block":
                nursery.start_soon(port.write_to, null)
            output = b"".join([data async for data in vm.console])
            nursery.cancel_scope.cancel()
            return _cycles(output), vm.tsc_khz


def _theirs(case: Case, count: int, disk: Path) -> float:
    """The cycles that a request takes on QEMU."""
    if case.kind == "block":
        devices = ["-drive", f"if=none,id=disk,file={disk},format=raw,cache=writeback"]
        devices += ["-device", "virtio-blk-device,drive=disk"]
    else:
        devices = ["-chardev", f"file,id=out,path={os.devnull}"]
        devices += ["-device", "virtio-serial-device,max_ports=1"]
        devices += ["-device", "virtconsole,chardev=out"]
    image = ["-kernel", str(guests.path("rings")), "-append", case.cmdline(count)]
    done = subprocess.run(
        [QEMU, *microvm(), *_MODERN, *image, *devices],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=_QEMU_SECONDS,
    )
    return _cycles(done.stdout)


def _cycles(output: bytes) -> float:
    match = re.search(rb"rings count=(\d+) bytes=\d+ errors=(\d+) cycles=(\d+)", output)
    if match is None or int(match[2]):
        raise AvmmError(f"the guest 'rings' printed no result without errors, only {output!r}")
    return int(match[3]) / int(match[1])
