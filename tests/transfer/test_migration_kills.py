"""One side of a migration is killed at a frame: the guest runs on one side then, or somebody is
asked, and its disk is locked by whoever runs it.

Both sides are `avmm` commands. The line between them goes through the test, which kills a side
when it has a frame whole, and before the frame goes on: where its sender is killed that was the
last that it said, where its receiver is, nothing of it arrives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from support.commands import PROMPT, Command, ctl, receiver, status
from support.faults import Frames, Message, Way

from avmm.disks import RawDisk
from avmm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("kvm")

_CHUNK = 1 << 16


@dataclass(frozen=True)
class Kill:
    """`side` is killed at the first `message` of this way."""

    side: Literal["source", "destination"]
    way: Way
    message: Message
    is_lost: bool = False
    """The frame is, too, though its sender has said it."""

    def __str__(self) -> str:
        lost = "-lost" if self.is_lost else ""
        return f"{self.side}-{self.message.name}-{self.way}{lost}"


class Line:
    """Waits at `path` for the source, and goes on to the destination at `target`."""

    def __init__(self, path: Path, target: Path, kill: Kill, pid: int) -> None:
        self._kill, self._pid = kill, pid
        self.has_happened = False
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(20)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """After both ends have."""
        self._thread.join()
        self._listener.close()

    def _run(self) -> None:
        near, _ = self._listener.accept()
        with near, socket.socket(socket.AF_UNIX) as far:
            far.connect(str(self._target))
            back = threading.Thread(target=self._carry, args=("back", far, near))
            back.start()
            self._carry("there", near, far)
            back.join()

    def _carry(self, way: Way, near: socket.socket, far: socket.socket) -> None:
        frames, said, is_over = Frames(), 0, False
        with contextlib.suppress(OSError):  # one side is dead, or has ended
            while not is_over and (data := near.recv(_CHUNK)):
                frames.feed(data)
                if way == self._kill.way and self._kill.message in frames.seen:
                    _, end = frames.seen[self._kill.message][0]
                    if said + len(data) >= end:
                        self._do()
                        data = b"" if self._kill.is_lost else data[: end - said]
                        is_over = True
                far.sendall(data)
                said += len(data)
        with contextlib.suppress(OSError):
            far.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            near.shutdown(socket.SHUT_RD)

    def _do(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)  # its locks are gone then
        self.has_happened = True


def answers(guest: Command) -> None:
    guest.say("echo it is $\r")
    guest.expect("\nit is $\r\n" + PROMPT)


def is_locked(disk: Path) -> bool:
    try:
        RawDisk(disk).close()
    except ConfigError as error:
        assert "in use" in str(error)
        return True
    return False


def kill(folder: Path, commands: ExitStack, kill: Kill, settle: str = "here") -> None:
    disk, control = folder / "disk", folder / "ctl"
    disk.write_bytes(bytes(8192))
    options = ("--disk", str(disk))
    source = commands.enter_context(
        Command("run", "--memory", "16M", "--control", f"unix:{control}", *options)
    )
    source.expect(PROMPT)
    destination, _ = receiver(commands, f"unix:{folder / 'move'}", *options)
    victim = source if kill.side == "source" else destination
    line = Line(folder / "line", folder / "move", kill, victim.pid)
    try:
        mover = commands.enter_context(
            Command("ctl", str(control), "migrate", f"unix:{folder / 'line'}")
        )
        code = mover.wait()
    finally:
        line.close()
    assert line.has_happened
    if kill.side == "source":
        if kill.message in (Message.COMMIT, Message.RUNNING):
            answers(destination)
            assert is_locked(disk)
        else:
            assert destination.wait() == 125
            assert not is_locked(disk)
        return
    if kill.message is Message.RUNNING and not kill.is_lost:
        assert (code, source.wait()) == (0, 0)  # it has moved; its VMM was killed there
        assert not is_locked(disk)
    elif kill in UNKNOWN:
        assert code == 3
        assert status(control)["state"] == "unsettled"
        assert not is_locked(disk)
        source.say("echo later\r")
        assert ctl(control, "settle", settle).returncode == 0
        if settle == "here":
            source.expect("\nlater\r\n" + PROMPT)
            answers(source)
            assert is_locked(disk)
        else:
            assert source.wait() == 0
            assert "later" not in source.said
            assert not is_locked(disk)
    else:
        assert code == 125
        answers(source)
        assert is_locked(disk)


THERE = ("HELLO", "OFFER", "PAGES", "ROUND", "STATE", "STATE_END", "COMMIT")
BACK = ("HELLO", "ACCEPT", "READY", "RUNNING")
UNKNOWN = [
    Kill("destination", "back", Message.READY),  # it is sent COMMIT, and nobody knows who died
    Kill("destination", "there", Message.COMMIT),
    Kill("destination", "back", Message.RUNNING, is_lost=True),
]
KNOWN = [
    *(Kill("source", "there", Message[name]) for name in THERE),
    *(Kill("source", "back", Message[name]) for name in BACK),
    *(Kill("destination", "there", Message[name]) for name in THERE[:-1]),
    *(Kill("destination", "back", Message[name]) for name in ("HELLO", "ACCEPT", "RUNNING")),
    Kill("destination", "back", Message.READY, is_lost=True),
]
SOME = [
    Kill("source", "back", Message.READY),
    Kill("source", "there", Message.COMMIT),
    Kill("destination", "there", Message.STATE_END),
]


@pytest.mark.parametrize("which", SOME, ids=str)
def test_a_side_is_killed(tmp_path: Path, commands: ExitStack, which: Kill) -> None:
    kill(tmp_path, commands, which)


def test_the_destination_is_killed_before_it_has_commit(
    tmp_path: Path, commands: ExitStack
) -> None:
    kill(tmp_path, commands, Kill("destination", "there", Message.COMMIT))


@pytest.mark.slow
@pytest.mark.parametrize("which", KNOWN, ids=str)
def test_a_side_is_killed_at_any_message(tmp_path: Path, commands: ExitStack, which: Kill) -> None:
    kill(tmp_path, commands, which)


@pytest.mark.slow
@pytest.mark.parametrize("settle", ["here", "there"])
@pytest.mark.parametrize("which", UNKNOWN, ids=str)
def test_nobody_knows_and_somebody_settles(
    tmp_path: Path, commands: ExitStack, which: Kill, settle: str
) -> None:
    kill(tmp_path, commands, which, settle)
