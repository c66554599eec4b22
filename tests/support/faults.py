"""A line between the two sides of a migration on which something goes wrong, once.

    line = Line(Fault("corrupt", "there", message=Message.STATE))
    async with line.open():
        ...  vm.migrate(line.source) ... avmm.receive(line.destination)

`there` is from the source to the destination, `back` the other way. A fault happens at a byte,
counted from the beginning, or from that of the first message of a kind, or of a later one (from
its end, where that is negative), or not at all where less is said.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import trio
import trio.testing

from avmm.transfer.frames import HEADER_BYTES
from avmm.transfer.frames import MessageKind as Message

MessageKind = Literal["none", "cut", "end", "stall", "double", "lose", "corrupt"]
KINDS: tuple[MessageKind, ...] = ("cut", "end", "stall", "double", "lose", "corrupt")
Way = Literal["there", "back"]
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Fault:
    """`cut`: both ways are closed; `end`: this way is; `stall`: nothing more goes this way;
    the rest is done to one byte, `double` to all that has come with it."""

    kind: MessageKind = "none"
    way: Way = "there"
    at: int = 0
    message: Message | None = None
    number: int = 0
    """Which of that kind, from 0."""


class Frames:
    """The frames of one way, as its bytes come."""

    def __init__(self) -> None:
        self.end = 0
        self.seen = defaultdict[int, list[tuple[int, int]]](list)
        """Where those of each kind begin and end."""
        self._head = b""
        self._payload_left = 0

    def feed(self, data: bytes) -> None:
        while data:
            skipped = min(self._payload_left, len(data))
            self._payload_left -= skipped
            data = data[skipped:]
            missing = HEADER_BYTES - len(self._head)
            self._head, data = self._head + data[:missing], data[missing:]
            if len(self._head) == HEADER_BYTES:
                self._payload_left = int.from_bytes(self._head[4:8], "little")
                start, self.end = self.end, self.end + HEADER_BYTES + self._payload_left
                self.seen[self._head[0]].append((start, self.end))
                self._head = b""


class Line:
    """The two ends, `source` and `destination`, and what has gone over between them."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.has_happened = False
        self.why = ""
        """What became of the migration, for messages."""
        self.source, self._near = trio.testing.memory_stream_pair()
        self.destination, self._far = trio.testing.memory_stream_pair()
        self.frames = {"there": Frames(), "back": Frames()}

    @property
    def gone(self) -> dict[str, int]:
        """Bytes that each side has said in whole frames, or begun."""
        return {way: frames.end for way, frames in self.frames.items()}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """It carries while the block runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, "there", self._near, self._far)
            nursery.start_soon(self._carry, "back", self._far, self._near)
            yield
            nursery.cancel_scope.cancel()
        for stream in (self.source, self._near, self._far, self.destination):
            await trio.aclose_forcefully(stream)

    async def _carry(
        self, way: Way, near: trio.abc.Stream, far: trio.StapledStream[object, object]
    ) -> None:
        said = 0
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := bytes(await near.receive_some(_CHUNK)):
                self.frames[way].feed(data)
                at = self._place(way)
                if at is not None and said <= at < said + len(data):
                    await far.send_all(data[: at - said])
                    self.has_happened = True
                    await self._do(data[at - said :], far)
                else:
                    await far.send_all(data)
                said += len(data)
            await far.send_eof()

    def _place(self, way: Way) -> int | None:
        """The byte at which it is to happen, as soon as that is known."""
        fault = self.fault
        if self.has_happened or fault.way != way or fault.kind == "none":
            return None
        if fault.message is None:
            return fault.at
        seen = self.frames[way].seen.get(fault.message, [])
        if len(seen) <= fault.number:
            return None
        start, end = seen[fault.number]
        return fault.at + (start if fault.at >= 0 else end)

    async def _do(self, data: bytes, far: trio.StapledStream[object, object]) -> None:
        kind = self.fault.kind
        if kind == "cut":
            await trio.aclose_forcefully(self._near)
            await trio.aclose_forcefully(self._far)
        elif kind == "end":
            await far.send_eof()
        if kind in ("cut", "end", "stall"):
            await trio.sleep_forever()
        if kind == "double":
            await far.send_all(data)
            await far.send_all(data)
        elif kind == "lose":
            await far.send_all(data[1:])
        else:
            await far.send_all(bytes([data[0] ^ 0x10]) + data[1:])
