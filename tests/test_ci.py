"""`.ci/run`, with commands that only note that they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci/run"
PYTHON = """\
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; fi
if [ "$1 $2" = "-m lab" ]; then
    echo "prepare $3" >>"$NOTES"
    case " $LACKING " in *" $3 "*) exit 1;; esac
fi
"""
STUBS = {
    "stub-python": PYTHON,
    "python": PYTHON,
    "pip": "",
    "ruff": "",
    "mypy": "",
    "lint-imports": "",
    "apt-get": "",
    "id": 'echo "$USER_ID"',
    "avmm": "echo hi; exit 3",
    "pytest": """\
echo "pytest $*" >>"$NOTES"
case "$*" in tests/*) [ "$AVMM_ENGINE" = soft ]; exit;; esac
if [ -n "$STAYS" ] && [ -n "$*" ]; then
    echo "pytest $* has begun"
    exec 9>"$FIFOS/$*"
    echo >&9
    exec sleep 60
fi
case "$*" in *"$FAILING"*) echo "pytest $* has failed"; exit 1;; esac
""",
}
LAB = [
    "prepare stock",
    "prepare proposing",
    "prepare newer",
    "pytest --lab stock",
    "pytest --lab proposing tests/vcpu tests/cli/test_completion_report.py",
    "pytest --lab newer tests/vcpu/test_xen.py tests/cli/test_completion_report.py",
]


def prepare(folder: Path, **settings: str) -> tuple[Path, dict[str, str]]:
    """A copy of the script among such commands, and the environment to run it in."""
    stubs = folder / "stubs"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/sh\n{text}")
        (stubs / name).chmod(0o755)
    (folder / "tree/tests").mkdir(parents=True)
    (folder / "tree/.ci").mkdir()
    script = Path(shutil.copy(RUN, folder / "tree/.ci/run"))
    return script, os.environ | settings | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "PYTHON": "stub-python",
        "TMPDIR": str(folder),
        "NOTES": str(folder / "notes"),
        "FIFOS": str(folder),
    }


@pytest.mark.parametrize(
    ("user", "lacking", "failing", "status", "said"),
    [
        ("0", "", "none", 0, ""),
        ("0", "stock", "none", 1, "nothing has been tested on these KVMs: stock ==="),
        ("1", "stock newer", "none", 0, "nothing has been tested on these KVMs: stock newer ==="),
        ("1", "", "--lab stock", 1, "=== failed: pytest --lab ==="),
        ("1", "", "-m slow", 1, "=== failed: pytest -m slow ==="),
        ("1", "", "-", 1, "=== failed: pytest -m slow,pytest --lab ==="),
    ],
)
def test_nothing_that_fails_keeps_anything_else_from_its_turn(
    tmp_path: Path, user: str, lacking: str, failing: str, status: int, said: str
) -> None:
    script, environment = prepare(tmp_path, USER_ID=user, LACKING=lacking, FAILING=failing)
    done = subprocess.run(
        [script], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert (said != "") == ("===" in done.stderr.replace("=== NO /dev/kvm", ""))
    run = (tmp_path / "notes").read_text().splitlines()
    assert {"pytest ", "pytest -m slow and not exhaustive -n 0"} <= set(run)
    assert any(line.startswith("pytest tests/vcpu tests/guests ") for line in run)
    left_out = {f"pytest --lab {kind}" for kind in lacking.split()}
    expected = [line for line in LAB if not line.startswith(tuple(left_out))]
    assert [line for line in run if "lab" in line or "prep" in line] == expected
    others = [line for line in run if not line.startswith("pytest tests/")]
    failed = {f"{line} has failed" for line in others if "pytest" in line and failing in line}
    assert failed == {line for line in done.stdout.splitlines() if line.endswith("has failed")}
    assert not list(tmp_path.glob("tmp.*"))


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """It ends with the block, so that a test that has failed does not wait for it."""
    try:
        yield
    finally:
        process.terminate()


def test_all_of_it_ends_with_the_script(tmp_path: Path) -> None:
    slow_tests = "-m slow and not exhaustive -n 0"
    for name in (slow_tests, "--lab stock"):
        os.mkfifo(tmp_path / name)
    script, environment = prepare(tmp_path, USER_ID="1", LACKING="", FAILING="none", STAYS="yes")
    with (
        subprocess.Popen([script], env=environment, stdout=subprocess.PIPE, text=True) as process,
        ended(process),
        (tmp_path / slow_tests).open() as slow,
        (tmp_path / "--lab stock").open() as lab,
    ):
        assert slow.readline() == lab.readline() == "\n"
        process.terminate()
        said, _ = process.communicate()
        assert slow.read() == lab.read() == ""  # there is nobody who could write
    assert process.returncode == -signal.SIGTERM
    assert "pytest --lab stock has begun" in said
    assert not list(tmp_path.glob("tmp.*"))
