"""Who keeps the guest paused. The terminal's key and the control socket each hold their own
pauses.

A guest runs when nobody holds it. Each holder's pauses are counted, and only that holder undoes
them. So `avmm ctl resume` does not undo a pause that was made at the terminal, and the terminal
does not undo one of `avmm ctl`. Both report who still holds the guest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import trio

from avmm.errors import AvmmError
from avmm.machine import Machine

TERMINAL: Final = "terminal"
CONTROL: Final = "control"


class PauseRefused(AvmmError):
    """The guest may not be paused now."""


class Holds:
    """The pauses of one machine that outlive a call. Made by `opened`."""

    def __init__(self, vm: Machine) -> None:
        self._vm = vm
        self._held: dict[str, list[AsyncExitStack]] = {TERMINAL: [], CONTROL: []}
        self.refusal = ""
        """Why the guest may not be paused now; empty if it may."""
        self._changes = trio.lowlevel.ParkingLot()

    @property
    def counts(self) -> dict[str, int]:
        """The number of pauses of each holder."""
        return {who: len(held) for who, held in self._held.items()}

    def __str__(self) -> str:
        names = [f"{who} ({count})" for who, count in self.counts.items() if count]
        return " and ".join(names)

    async def hold(self, who: str, deadline: float | None = None) -> None:
        """Pause the guest once more. Raises as `Machine.paused`, and `PauseRefused`."""
        if self.refusal:
            raise PauseRefused(f"the guest cannot be paused: {self.refusal}")
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._vm.paused(deadline))
            if self.refusal:  # the answer may have changed while we waited
                raise PauseRefused(f"the guest cannot be paused: {self.refusal}")
            self._held[who].append(stack.pop_all())
        self._changes.unpark_all()

    async def let_go(self, who: str) -> None:
        """Undo one pause of `who`, who must have at least one."""
        await self._held[who].pop().aclose()
        self._changes.unpark_all()

    async def changed(self) -> None:
        """Return after the next change of `counts`."""
        await self._changes.park()

    async def _let_all_go(self) -> None:
        for who, held in self._held.items():
            while held:
                await self.let_go(who)


@asynccontextmanager
async def opened(vm: Machine) -> AsyncIterator[Holds]:
    """The holds of `vm`. They are all undone when the block ends."""
    holds = Holds(vm)
    try:
        yield holds
    finally:
        await holds._let_all_go()
