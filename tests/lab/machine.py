"""One run of L1: QEMU with a payload, its console, and lines that it sends while it runs."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.cache import LabError
from lab.debian import NEEDED, demand

KINDS: Final = ("stock", "newer", "newest", "proposing")
BOOT_SECONDS: Final = 90
"""After which a boot that has said nothing is given up, once."""
SILENT_SECONDS: Final = 180
"""After which a machine that has sent nothing, no sign of life either, is given up."""
_PR_SET_PDEATHSIG: Final = 1
_POLL_SECONDS: Final = 0.1
# With two CPUs, each a thread of its own, QEMU (10.0 too) now and then finds no page where the
# tables of L1's guest, which nobody has touched, have one, right after a VMRUN: the guest ends by
# a triple fault. That ended 19 of some 1,600 short runs of a guest on a disk; with one CPU none of
# 510, and none of 394 with two in one thread (thread=single), where a Linux takes minutes to boot,
# for each CPU waits up to 0.1 s for the other.
_MACHINE: Final = (
    "-machine", "pc,hpet=off", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt",
    "-m", "3G", "-nodefaults", "-display", "none", "-no-reboot",
)  # fmt: skip
_CMDLINE: Final = "console=ttyS0 quiet mitigations=off tsc=reliable panic=-1"


@dataclass(frozen=True)
class L1:
    """What a lab boots from."""

    kernel: Path
    initramfs: Path
    root: Path
    qemu: tuple[str, ...]
    """The beginning of its command."""
    cpus: int = 1


def prepare(kind: str, cpus: int = 1) -> L1:
    """Everything that a lab of this kind needs, built on first use. Raises `LabError`."""
    from lab import disk, emulator, initramfs  # noqa: PLC0415 - building needs more than running

    if kind not in KINDS:
        raise LabError(f"lab: {kind!r}: expected one of {', '.join(KINDS)}")
    demand(NEEDED)
    boot = initramfs.boot(kind)
    return L1(boot.kernel, boot.initramfs, disk.image(), emulator.command(), cpus)


class HungBoot(LabError):
    """L1 has not come up; this happens once in some forty times."""


class Lost(LabError):
    """L1 was at work, and has fallen silent or crashed."""


def run(
    l1: L1,
    payload: Path,
    seconds: float,
    on_line: Callable[[str], None] = lambda line: None,
    boot_seconds: float = BOOT_SECONDS,
) -> str:
    """Boot L1 with the tar `payload`, whose run.sh it executes; gives its console's text.

    Lines that it writes to /dev/ttyS1 are handed to `on_line` as they come. A boot that hangs
    is tried once more. Raises `LabError` where L1 has not ended after `seconds`, `Lost` where it
    sends nothing for long, or QEMU crashes.
    """
    try:
        return _run(l1, payload, seconds, on_line, boot_seconds)
    except HungBoot:
        return _run(l1, payload, seconds, on_line, boot_seconds)


def _run(
    l1: L1,
    payload: Path,
    seconds: float,
    on_line: Callable[[str], None],
    boot_seconds: float,
) -> str:
    with tempfile.TemporaryDirectory(prefix="avmm-lab-") as scratch:
        console, sent, said = (Path(scratch, name) for name in ("console", "sent", "said"))
        sent.touch()
        with said.open("wb") as err:  # TCG warns of each CPU feature that it lacks
            process = subprocess.Popen(
                _command(l1, payload, console, sent),
                stdin=subprocess.DEVNULL,
                stderr=err,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one call, of no Python state
            )
        lines = _Lines(sent, on_line)
        try:
            _wait(process, lines, seconds, boot_seconds)
        except LabError as error:
            raise type(error)(f"{error}; its console:\n{_text(console)[-3000:]}") from None
        finally:
            process.kill()
            process.wait()
            lines.read()
        status, text, warnings = process.returncode, _text(console), _text(said)[-1000:]
        if status > 0:
            raise LabError(f"lab: QEMU failed with status {status}: {warnings}")
        if status < 0:
            raise Lost(
                f"lab: QEMU was ended by signal {-status}: {warnings}\n"
                f"Its console:\n{text[-3000:]}"
            )
        return text


def _wait(
    process: subprocess.Popen[bytes], lines: _Lines, seconds: float, boot_seconds: float
) -> None:
    start = time.monotonic()
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            lines.read()
        passed = time.monotonic() - start
        if passed > boot_seconds and not lines.count:
            raise HungBoot(f"lab: L1 has not come up after {boot_seconds:.0f} s")
        if passed > seconds:
            raise LabError(f"lab: L1 has not ended after {seconds:.0f} s")
        if lines.count and time.monotonic() - lines.last > SILENT_SECONDS:
            raise Lost(f"lab: L1 has sent nothing for {SILENT_SECONDS} s")


class _Lines:
    """The lines that L1 has sent, each once it is whole."""

    def __init__(self, path: Path, on_line: Callable[[str], None]) -> None:
        self._path = path
        self._on_line = on_line
        self._at = 0
        self._rest = b""
        self.count = 0
        self.last = 0.0
        """When the last one came, on the monotonic clock."""

    def read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        self._at += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self.count += 1
            self.last = time.monotonic()
            self._on_line(line.decode("utf-8", "replace"))


_libc: Final = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """However the tests end, SIGKILL included, no machine of theirs goes on."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _command(l1: L1, payload: Path, console: Path, sent: Path) -> Sequence[str]:
    return [
        *l1.qemu, *_MACHINE, "-smp", str(l1.cpus),
        "-kernel", str(l1.kernel), "-initrd", str(l1.initramfs), "-append", _CMDLINE,
        "-drive", f"file={l1.root},format=raw,if=virtio,snapshot=on",
        "-drive", f"file={payload},format=raw,if=virtio,readonly=on",
        "-chardev", f"file,id=console,path={console}", "-serial", "chardev:console",
        "-chardev", f"file,id=sent,path={sent}", "-serial", "chardev:sent",
    ]  # fmt: skip


def _text(console: Path) -> str:
    if not console.exists():
        return ""
    return console.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
