"""Ctrl-C at any instruction of a machine's life: nothing is left behind, and nothing crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from avmm.ctrl_c import context, interruptible, protected, undisturbed

SWEEP = Path(__file__).parent / "support" / "ctrl_c_sweep.py"


def swept(folder: Path, life: str, first: int, step: int, seconds: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, SWEEP, folder, life, str(first), str(step)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env=os.environ | {"PYTHONPATH": str(SWEEP.parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines, *wrong = done.stdout.splitlines()
    assert int(lines.split()[0]) > 1000
    return wrong


@pytest.mark.usefixtures("kvm")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("life", ["stays", "leaves", "comes"])
def test_at_some_lines(tmp_path: Path, life: str) -> None:
    assert swept(tmp_path, life, 13, 997, 110) == []


@pytest.mark.slow
@pytest.mark.usefixtures("kvm")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("life", ["stays", "leaves", "comes"])
def test_at_many_lines(tmp_path: Path, life: str) -> None:
    assert swept(tmp_path, life, 1, 211, 890) == []


def pressed() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def pythons_own_handler() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("in_main", [True, False])
def test_what_must_be_done_is_done(in_main: bool) -> None:
    done: list[str] = []

    async def work() -> str:
        pressed()
        await trio.lowlevel.checkpoint()
        await trio.sleep(0.001)
        pressed()
        await trio.sleep(0.001)
        done.append("done")
        return "result"

    async def must() -> None:
        done.append(await undisturbed(work))

    async def main() -> None:
        if in_main:
            await must()
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(protected(must))

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert done[0] == "done"


def test_a_failure_of_what_must_be_done_is_raised() -> None:
    async def work() -> None:
        raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        trio.run(undisturbed, work)


def test_an_interrupt_of_a_users_code_is_raised_at_once() -> None:
    async def users() -> None:
        pressed()
        raise AssertionError("too late")

    @protected
    async def ours() -> None:
        await interruptible(users())

    with pytest.raises(KeyboardInterrupt):
        trio.run(ours)


def test_a_block_is_entered_and_left_in_one_piece() -> None:
    steps: list[str] = []

    @context
    async def block():  # type: ignore[no-untyped-def]
        pressed()
        steps.append("entered")
        try:
            yield
        finally:
            pressed()
            steps.append("left")

    async def main() -> None:
        async with block():
            steps.append("inside")
            with pytest.raises(KeyboardInterrupt):
                await trio.lowlevel.checkpoint()
        with pytest.raises(KeyboardInterrupt):
            await trio.lowlevel.checkpoint()

    trio.run(main)
    assert steps == ["entered", "inside", "left"]
