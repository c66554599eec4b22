"""`avmm` commands as processes, with a pipe at each end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

AVMM = [sys.executable, "-m", "avmm"]
PROMPT = "avmm> "


def avmm(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """A command that ends by itself; carriage returns are taken out of what it prints."""
    done = subprocess.run(
        [*AVMM, *arguments],
        input=given,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
        encoding="utf-8",
        errors="replace",
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def ctl(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`avmm ctl`."""
    return avmm("ctl", str(path), *arguments)


def status(path: Path) -> dict[str, Any]:
    """`avmm ctl PATH status`."""
    told: dict[str, Any] = json.loads(ctl(path, "status", "--json").stdout)
    return told


class Command:
    """One that runs on. Ended, if need be, where its block is left."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [*AVMM, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.pid = self._process.pid
        self.said = ""
        """All that it has printed and that was read."""
        self.told = ""
        """The same of its standard error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        assert "Traceback" not in self.told, self.told

    def say(self, text: str) -> None:
        """To its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def expect(self, text: str) -> str:
        """Read until it prints `text`: all that came, with that."""
        assert self._process.stdout is not None
        heard = self._until(self._process.stdout.fileno(), text)
        self.said += heard
        return heard

    def expect_error(self, text: str) -> str:
        """The same on its standard error."""
        assert self._process.stderr is not None
        heard = self._until(self._process.stderr.fileno(), text)
        self.told += heard
        return heard

    @staticmethod
    def _until(fd: int, text: str) -> str:
        heard = ""
        while text not in heard:
            data = os.read(fd, 4096).decode()
            assert data, f"it ended after {heard!r}, {text!r} was expected"
            heard += data
        return heard

    def wait(self, timeout: float = 30) -> int:
        """Its status; what it has printed at last is in `said` and `told`."""
        out, err = self._process.communicate(timeout=timeout)
        self.said += out.decode()
        self.told += err.decode()
        return self._process.returncode


def receiver(commands: ExitStack, target: str, *options: str) -> tuple[Command, str]:
    """`avmm receive`, and where it waits."""
    command = commands.enter_context(Command("receive", target, *options))
    line = command.expect_error("for a guest\n")
    return command, line.split(" at ")[1].split(" for ")[0]


def output_until_prompt(guest: subprocess.Popen[bytes]) -> bytes:
    """What a command with the bundled shell prints up to its first prompt."""
    assert guest.stdout is not None
    said = b""
    while PROMPT.encode() not in said:
        part = os.read(guest.stdout.fileno(), 4096)
        assert part, f"it has ended without a prompt: {said!r}"
        said += part
    return said
