"""The coordinator: pauses every vCPU of a machine, and lets them run on.

Pausing is asked of all vCPUs at once and awaited after that, so they drain side by side. What
a vCPU does to drain is told in `avmm.loop`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from avmm.loop import VcpuLoop


class Coordinator:
    """Pauses the vCPUs of one machine for whoever asks; pauses count."""

    def __init__(self, loops: Sequence[VcpuLoop]) -> None:
        self._loops = loops
        self._holders = 0

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """No vCPU runs inside the block, and none has an unfinished exit.

        Pauses nest and overlap: the guest runs on when the last one is left, however it is
        left. Cancelling it while it waits for the vCPUs lets them run on as well.
        """
        self._holders += 1
        try:
            if self._holders == 1:
                for loop in self._loops:
                    loop.pause()
            for loop in self._loops:
                await loop.parked()
            await trio.lowlevel.checkpoint()
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                for loop in self._loops:
                    loop.resume()
