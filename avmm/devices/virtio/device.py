"""What a virtio device is, whatever transport shows it to the guest.

A `VirtioDevice` says what it is (id, features, queue sizes, config space) and serves its queues in
`serve`, a coroutine that the transport runs from DRIVER_OK on:

    class Echo(VirtioDevice):
        device_id = 42
        queue_sizes = (64,)

        async def serve_queue(self, queue: GuestQueue) -> None:
            while True:
                chain = await queue.next()
                queue.push(chain, chain.put(chain.take(4096)))

**Everything that stops a device is one cancellation.** At a reset, a pause, or when the guest
breaks a rule, the transport cancels `serve` and waits until it has ended; then, and only then,
the reset is done or the device quiesced. So whatever `serve` started (tasks in a nursery of its
own, a thread) has ended, and nothing writes guest memory or interrupts the guest any more.

**What is in flight is not lost.** Chains that were popped and not pushed when `serve` ended are
given out again by `next` when it is called again: after `resume`, or after a `load` in another
process. After a reset they are forgotten. So between `next` and `push` a device either can begin
again (a read, a write of the same sector), or notes in `chain.done` how far it got, or allows no
cancellation in between (no `await`, or a shield around a short one). Do not wait between them
for what may never come, for only the guest's sake: pop a receive buffer when there is
something to put into it (`await queue.wait()` tells that one is there).

**All of a device runs in trio**, but for `config` and `write_config`, which are called in a vCPU's
thread, with the lock held, and must only look at or change plain attributes. A device that
waits for its backend simply awaits: its guest's queue fills up, and nobody else notices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import trio

from avmm.devices.base import Doorbell, Wakeup
from avmm.devices.hostfd import HostFd
from avmm.devices.virtio.queue import Chain, Queue
from avmm.errors import DeviceError

if TYPE_CHECKING:
    from avmm.memory.ram import GuestMemory

_YIELD_SECONDS: Final = 0.001
"""How long a queue that never runs empty may keep the other tasks of the program waiting."""


class VirtioLink(Protocol):
    """What a virtio device gets from its transport."""

    @property
    def memory(self) -> GuestMemory:
        """Guest RAM, for devices that touch more of it than their chains."""

    def config_changed(self) -> None:
        """Tell the driver that config space has changed; from trio, after it did."""

    def wakeup(self) -> Wakeup:
        """A new wake-up, by which `write_config` tells a task of the device."""


class GuestQueue:
    """A queue while `serve` runs. From trio only, and used by one task at a time, but for `push`
    and `signal`: any thread may call these that has ended before `serve` does.

    Where the guest breaks a rule, methods raise `QueueError`: let it pass, the transport
    stops the device and tells the guest (DEVICE_NEEDS_RESET).
    """

    def __init__(
        self, index: int, queue: Queue, bell: Doorbell, interrupt: Callable[[], None]
    ) -> None:
        self.index = index
        self._queue = queue
        self._bell = bell
        self._interrupt = interrupt
        self._yielded = time.perf_counter()

    async def next(self) -> Chain:
        """The next chain, as soon as there is one. Cancelling takes none."""
        await self.let_others_run()
        while (chain := self._queue.pop()) is None:
            await self.wait()
        return chain

    def pop(self) -> Chain | None:
        """The next chain, or None where there is none now."""
        return self._queue.pop()

    async def let_others_run(self) -> None:
        """A checkpoint, where the last one was long ago or the task is cancelled."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if time.perf_counter() - self._yielded > _YIELD_SECONDS:
            await trio.lowlevel.checkpoint()
            self._yielded = time.perf_counter()

    async def wait(self) -> None:
        """Return as soon as there is a chain. A checkpoint only where it waits."""
        while not self._queue.listen():
            await self._bell.wait()
            self._yielded = time.perf_counter()
        self._queue.ignore()

    def send(self, sink: HostFd, most: int) -> Chain | None:
        """Write what is readable of chains to `sink` and give them back, until there are none or
        about `most` bytes were written: None. Or until `sink` takes no more at once, or has
        failed: the chain that it did not take whole, with the bytes that it took added to
        `done`.

        A `sink` that is a file is waited for, as long as `most` bytes take.
        """
        pushed, chain = self._queue.send(sink.fd, sink.is_socket, most)
        if pushed:
            self.signal()
        return chain

    def push(
        self, chain: Chain, written: int = 0, *, signal: bool = True, more: bool = False
    ) -> None:
        """Give a chain back; `written` is how many bytes of it were written, from its beginning.

        Interrupts the guest where it wants that, unless `signal` is False: then call `signal`
        after the last chain of several. With `more` the guest sees it only together with the
        next one, before which there must be no `await`.
        """
        if more:
            self._queue.stage(chain, written)
            return
        self._queue.push(chain, written)
        if signal and self._queue.wants_interrupt():
            self._interrupt()

    def signal(self) -> None:
        """Interrupt the guest for what was pushed, where it wants that."""
        if self._queue.wants_interrupt():
            self._interrupt()

    def end(self) -> None:
        """The session is over, for the transport to say: whoever still has this queue gets
        nothing from it and does nothing to it."""
        self._queue = _Ended()


class _Ended:
    """A queue whose session is over."""

    def pop(self) -> Chain | None:
        raise DeviceError("a virtqueue was used outside of serve()")

    def listen(self) -> bool:
        raise DeviceError("a virtqueue was used outside of serve()")

    def push(self, chain: Chain, written: int) -> None:
        """Nothing: what was in flight is given out again, or forgotten."""

    stage = push

    def send(self, fd: int, is_socket: bool, most: int) -> tuple[int, Chain | None]:
        raise DeviceError("a virtqueue was used outside of serve()")

    def wants_interrupt(self) -> bool:
        return False

    def ignore(self) -> None:
        """Nothing."""


class VirtioDevice:
    """A virtio device model. Subclass it; see the top of this file."""

    device_id: ClassVar[int] = 0
    """VIRTIO 1.2, section 5."""

    features: int = 0
    """The device's own feature bits that it offers; the transport adds those of the rings."""

    queue_sizes: Sequence[int] = ()
    """The most entries of each queue, a power of 2; fixed once it is attached."""

    link: VirtioLink
    """Set by `attach`."""

    @property
    def name(self) -> str:
        """What messages and saved states call it."""
        return type(self).__name__

    @property
    def config(self) -> bytes:
        """The device's config space as of now. Called in a vCPU's thread."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes config space; ignored unless overridden. In a vCPU's thread."""

    def attach(self, link: VirtioLink) -> None:
        """Called once, before the guest runs."""
        self.link = link

    async def run(self) -> None:
        """A background task beside `serve`, for the host's side: it goes on through resets and
        pauses, so it must not touch queues. Cancelled when the machine ends."""

    async def serve(self, queues: Mapping[int, GuestQueue], features: int) -> None:
        """Serve the queues that the driver has set up, with the features it took.

        Cancelled at a reset or pause, and called again where the device goes on.
        """
        async with trio.open_nursery() as nursery:
            for queue in queues.values():
                nursery.start_soon(self.serve_queue, queue)

    async def serve_queue(self, queue: GuestQueue) -> None:
        """Serve one queue, unless `serve` is overridden."""
        raise DeviceError(f"{self.name} does not serve its queue {queue.index}")

    def reset(self) -> None:
        """The driver has reset the device: forget what was its; `serve` has ended."""

    def finish(self) -> None:
        """The guest has ended, however."""

    async def release(self) -> None:
        """Let go of what only one machine may hold; see `avmm.devices.base.Device.release`."""

    async def acquire(self) -> None:
        """Take hold of it; see `avmm.devices.base.Device.acquire`."""

    @property
    def saves_in_thread(self) -> bool:
        """See `avmm.devices.base.Device.saves_in_thread`."""
        return False

    def save(self) -> Mapping[str, Any]:
        """The device's own state as plain data, without its queues' and registers'."""
        raise DeviceError(f"{self.name} cannot be saved: it lacks save()")

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `save` gave: hostile input. Raises `DeviceError` where it is none."""
        raise DeviceError(f"{self.name} cannot be loaded: it lacks load()")
