"""`.ci/run`, with commands that only note that they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
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
    "apt-get": "",
    "id": 'echo "$USER_ID"',
    "avmm": "echo hi; exit 3",
    "pytest": """\
echo "pytest $*" >>"$NOTES"
case "$*" in *"--lab $FAILING"*) exit 1;; esac
""",
}
LAB = [
    "prepare stock",
    "pytest --lab stock",
    "prepare proposing",
    "pytest --lab proposing",
    "prepare newer",
    "pytest --lab newer tests/test_xen.py tests/test_completion_report.py",
]


@pytest.mark.parametrize(
    ("user", "lacking", "failing", "status", "said"),
    [
        ("0", "", "none", 0, ""),
        ("0", "stock", "none", 1, "nothing has been tested on these KVMs: stock ==="),
        ("1", "stock newer", "none", 0, "nothing has been tested on these KVMs: stock newer ==="),
        ("1", "", "stock", 1, "tests failed in the lab: stock ==="),
    ],
)
def test_no_kind_of_lab_keeps_another_from_its_turn(
    tmp_path: Path, user: str, lacking: str, failing: str, status: int, said: str
) -> None:
    stubs, notes = tmp_path / "stubs", tmp_path / "notes"
    stubs.mkdir()
    for name, text in STUBS.items():
        (stubs / name).write_text(f"#!/bin/sh\n{text}")
        (stubs / name).chmod(0o755)
    (tmp_path / "tree/tests").mkdir(parents=True)
    (tmp_path / "tree/.ci").mkdir()
    script = shutil.copy(RUN, tmp_path / "tree/.ci/run")
    environment = os.environ | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "PYTHON": "stub-python",
        "TMPDIR": str(tmp_path),
        "NOTES": str(notes),
        "USER_ID": user,
        "LACKING": lacking,
        "FAILING": failing,
    }
    done = subprocess.run(
        [script], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert (said != "") == ("===" in done.stderr.replace("=== NO /dev/kvm", ""))
    left_out = {f"pytest --lab {kind}" for kind in lacking.split()}
    expected = [line for line in LAB if not line.startswith(tuple(left_out))]
    assert [
        line for line in notes.read_text().splitlines() if "lab" in line or "prep" in line
    ] == expected
