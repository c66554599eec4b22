"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final


class Cause(Enum):
    """What ended a run."""

    EXIT = "exit"
    """The guest wrote to the exit-status or the debug-exit port."""
    SHUTDOWN = "shutdown"
    """The guest powered off."""
    RESET = "reset"
    """The guest asked to be reset (keyboard controller, reset port, firmware call)."""
    TRIPLE_FAULT = "triple fault"
    """The guest was reset by a triple fault: it crashed, or it is a Linux that does that on
    purpose for a reboot (`reboot=t`).
    """
    CRASH = "crash"
    """The guest reported that it had crashed (pvpanic, firmware call)."""
    STOPPED = "stopped"
    """The host stopped the guest."""
    MOVED = "moved"
    """The guest runs on in another process."""


CRASHED: Final = 134
"""The status of a run that ended by a crash or a triple fault: the one that a shell gives for a
program that was aborted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, and the status that a command should end with."""

    cause: Cause
    status: int = 0
    detail: str = ""

    def __str__(self) -> str:
        text = f"{self.cause.value}, status {self.status}"
        return f"{text} ({self.detail})" if self.detail else text
