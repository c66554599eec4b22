"""The examples do what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "conversation": ["echo one: one", "echo two: two"],
    "embed": ["hello from inside", "exit, status 3"],
    "evacuate": [f"guest {number} has moved" for number in range(10)],
    "fifty_clones": [f"I am clone {number}" for number in range(50)],
    "find_a_race": ["seed 0: 40 of 40", "the same again, bit for bit"],
    "move_while_typing": [
        *(f"line {number}" for number in range(1, 21)),
        "in the other process: exit, status 3",
    ],
    "remote_register": ["0x00000015"],
    "slow_answer_while_moving": ["0x00000015", "questions: 1, reads: 1"],
    "ten_guests": [
        "once upon a time 0 1 2 3 4 5 6 7 8 9",
        "in a nursery 0 1 2 3 4 5 6 7 8 9",
        "ten guests 0 1 2 3 4 5 6 7 8 9",
    ],
}


def test_each_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("name", SAYS)
def test_example(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.replace("\r", "").splitlines()
    for line in SAYS[name]:
        assert lines.count(line) == 1, line
