"""The bundled shell counts on four channels at once while it goes from process to process: each
number comes once, in order, on each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.counting import SECTOR
from support.moving import END

pytestmark = [pytest.mark.lab, pytest.mark.usefixtures("kvm")]


def process(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "support.moving", *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def migrated(folder: Path, hops: int, step: int, timeout: int) -> None:
    disk, mine, other = folder / "disk", folder / "a", folder / "b"
    disk.write_bytes(bytes((hops * step + END) * SECTOR))
    both = [
        process("migrate", hops, step, disk, mine, other, "first"),
        process("migrate", hops, step, disk, other, mine),
    ]
    try:
        said = [one.communicate(timeout=timeout) for one in both]
    finally:
        for one in both:
            one.kill()
            one.communicate()
    assert [one.returncode for one in both] == [0, 0], [error[-3000:] for _, error in said]
    assert sorted(out for out, _ in said) == ["", f"ok {hops}\n"]


@pytest.mark.timeout(60)
def test_thirty_times_between_two_processes(tmp_path: Path) -> None:
    migrated(tmp_path, 30, 5, 55)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_times_between_two_processes(tmp_path: Path) -> None:
    migrated(tmp_path, 1000, 3, 590)


def through_snapshots(folder: Path, times: int, step: int) -> None:
    disk, last = folder / "disk", times * step + END
    disk.write_bytes(bytes(last * SECTOR))
    (folder / "last").write_text(str(last))
    for turn in range(times + 1):
        number = last if turn == times else (turn + 1) * step
        one = process("snapshot", number, disk, folder)
        _, error = one.communicate(timeout=60)
        assert one.returncode == 0, (turn, error[-3000:])


@pytest.mark.lab(long=True)
@pytest.mark.timeout(60)
def test_through_five_snapshots_each_in_a_new_process(tmp_path: Path) -> None:
    through_snapshots(tmp_path, 5, 17)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_through_two_hundred_snapshots_each_in_a_new_process(tmp_path: Path) -> None:
    through_snapshots(tmp_path, 200, 5)
