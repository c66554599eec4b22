"""The entropy device (VIRTIO 1.2, 5.4): it fills the buffers of its one queue with random
bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar, Final

from avmm import chance
from avmm.ctrl_c import protected
from avmm.devices.state import DeviceState
from avmm.devices.virtio.device import GuestQueue, VirtioDevice
from avmm.errors import DeviceError

MOST: Final = 4096
"""The most bytes for one request: drivers take what they get (5.4.6.1: at least one byte)."""


async def _kernel(count: int) -> bytes:
    """Random bytes from the host's kernel. Does not wait once the host has booted."""
    return chance.random_bytes(count)


class Rng(VirtioDevice):
    """Gives the guest random bytes: the kernel's, or those of `source`.

    `source` is called in trio, with a number of bytes; what it returns (1 byte up to that many)
    goes to the guest. While it waits, the guest's requests wait. It is cancelled at a reset or a
    pause; after a pause it is called again.
    """

    class State(DeviceState, version=1):
        """Nothing but the version, because random bytes need no state."""

    device_id: ClassVar[int] = 4
    queue_sizes = (16,)

    def __init__(self, source: Callable[[int], Awaitable[bytes]] = _kernel) -> None:
        self._source = source

    @property
    def name(self) -> str:
        return "rng"

    @protected
    async def serve_queue(self, queue: GuestQueue) -> None:
        while True:
            chain = await queue.next()
            wanted = min(chain.writable_bytes, MOST)
            data = await self._source(wanted) if wanted else b""
            if wanted and not 0 < len(data) <= wanted:
                raise DeviceError(f"rng: its source gave {len(data)} bytes for {wanted}")
            queue.push(chain, chain.put(data))

    def save(self) -> Mapping[str, Any]:
        return self.State.plain()

    def load(self, state: Mapping[str, Any]) -> None:
        self.State.load(self.name, state)
