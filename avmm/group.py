"""All vCPUs of a machine, asked and awaited together: what the coordinator pauses."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from avmm.errors import VcpuError
from avmm.kvm.parking import ParkingLot
from avmm.loop import VcpuLoop


class VcpuGroup:
    """The loops of one machine's vCPUs and the lot in which they park. From trio only."""

    def __init__(self, lot: ParkingLot, loops: Sequence[VcpuLoop]) -> None:
        self._lot = lot
        self.loops = loops
        self._asked = 0.0

    async def run(self) -> None:
        """Run all vCPUs until the last has ended. Raises as `VcpuLoop.run`, in a group."""
        async with trio.open_nursery() as nursery:
            for loop in self.loops:
                nursery.start_soon(loop.run, name=f"vCPU {loop.index}")

    def stop(self) -> None:
        """Ask all to end, parked or not. Any thread; does not wait; idempotent."""
        for loop in self.loops:
            loop.stop()

    def pause(self) -> None:
        """Ask all at once to drain and park; `parked` waits for it."""
        self._lot.ask()
        self._asked = trio.current_time()

    def resume(self) -> None:
        """Take a `pause` back, whether they have parked yet or not."""
        self._lot.release()

    async def parked(self) -> None:
        """Wait until all have parked after `pause`, or have ended in good order.

        Raises `VcpuError` where one has failed: its last exit is not finished, and its state
        not one to be read. Cancelling the wait leaves the request standing until `resume`.
        """
        # Nearly always they park at once: to be there is cheaper than to sleep and be woken.
        parked = self._lot.poll(not any(loop.is_being_served for loop in self.loops))
        while not parked:
            try:
                await trio.lowlevel.wait_readable(self._lot.bell)
            finally:
                self._lot.woken()
            parked = self._lot.poll(False)
        for loop in self.loops:
            if loop.failed:
                raise VcpuError(f"vCPU {loop.index} has failed in the midst of an exit")

    def late(self) -> list[str]:
        """What each vCPU waits for that has not parked, for a person."""
        seconds = trio.current_time() - self._asked
        return [loop.waits_for(seconds) for loop in self.loops if not loop.is_parked]
