"""A cable between two guests, or between a guest and a program: two ends in memory."""

from __future__ import annotations

import trio

from avmm.devices.virtio.frame import Backend, Frame


class End(Backend):
    """One end of a `pair`. Frames whose checksum is incomplete pass unchanged. A program that uses
    this end calls `Frame.complete` on them."""

    completes = True

    def __init__(
        self, out: trio.MemorySendChannel[Frame], into: trio.MemoryReceiveChannel[Frame]
    ) -> None:
        self._out = out
        self._into = into

    async def receive(self) -> Frame:
        """See `Backend`; ends when the other end was closed."""
        return await self._into.receive()

    async def send(self, frame: Frame) -> None:
        """See `Backend`. Waits while the cable is full."""
        await self._out.send(frame)

    def close(self) -> None:
        """Close this end; what was sent can still be received at the other."""
        self._out.close()
        self._into.close()


def pair(size: int = 64) -> tuple[End, End]:
    """The two ends of a cable that holds up to `size` frames in each direction."""
    there = trio.open_memory_channel[Frame](size)
    back = trio.open_memory_channel[Frame](size)
    return End(there[0], back[1]), End(back[0], there[1])
