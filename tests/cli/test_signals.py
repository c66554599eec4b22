"""Signals that the command handles: those that it must leave alone, and stopping and going on."""

from __future__ import annotations

import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pexpect
import pytest
from support.commands import AVMM, PROMPT, output_until_prompt

pytestmark = [pytest.mark.usefixtures("kvm"), pytest.mark.timeout(60)]

ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def _heed_all() -> None:
    """These tests may themselves be run by `nohup`."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("ignored", [True, False])
def test_a_signal_that_was_ignored_stays_ignored(number: signal.Signals, ignored: bool) -> None:
    """As `nohup` does with SIGHUP, and a script's `&` with SIGINT."""
    ignore = f"trap '' {number.name.removeprefix('SIG')};" if ignored else ""
    process = subprocess.Popen(
        ["sh", "-c", f'{ignore} exec "$0" "$@"', *AVMM, "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=_heed_all,  # noqa: PLW1509 - it changes nothing of Python's
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        output_until_prompt(process)
        process.send_signal(number)
        if ignored:
            process.stdin.write(b"exit 7\n")
            process.stdin.flush()
        assert process.wait(timeout=30) == (7 if ignored else 128 + number)
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_until_it_is_gone_leave_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """A signal comes each millisecond, also while the command cleans up and Python ends."""
    process = subprocess.Popen(
        [*AVMM, "run", "--control", f"unix:{tmp_path / 'control'}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=_heed_all,  # noqa: PLW1509 - it changes nothing of Python's
    )
    with process:
        try:
            output_until_prompt(process)
            while process.poll() is None:
                process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.001)  # faster than Python can handle them would be a flood
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


@pytest.fixture
def terminal() -> Iterator[pexpect.spawn]:
    child = pexpect.spawn(
        sys.executable, [*AVMM[1:], "run"], timeout=30, encoding="utf-8", echo=True
    )
    child.expect_exact(PROMPT)
    yield child
    child.close(force=True)


def is_raw(child: pexpect.spawn) -> bool:
    return not termios.tcgetattr(child.fileno())[3] & termios.ICANON


def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        pass


def is_stopped(child: pexpect.spawn) -> bool:
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(") ")[2].startswith("T")


@pytest.mark.parametrize("how", ["SIGSTOP", "SIGTSTP", "Ctrl-A z"])
def test_the_terminal_is_raw_again_after_a_stop(terminal: pexpect.spawn, how: str) -> None:
    assert is_raw(terminal)
    if how == "Ctrl-A z":
        terminal.send("\x01z")
    else:
        terminal.kill(getattr(signal, how))
    until(lambda: is_stopped(terminal))
    if how == "SIGSTOP":  # nobody can put it back then, but a shell does
        mode = termios.tcgetattr(terminal.fileno())
        mode[3] |= termios.ICANON | termios.ECHO | termios.ISIG
        termios.tcsetattr(terminal.fileno(), termios.TCSANOW, mode)
    assert not is_raw(terminal)
    terminal.kill(signal.SIGCONT)
    until(lambda: is_raw(terminal))
    terminal.send("\x03echo still here\r")  # Ctrl-C is the guest's again
    terminal.expect_exact("still here\r\n" + PROMPT)
    terminal.send("exit 3\r")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 3
