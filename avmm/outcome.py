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
    """The guest was reset by a triple fault: Linux does that for `reboot=t`, or the guest
    crashed.
    """
    CRASH = "crash"
    """The guest reported that it had crashed."""
    STOPPED = "stopped"
    """The host stopped the guest."""
    MOVED = "moved"
    """The guest runs on in another process."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and the status that a command should end with."""

    cause: Cause
    status: int = 0
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.cause.value}, status {self.status}"
        return f"{text} ({self.detail})" if self.detail else text
