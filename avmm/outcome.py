"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Cause(Enum):
    """What ended a run."""

    EXIT = "exit"
    """The guest wrote to the exit-status or the debug-exit port."""
    SHUTDOWN = "shutdown"
    """The guest powered off."""
    RESET = "reset"
    """The guest asked to be reset (keyboard controller, reset port, firmware call)."""
    TRIPLE_FAULT = "triple fault"
    """The guest reset by a triple fault: Linux's `reboot=t`, or a crash."""
    CRASH = "crash"
    """The guest reported that it had crashed."""
    STOPPED = "stopped"
    """The host stopped it."""
    MOVED = "moved"
    """It runs on in another process."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and the status that a command should end with."""

    cause: Cause
    status: int = 0
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.cause.value}, status {self.status}"
        return f"{text} ({self.detail})" if self.detail else text
