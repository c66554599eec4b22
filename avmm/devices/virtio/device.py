"""What a virtio device is, whatever transport shows it to the guest.

A `VirtioDevice` says what it is (id, features, queue sizes, config space) and serves its queues in
`serve`, a coroutine that the transport runs from DRIVER_OK on:

    class Echo(VirtioDevice):
        device_id = 42
        queue_sizes = (64,)

        @protected
        async def serve_queue(self, queue: GuestQueue) -> None:
            while True:
                chain = await queue.next()
                queue.push(chain, chain.put(chain.take(4096)))

**Everything that stops a device is one cancellation.** At a reset, a pause, or when the guest
breaks a rule, the transport cancels `serve` and waits until it has ended. Only then is the reset
done, or the device quiesced. So whatever `serve` started (tasks in a nursery of its own, a thread)
has ended, and nothing writes guest memory or interrupts the guest.

**What is in flight is not lost.** Chains that were popped but not pushed when `serve` ended are
returned by `next` again when it is called after `resume`, or after a `load` in another process.
After a reset they are forgotten. So between `next` and `push` a device must do one of three
things: do only what it can begin again (a read, a write of the same sector), or note in
`chain.done` how far it has got, or prevent cancellation (no `await`, or a shield around a short
one). Do not wait between them for something that may never come. Pop a receive buffer only when
there is something to put into it; `await queue.wait()` returns when there is a buffer.

**All of a device runs in trio**, except `config` and `write_config`, which are called in a vCPU's
thread, with the lock held, and must only look at or change plain attributes. A device that has to
wait for its backend simply awaits. The guest's queue fills up meanwhile, and nothing else is
affected.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

import trio

from avmm import chance
from avmm.ctrl_c import protected
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
        """Tell the driver that config space has changed. Call it in trio, after the change."""

    def wakeup(self) -> Wakeup:
        """A new wake-up, with which `write_config` wakes a task of the device."""


class GuestQueue:
    """A queue while `serve` runs. Use it from trio only, and from one task at a time. The
    exceptions are `push` and `signal`: a thread may call these if it ends before `serve` does.

    If the guest breaks a rule, methods raise `QueueError`. Do not catch it: the transport then
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
        # In a deterministic run the guest stands still, so a queue does run empty.
        self._yields = not chance.is_fixed()

    async def next(self) -> Chain:
        """The next chain, as soon as there is one. Cancelling takes none."""
        await self.let_others_run()
        while (chain := self._queue.pop()) is None:
            await self.wait()
        return chain

    def pop(self) -> Chain | None:
        """The next chain, or None if there is none now."""
        return self._queue.pop()

    async def let_others_run(self) -> None:
        """Execute a checkpoint if the last one was long ago or the task is cancelled."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._yields and time.perf_counter() - self._yielded > _YIELD_SECONDS:
            await trio.lowlevel.checkpoint()
            self._yielded = time.perf_counter()

    async def wait(self) -> None:
        """Return as soon as there is a chain. This is a checkpoint only if it waits."""
        while not self._queue.listen():
            await self._bell.wait()
            self._yielded = time.perf_counter()
        self._queue.ignore()

    def send(self, sink: HostFd, most: int) -> Chain | None:
        """Write the readable parts of chains to `sink` and return the chains to the guest. Stops
        and returns None when there are no more chains, or after about `most` bytes. If `sink`
        accepts no more at once or has failed, returns the chain that was not written whole, with
        the bytes written added to its `done`.

        If `sink` is a file, this waits for it, for as long as writing `most` bytes takes.
        """
        pushed, chain = self._queue.send(sink.fd, sink.is_socket, most)
        if pushed:
            self.signal()
        return chain

    def push(
        self, chain: Chain, written: int = 0, *, signal: bool = True, more: bool = False
    ) -> None:
        """Return a chain to the guest; `written` is how many bytes of it were written, from its
        beginning.

        Interrupts the guest if it wants that. With `signal` False it does not: call `signal` after
        the last of several chains. With `more` the guest sees it only together with the next one,
        before which there must be no `await`.
        """
        if more:
            self._queue.stage(chain, written)
            return
        self._queue.push(chain, written)
        if signal and self._queue.wants_interrupt():
            self._interrupt()

    def signal(self) -> None:
        """Interrupt the guest for the chains that were pushed, if it wants that."""
        if self._queue.wants_interrupt():
            self._interrupt()

    def end(self) -> None:
        """The transport calls this when the session is over. From then on, whoever still has this
        queue gets nothing from it and cannot change it."""
        self._queue = _Ended()


class _Ended:
    """A queue whose session is over."""

    def pop(self) -> Chain | None:
        raise DeviceError("a virtqueue was used outside of serve()")

    def listen(self) -> bool:
        raise DeviceError("a virtqueue was used outside of serve()")

    def push(self, chain: Chain, written: int) -> None:
        """Do nothing: chains that were in flight are returned by `next` again, or forgotten."""

    stage = push

    def send(self, fd: int, is_socket: bool, most: int) -> tuple[int, Chain | None]:
        raise DeviceError("a virtqueue was used outside of serve()")

    def wants_interrupt(self) -> bool:
        return False

    def ignore(self) -> None:
        """Do nothing."""


class VirtioDevice:
    """A virtio device model. Subclass it; see the top of this file."""

    device_id: ClassVar[int] = 0
    """VIRTIO 1.2, section 5."""

    features: int = 0
    """The device's own feature bits that it offers; the transport adds those of the rings."""

    queue_sizes: Sequence[int] = ()
    """The most entries of each queue, a power of 2. It is fixed once the device is attached."""

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

    @protected
    async def run(self) -> None:
        """A background task beside `serve`, for the host's side: it goes on through resets and
        pauses, so it must not touch queues. Cancelled when the machine ends."""

    async def serve(self, queues: Mapping[int, GuestQueue], features: int) -> None:
        """Serve the queues that the driver has set up, with the features that it accepted.

        Cancelled at a reset or pause, and called again when the device goes on.
        """
        async with trio.open_nursery() as nursery:
            for queue in queues.values():
                nursery.start_soon(self.serve_queue, queue)

    @protected
    async def serve_queue(self, queue: GuestQueue) -> None:
        """Serve one queue, unless `serve` is overridden."""
        raise DeviceError(f"{self.name} does not serve its queue {queue.index}")

    def reset(self) -> None:
        """The driver has reset the device, and `serve` has ended. Forget what belonged to the
        driver."""

    def finish(self) -> None:
        """The guest has ended, for whatever reason."""

    async def release(self) -> None:
        """Let go of what only one machine may hold; see `avmm.devices.base.Device.release`."""

    async def acquire(self) -> None:
        """Take hold of it; see `avmm.devices.base.Device.acquire`."""

    @property
    def saves_in_thread(self) -> bool:
        """See `avmm.devices.base.Device.saves_in_thread`."""
        return False

    def save(self) -> Mapping[str, Any]:
        """The device's own state as plain data, without the state of its queues and registers."""
        raise DeviceError(f"{self.name} cannot be saved: it lacks save()")

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `save` returned. The input is hostile: raises `DeviceError` if it is not
        such a state."""
        raise DeviceError(f"{self.name} cannot be loaded: it lacks load()")
