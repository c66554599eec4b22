"""`avmm bench engine`: the cases, what they are compared with, and what is said where there is
nothing to compare them with."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import AVMM, PROMPT, avmm
from support.images import BzImage

from avmm import arch, guests
from avmm.bench import engine, exits
from avmm.bench.row import EngineRow
from avmm.config import MachineConfig
from avmm.devices.base import Device
from avmm.engine import KVM, EngineUnavailable, software
from avmm.errors import AvmmError

SHORT = ("--rounds", "1", "--count", "20", "--pauses", "10")
CMDLINE = "kind=pio op=write width=1 port=0xe0 ring=0 count=10 warmup=1"
KEYS = {"case", "baseline", "us", "raw_us", "ratio", "wanted", "why"}
EXITS = [f"{kind} ring{ring} at once" for kind in ("pio", "mmio") for ring in (0, 3)]

HAS_QEMU = shutil.which(engine.QEMU) is not None


@pytest.fixture(autouse=True)
def there_is_a_software_engine() -> None:
    try:
        software(arch.host()).close()
    except EngineUnavailable as error:
        pytest.skip(str(error))


def guest(name: str = "exits") -> engine.Guest:
    return engine.Guest(guests.path(name), None, CMDLINE, "32M")


def measure(kernel: engine.Guest | None, stock: engine.Guest | None) -> list[EngineRow]:
    told: list[None] = []
    rows = engine.measure(kernel, stock, 20, 10, 1, lambda: told.append(None))
    assert len(told) == engine.steps(kernel, stock, 1)
    return rows


@pytest.mark.usefixtures("kvm")
def test_each_case_is_compared_with_its_baselines() -> None:
    kernel = [str(guests.path("exits")), "--cmdline", CMDLINE]
    done = avmm("bench", "engine", *kernel, *SHORT, "--json")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [(row["case"], row["baseline"], row["wanted"]) for row in rows] == [
        ("kernel to its end", "KVM", 0.2),
        ("kernel to its end", "QEMU's TCG", 1.0),
        *((case, name, None) for case in EXITS for name in ("C on the engine", "KVM")),
        ("pause, 1 vCPU", "C on the engine", None),
    ]
    for row in rows:
        assert set(row) == KEYS
        if row["why"] is None:
            assert row["ratio"] == pytest.approx(row["us"] / row["raw_us"])
        else:
            assert row["raw_us"] is row["ratio"] is None
    assert all(row["why"] is None for row in rows if row["baseline"] == "C on the engine")


def test_a_stock_kernel_is_timed_up_to_its_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is the bundled shell, and the line is its prompt."""
    monkeypatch.setattr(engine, "_INIT", PROMPT.encode())
    row = measure(None, guest("shell"))[0]
    assert (row.case, row.baseline, row.wanted) == ("stock kernel to /init", "QEMU's TCG", 1.6)
    assert row.us > 0
    assert (row.ratio is None) == (not HAS_QEMU)


def test_without_qemu_there_is_no_ratio() -> None:
    kernel = [str(guests.path("exits")), "--cmdline", CMDLINE]
    done = subprocess.run(
        [*AVMM, "bench", "engine", *kernel, *SHORT],
        env={"PATH": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (row,) = (line for line in lines if line.startswith("kernel to its end      QEMU's TCG"))
    assert row.split()[-4:] == ["-", "-", "≤", "1.0"]
    told = "kernel to its end next to QEMU's TCG: qemu-system-x86_64 is not installed"
    assert any(line.startswith(told) for line in lines)
    assert max(map(len, lines[: 1 + 2 + 9])) <= 80


def test_without_kvm_there_is_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    served, command = exits.served, engine._avmm

    async def refuse(config: MachineConfig, kind: str, device: Device) -> float:
        if config.engine == KVM:
            raise AvmmError("there is none")
        return await served(config, kind, device)

    def run(name: str, guest: engine.Guest) -> list[str]:
        return ["sh", "-c", "echo no KVM >&2; exit 2"] if name == KVM else command(name, guest)

    monkeypatch.setattr(exits, "served", refuse)
    monkeypatch.setattr(engine, "_avmm", run)
    for row in measure(guest(), None):
        assert row.us > 0
        if row.baseline == "KVM":
            assert row.raw_us is row.ratio is None
            why = "sh ended with 2: no KVM" if "kernel" in row.case else "there is none"
            assert row.why == why
        elif row.baseline == "C on the engine":
            assert row.why is None


def test_a_guest_that_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_MOST_SECONDS", 0.5)
    with pytest.raises(AvmmError, match=r"not done in 0\.5 s; its last output is 'so far\\n'"):
        engine._us(["sh", "-c", "echo so far; exec sleep 30"])


def test_a_guest_that_never_says_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_INIT", b"never said")
    with pytest.raises(AvmmError, match="ended with"):
        measure(None, guest())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["/none"], "/none: cannot be opened"),
        ([str(guests.path("exits")), "--initrd", "/none"], "/none: cannot be opened"),
        (["--stock", "/none"], "/none: cannot be opened"),
        (["--stock", str(guests.path("exits")), "--stock-initrd", "/none"], "/none: cannot be op"),
        (["--initrd", "/none"], "--initrd /none: expected also KERNEL"),
        (["--stock-initrd", "/none"], "--stock-initrd /none: expected also --stock"),
        ([str(guests.path("exits")), "--memory", "x"], "--memory 'x'"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: list[str], told: str) -> None:
    done = avmm("bench", "engine", *given, *SHORT)
    assert done.returncode == 2
    assert told in done.stderr
    assert not done.stdout


def test_a_kernel_is_unpacked_for_those_who_cannot(tmp_path: Path) -> None:
    elf, kernel = guests.path("exits").read_bytes(), tmp_path / "kernel"
    bzimage = bytes(BzImage(gzip.compress(elf)))
    for packed in (elf, gzip.compress(elf), bzimage, gzip.compress(bzimage)):
        kernel.write_bytes(packed)
        assert arch.host().unpacked_kernel(kernel) == elf
