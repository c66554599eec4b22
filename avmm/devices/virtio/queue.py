"""A split virtqueue as a device uses it (VIRTIO 1.2, 2.7): chains out of guest memory, and back.

A chain that was popped and not yet pushed is *in flight*. `hold` takes back the chains in flight.
Later `pop`s return them again in their old order, here or after a `load` elsewhere. So work on a
chain may be cancelled at any moment, and nothing that the guest sent is lost.

All checks are in C (avmm/native/vring.h). A chain in an indirect table may be longer than the
queue. 2.7.5.3.1 forbids drivers to do that, but Linux does it (its network driver sends up to 19
parts, whatever the queue's size), and other VMMs also accept up to 1024 parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final, Protocol

from avmm.devices.state import DeviceState
from avmm.errors import DeviceError
from avmm.memory.ram import GuestMemory
from avmm.native.vring import QueueError, SplitRing
from avmm.plain import FLAG, U16, U32, U64, Int, ListOf, Row

__all__ = ["Chain", "Queue", "QueueError", "Virtqueue"]

MAX_SIZE: Final = 32768


class Chain:
    """A chain of descriptors: what the guest sends and where it wants its answer.

    `readable` and `writable` are views of guest RAM itself, no copies. The guest may change these
    bytes at any moment, so copy them (`take`) before you check them. The lists are this chain's
    own; `os.preadv`, `os.pwritev` and `sendmsg` take them as they are.
    """

    __slots__ = ("_cut_off", "done", "head", "readable", "writable")

    def __init__(
        self, head: int, readable: list[memoryview], writable: list[memoryview], done: int = 0
    ) -> None:
        self.head = head
        """The number of its first descriptor, by which the guest knows it."""
        self.readable = readable
        self.writable = writable
        self._cut_off: list[memoryview] = []
        self.done = done
        """How far the work on it has got, in units of the device's choice. `hold` and a save keep
        it."""

    @property
    def readable_bytes(self) -> int:
        """How many bytes there are (still) to be read."""
        return sum(map(len, self.readable))

    @property
    def writable_bytes(self) -> int:
        """How many bytes may (still) be written."""
        return sum(map(len, self.writable))

    def take(self, count: int) -> bytes:
        """Return a copy of the next `count` readable bytes, or of all that are left. `readable`
        then begins after them."""
        if self.readable and len(part := self.readable[0]) >= count:  # the usual header
            if len(part) == count:
                return bytes(self.readable.pop(0))
            self.readable[0] = part[count:]
            return bytes(part[:count])
        return b"".join(_cut(self.readable, count))

    def first(self, count: int) -> list[memoryview]:
        """The next `count` readable bytes, or all that are left. They stay readable."""
        return _cut(self.readable.copy(), count)

    def skip(self, count: int) -> None:
        """Let `readable` begin `count` bytes later."""
        _cut(self.readable, count)

    def put(self, data: bytes | bytearray | memoryview) -> int:
        """Write as much of `data` as fits; `writable` then begins after it. Returns how many bytes
        were written."""
        view = memoryview(data).cast("B")
        at = 0
        for part in _cut(self.writable, len(view)):
            part[:] = view[at : at + len(part)]
            at += len(part)
        return at

    def cut_writable(self, count: int) -> list[memoryview]:
        """Take the next `count` writable bytes, or all that are left, out of `writable`."""
        parts = _cut(self.writable, count)
        self._cut_off += parts
        return parts

    def cut_last_writable(self, count: int) -> list[memoryview]:
        """Take the last `count` writable bytes out of `writable` (where a status goes)."""
        if self.writable and len(self.writable[-1]) == count:  # the usual status
            last = [self.writable.pop()]
            self._cut_off += last
            return last
        before = _cut(self.writable, max(0, self.writable_bytes - count))
        last, self.writable = self.writable, before
        self._cut_off += last
        return last

    def release(self) -> None:
        """Let go of guest memory: the views cannot be used after this. Views that were cut off are
        released as well, because a traceback may keep their holder alive until the garbage
        collector runs.
        """
        for view in (*self.readable, *self.writable, *self._cut_off):
            view.release()


def _cut(parts: list[memoryview], count: int) -> list[memoryview]:
    """Remove the first `count` bytes from `parts`, and return them."""
    taken = []
    whole = 0
    for part in parts:
        if len(part) > count:
            if count > 0:
                taken.append(part[:count])
                parts[whole] = part[count:]
            break
        taken.append(part)
        count -= len(part)
        whole += 1
    del parts[:whole]
    return taken


class Queue(Protocol):
    """What a device needs from a virtqueue, independent of its layout."""

    def pop(self) -> Chain | None:
        """The next chain, or None if there is none. Raises `QueueError`."""

    def push(self, chain: Chain, written: int) -> None:
        """Return a chain to the guest, with `written` bytes written to it. Raises `QueueError`.

        This and `wants_interrupt` may be called in any thread."""

    def stage(self, chain: Chain, written: int) -> None:
        """As `push`, but the guest sees the chain only together with the next one that is
        pushed."""

    def send(self, fd: int, is_socket: bool, most: int) -> tuple[int, Chain | None]:
        """Write the readable bytes of chains to `fd`, push the chains, and return how many chains
        were pushed. Stops when there are no more chains, after about `most` bytes (it waits for a
        file), or when `fd` accepts no more at once or has failed. In the last case it also returns
        the chain that was not written whole, with the bytes written added to its `done`. Raises
        `QueueError`."""

    def wants_interrupt(self) -> bool:
        """Should the guest be interrupted for the chains that were pushed since this was last
        called?"""

    def listen(self) -> bool:
        """Ask the guest for notifications. Returns whether there is a chain already."""

    def ignore(self) -> None:
        """Ask the guest for no notifications, because `pop` will be called anyway."""


class Virtqueue:
    """A split virtqueue. The driver's settings come first, then `start`. See `Queue` for the other
    methods."""

    class State(DeviceState, version=1):
        size = U32
        desc = U64
        driver = U64
        device = U64
        ready = FLAG
        next_avail = U16
        next_used = U16
        in_flight = ListOf(Row(Int(0, MAX_SIZE - 1), U32))
        """[descriptor, progress] of each chain; at most as many as the queue has entries."""

    def __init__(self, memory: GuestMemory, max_size: int) -> None:
        if type(max_size) is not int or not 0 < max_size <= MAX_SIZE or max_size & (max_size - 1):
            raise DeviceError(f"a queue of {max_size!r} entries: expected a power of 2 to 32768")
        self._memory = memory
        self.max_size = max_size
        self._in_flight: dict[int, Chain] = {}
        self._ring: SplitRing | None = None
        self.reset()

    def reset(self) -> None:
        """Reset the queue. Chains in flight are forgotten, and pushing them does nothing."""
        self._release()
        self.size = self.max_size
        self.desc = 0
        self.driver = 0
        self.device = 0
        self.ready = False
        self._ring = None
        self._event_idx = False
        self._again: deque[tuple[int, int]] = deque()
        self._position = (0, 0)

    def start(self, *, event_idx: bool, indirect: bool) -> None:
        """Begin, or go on after `hold` or `load`. Raises `QueueError` if the driver's settings are
        not possible."""
        if self._ring is None:
            if self.size > self.max_size:
                raise QueueError(f"a queue of {self.size} entries, {self.max_size} are possible")
            ring = SplitRing(
                self._memory.table,
                self.size,
                self.desc,
                self.driver,
                self.device,
                event_idx=event_idx,
                indirect=indirect,
            )
            ring.struct.next_avail, ring.struct.next_used = self._position
            self._ring = ring
            self._event_idx = event_idx

    def stop(self) -> None:
        """The driver takes the queue back. The queue keeps its settings (4.2.2.2, QueueReady)."""
        size, places = self.size, (self.desc, self.driver, self.device)
        self.reset()
        self.size = size
        self.desc, self.driver, self.device = places

    def hold(self) -> None:
        """Take back the chains in flight, to be popped again. Their views are released."""
        self._again.extendleft(
            (chain.head, chain.done) for chain in reversed(self._in_flight.values())
        )
        self._release()

    def _release(self) -> None:
        """Release the chains in flight. Their memory is logged as dirty, because it may have been
        written."""
        for chain in self._in_flight.values():
            if self._ring is not None:
                self._ring.mark(chain.head)
            chain.release()
        self._in_flight.clear()

    @property
    def in_flight(self) -> int:
        """How many chains have been popped and not pushed."""
        return len(self._in_flight)

    def pop(self) -> Chain | None:
        """See `Queue`."""
        ring = self._ring
        if ring is None:
            return None
        done = 0
        if self._again:
            head, done = self._again[0]
            ring.walk(head)
            self._again.popleft()
        elif not ring.pop():
            return None
        return self._walked(ring, done)

    def _walked(self, ring: SplitRing, done: int) -> Chain:
        """The chain that was walked last, which is now in flight."""
        fields, parts, whole = ring.struct, ring.parts, self._memory.whole
        count = fields.readable
        end = 2 * (count + fields.writable)
        views = [whole[(at := parts[part]) : at + parts[part + 1]] for part in range(0, end, 2)]
        head = fields.head
        if head in self._in_flight:
            raise QueueError(f"descriptor {head} is made available while it is in use")
        chain = self._in_flight[head] = Chain(head, views[:count], views[count:], done)
        return chain

    def send(self, fd: int, is_socket: bool, most: int) -> tuple[int, Chain | None]:
        """See `Queue`."""
        ring = self._ring
        if ring is None or self._again:
            return 0, self.pop()
        pushed, is_cut = ring.send(fd, is_socket, most)
        return pushed, self._walked(ring, ring.struct.sent) if is_cut else None

    def push(self, chain: Chain, written: int) -> None:
        """See `Queue`. Does nothing with a chain that was taken back by `hold` or `reset`."""
        if self._ring is not None and self._in_flight.get(chain.head) is chain:
            # Before the push, because the guest may then make the chain available again.
            del self._in_flight[chain.head]
            self._ring.push(chain.head, written)

    def stage(self, chain: Chain, written: int) -> None:
        """See `Queue`. Does nothing where `push` does nothing."""
        if self._ring is not None and self._in_flight.get(chain.head) is chain:
            del self._in_flight[chain.head]
            self._ring.push(chain.head, written, more=True)

    def wants_interrupt(self) -> bool:
        """See `Queue`."""
        return self._ring is not None and self._ring.wants_interrupt()

    def listen(self) -> bool:
        """See `Queue`."""
        if self._ring is None:
            return False
        return self._ring.listen(True) or bool(self._again)

    def ignore(self) -> None:
        """See `Queue`."""
        # With EVENT_IDX it is enough not to ask again.
        if self._ring is not None and not self._event_idx:
            self._ring.listen(False)

    def save(self) -> dict[str, Any]:
        """The queue's state. Chains in flight are saved so that they are popped again."""
        avail, used = self._position
        if self._ring is not None:
            avail, used = self._ring.struct.next_avail, self._ring.struct.next_used
        flying = [*((c.head, c.done) for c in self._in_flight.values()), *self._again]
        return self.State.plain(
            size=self.size,
            desc=self.desc,
            driver=self.driver,
            device=self.device,
            ready=self.ready,
            next_avail=avail,
            next_used=used,
            in_flight=[list(pair) for pair in flying],
        )

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `save` returned. If this raises `DeviceError`, nothing was changed."""
        saved = self.State.load("a virtqueue", state)
        heads = {head for head, _ in saved.in_flight}
        if not len(heads) == len(saved.in_flight) <= self.max_size:
            raise saved.wrong("in_flight", f"up to {self.max_size} chains, each once")
        self.reset()
        self.size, self.ready = saved.size, saved.ready
        self.desc, self.driver, self.device = saved.desc, saved.driver, saved.device
        self._position = (saved.next_avail, saved.next_used)
        self._again.extend(saved.in_flight)
