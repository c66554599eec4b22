"""What a person at the guest's terminal is told by avmm itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pexpect
import pytest
from support.assembler import assemble
from support.commands import AVMM, PROMPT, ctl
from support.guest import EXIT, ORIGIN

from avmm.cli import console
from avmm.devices.hostfd import HostFd
from avmm.devices.virtio.port import Port

pytestmark = [pytest.mark.usefixtures("kvm"), pytest.mark.timeout(60)]

Spawn = Callable[..., "pexpect.spawn[str]"]


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    children: list[pexpect.spawn[str]] = []

    def start(*options: str) -> pexpect.spawn[str]:
        child = pexpect.spawn(
            sys.executable, [*AVMM[1:], "run", *options], timeout=30, encoding="utf-8"
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


def all_of(child: pexpect.spawn[str]) -> str:
    child.expect(pexpect.EOF)
    return str(child.before)


@pytest.mark.parametrize(("last", "shown"), [("!", "!\r\n"), ("\n", "\n")], ids=["text", "line"])
def test_the_shells_prompt_begins_a_line(
    spawn: Spawn, tmp_path: Path, last: str, shown: str
) -> None:
    image = tmp_path / "guest"
    say = f"mov dx, 0x3f8; mov al, {ord(last)}; out dx, al; {EXIT.format(3)}"
    image.write_bytes(assemble(say, 64, ORIGIN))
    assert all_of(spawn(str(image), "--flat", f"long@{ORIGIN:#x}")) == shown


def test_no_number_of_seconds_is_refused(spawn: Spawn) -> None:
    child = spawn("--grace", "nan")
    assert "expected a number of seconds" in all_of(child)
    child.close()
    assert child.exitstatus == 2


def test_pauses_by_others_are_told(spawn: Spawn, tmp_path: Path) -> None:
    path = tmp_path / "control"
    child = spawn("--control", f"unix:{path}")
    child.expect_exact(PROMPT)
    ctl(path, "pause")
    child.expect_exact("\r\navmm: paused by `avmm ctl`\r\n")
    ctl(path, "pause")
    ctl(path, "resume")
    ctl(path, "resume")
    child.expect_exact("\r\navmm: running\r\n")
    assert "avmm" not in child.before, "once is enough"
    child.send("exit 3\r")
    child.expect(pexpect.EOF)


def test_an_end_by_others_is_told(spawn: Spawn, tmp_path: Path) -> None:
    path = tmp_path / "control"
    child = spawn("--control", f"unix:{path}")
    child.expect_exact(PROMPT)
    ctl(path, "stop")
    assert all_of(child) == "\r\navmm: the guest was ended through its control socket\r\n"


KEY = "mov dx, 0x3fd; 1: in al, dx; test al, 1; jz 1b; mov dx, 0x3f8; in al, dx;"
"""Wait for a key."""


def logging_guest(
    folder: Path, *writes: tuple[int, bytes], before: str = "", after: str = ""
) -> pexpect.spawn[str]:
    """`avmm --log-level info run` with a guest that writes these bytes to these ports."""
    code = "".join(
        f"mov dx, {port:#x}; mov al, {byte}; out dx, al;" for port, text in writes for byte in text
    )
    image = folder / "guest"
    image.write_bytes(assemble(before + code + after + EXIT.format(3), 64, ORIGIN))
    command = ["--log-level", "info", "run", str(image), "--flat", f"long@{ORIGIN:#x}"]
    return pexpect.spawn(sys.executable, [*AVMM[1:], *command], timeout=30, encoding="utf-8")


def test_a_line_of_the_log_comes_behind_the_output_before_it(tmp_path: Path) -> None:
    """The guest prints "one", and writes "two" to its debug console. It waits for a key before
    that, until its console is connected, and after it."""
    writes = (0x3F8, b"one"), (0xE9, b"two\n")
    with closing(logging_guest(tmp_path, *writes, before=KEY, after=KEY)) as child:
        assert child.waitnoecho(30), "the terminal is not in raw mode"
        child.send("x")
        child.expect("two\r\n")
        assert child.before == "one\r\navmm: "
        child.send("x")
        child.expect(pexpect.EOF)


def test_what_is_logged_at_the_end_is_told(tmp_path: Path) -> None:
    with closing(logging_guest(tmp_path, (0xE9, b"last words\n"))) as child:
        assert "avmm: last words\r\n" in all_of(child)


async def test_a_thread_that_logs_as_it_ends_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Its line comes to trio's thread when nobody waits for one any more."""
    log = console._Log(Port("x"), HostFd(1, os.O_WRONLY))
    log.take("before")
    log.end()
    assert capsys.readouterr().err == "before\r\n"
    log.take("after")
    assert capsys.readouterr().err == "after\r\n"
