"""A connection between a guest's socket and the host (VIRTIO 1.2, 5.10.6): a trio stream.

Both directions are bounded. **To the guest**: `send_all` fills a buffer, and waits while it is
full. The device sends from it as much as the guest has room for, by the credit that the guest
reports (5.10.6.3). **From the guest**: at most `BUFFER` bytes wait to be received. If the guest
sends more, the connection breaks.

Everything here runs in trio, so there is no lock.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from typing import Final

import trio

from avmm.ctrl_c import protected
from avmm.devices.console import OneTask
from avmm.devices.virtio.port import Waiters

BUFFER: Final = 256 * 1024
"""The most bytes from the guest that wait to be received; the same as for Linux's own sockets."""
_OUTPUT: Final = 64 * 1024
"""The most bytes accepted by `send_all` that wait for the guest's credit and buffers."""
_MOST: Final = 64 * 1024
"""The longest packet, in bytes; the same as for Linux."""
_WORD: Final = 0xFFFF_FFFF
_WINDOW: Final = 1 << 30
"""The most bytes under way at any time. The limit makes 32-bit counters comparable."""
NO_MORE_RECEIVED: Final = 1
NO_MORE_SENT: Final = 2
BOTH: Final = NO_MORE_RECEIVED | NO_MORE_SENT


class Op(enum.IntEnum):
    """What a packet is for (5.10.6)."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class _Stage(enum.Enum):
    REQUESTED = enum.auto()
    """The host has asked, the guest has not answered."""
    OFFERED = enum.auto()
    """The guest has asked, the host has not answered."""
    OPEN = enum.auto()
    GONE = enum.auto()
    """The guest does not know the connection, or no longer knows it. Data that came before can
    still be received."""


class VsockStream(trio.abc.HalfCloseableStream):
    """The host's end of a connection. One task may send and one may receive at a time.

    When the guest has gone (its driver was reset, its machine loaded from a state, or it reset the
    connection), data that came before can still be received. After that `receive_some` raises
    `trio.BrokenResourceError`; `send_all` raises it at once.
    """

    def __init__(
        self,
        host_port: int,
        guest_port: int,
        *,
        offered: bool,
        due: Callable[[VsockStream], None],
        closed: Callable[[VsockStream], None],
    ) -> None:
        self.host_port = host_port
        self.guest_port = guest_port
        self._stage = _Stage.OFFERED if offered else _Stage.REQUESTED
        self._on_due = due
        self._on_closed = closed
        self._ops = set[Op]() if offered else {Op.REQUEST}
        """Packets without data that are to be sent; at most one of each kind."""
        self._requested = False
        self._refused = False
        self._input = bytearray()
        self._output = bytearray()
        self._guest_sends = self._guest_receives = True
        self._ending = self._deaf = False
        self._closed = False
        self._shut = 0
        # 32-bit counters that wrap: bytes sent, and how many of these the guest has taken; bytes
        # received here, and the last count of these that the guest was told.
        self._sent = self._taken = self._room = 0
        self._forwarded = self._told = 0
        self._asked = False
        self._sending = OneTask("sending to this connection")
        self._receiving = OneTask("receiving from this connection")
        self._changed = Waiters()
        self.deadline = float("inf")
        """The time at which the device stops waiting for the guest to confirm the end."""
        self.is_counted = True
        """For the device: is this connection counted?"""

    def __repr__(self) -> str:
        return f"<VsockStream host port {self.host_port}, guest port {self.guest_port}>"

    # -- the host's side -----------------------------------------------------------------------

    @protected
    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data`; returns when all of it is accepted for delivery. If this is cancelled, an
        unknown part of it was accepted. Raises as trio's streams do."""
        with self._sending, memoryview(data).cast("B") as view:
            await trio.lowlevel.checkpoint()
            at = 0
            while True:
                self._check_sendable()
                part = view[at : at + max(0, _OUTPUT - len(self._output))]
                self._output += part
                at += len(part)
                self._tell()
                if at == len(view):
                    return
                await self._changed.wait()

    @protected
    async def wait_send_all_might_not_block(self) -> None:
        """Wait until at least one byte would be accepted at once, or sending would fail."""
        with self._sending:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("this connection was closed")
            while self._is_sendable and len(self._output) >= _OUTPUT:
                await self._changed.wait()

    @protected
    async def send_eof(self) -> None:
        """Tell the guest, after what was accepted, that nothing more will be sent."""
        with self._sending:
            if self._closed:
                raise trio.ClosedResourceError("this connection was closed")
            self._ending = True
            self._tell()
            await trio.lowlevel.checkpoint()

    def stop_receiving(self) -> None:
        """Tell the guest that nothing more will be received. What it has sent is thrown away, and
        `receive_some` returns b"". Does nothing the second time."""
        if not self._deaf:
            self._deaf = True
            self._forward(len(self._input))
            self._input.clear()
            self._changed.set()
            self._tell()

    @protected
    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for data: at least one byte, at most `max_bytes`, or b"" once the guest sends no
        more. Cancelling loses nothing."""
        if max_bytes is not None and (max_bytes := operator.index(max_bytes)) < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            while True:
                if self._closed:
                    raise trio.ClosedResourceError("this connection was closed")
                if self._input:
                    data = bytes(self._input if max_bytes is None else self._input[:max_bytes])
                    del self._input[: len(data)]
                    self._forward(len(data))
                    return data
                if self._deaf or not self._guest_sends:
                    return b""
                if self._stage is _Stage.GONE:
                    raise trio.BrokenResourceError("the guest has reset the connection")
                await self._changed.wait()

    @protected
    async def aclose(self) -> None:
        """Close the connection. Data that was accepted still reaches a guest that reads it. Never
        waits."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """As `aclose`, for code that is not async. Does nothing the second time."""
        if self._closed:
            return
        self._closed = True
        self._forward(len(self._input))
        self._input.clear()
        if self._stage is _Stage.OPEN:
            self._tell()
        elif self._stage is not _Stage.GONE:
            self.refuse()
        self._changed.set()
        self._on_closed(self)

    @property
    def _is_sendable(self) -> bool:
        return self._stage is _Stage.OPEN and self._guest_receives and not self._closed

    def _check_sendable(self) -> None:
        if self._closed or self._ending:
            raise trio.ClosedResourceError("this connection was closed")
        if not self._is_sendable:
            raise trio.BrokenResourceError("the guest receives no more")

    def _forward(self, count: int) -> None:
        self._forwarded = self._forwarded + count & _WORD
        # The credit is not sent at once, because a packet for each read would cost the guest more
        # than the reading.
        untold = self._forwarded - self._told & _WORD
        if untold >= BUFFER // 4 and self._stage is _Stage.OPEN:
            self._ops.add(Op.CREDIT_UPDATE)
            self._tell()

    def _tell(self) -> None:
        if self.is_due:
            self._on_due(self)

    # -- the device's side ---------------------------------------------------------------------

    async def connected(self) -> None:
        """Return when the guest has accepted. Raises `ConnectionRefusedError` if it does not."""
        while self._stage is _Stage.REQUESTED:
            await self._changed.wait()
        if self._refused or self._closed:
            raise ConnectionRefusedError(
                f"nobody in the guest accepts connections at vsock port {self.guest_port}"
            )

    def accept(self) -> None:
        """Tell the guest that it is connected. Does nothing if the guest has gone meanwhile."""
        if self._stage is _Stage.OFFERED:
            self._stage = _Stage.OPEN
            self._ops.add(Op.RESPONSE)
            self._tell()

    def refuse(self) -> None:
        """End the connection with a reset. Data that is buffered for the guest is dropped."""
        if self._stage is _Stage.GONE:
            return
        known = self._stage is not _Stage.REQUESTED or self._requested
        self.lose()
        if known:
            self._ops.add(Op.RST)
            self._tell()

    def lose(self) -> None:
        """The guest no longer knows the connection."""
        self._refused |= self._stage is _Stage.REQUESTED
        self._stage = _Stage.GONE
        self._output.clear()
        self._ops.clear()
        self._changed.set()

    @property
    def is_gone(self) -> bool:
        """Has it ended, with nothing left to tell the guest?"""
        return self._stage is _Stage.GONE and not self._ops

    @property
    def has_ended(self) -> bool:
        """Does the guest no longer know the connection? Data that came before may be left."""
        return self._stage is _Stage.GONE

    @property
    def is_closed(self) -> bool:
        """Has the host closed it?"""
        return self._closed

    @property
    def is_unanswered(self) -> bool:
        """Is the guest still to be asked for the connection? If so, a restarted guest can be asked
        too."""
        return self._stage is _Stage.REQUESTED and not self._requested

    @property
    def _credit(self) -> int:
        return min(self._room, _WINDOW) - (self._sent - self._taken & _WORD)

    @property
    def _wanted_shut(self) -> int:
        if self._stage is not _Stage.OPEN:
            return 0
        sent_all = (self._closed or self._ending) and not self._output
        return (NO_MORE_SENT if sent_all else 0) | (
            # A guest that learns this early might reset the connection, with output under way.
            NO_MORE_RECEIVED if self._deaf or (self._closed and sent_all) else 0
        )

    @property
    def is_due(self) -> bool:
        """Is there something to be sent to the guest now?"""
        if self._ops or self._wanted_shut & ~self._shut:
            return True
        return bool(self._output) and (self._credit > 0 or not self._asked)

    def next_packet(self, most: int) -> tuple[Op, int, bytes]:
        """What to send next if something `is_due`: (op, flags, data of at most `most` bytes)."""
        for op in (Op.RST, Op.REQUEST, Op.RESPONSE):
            if op in self._ops:
                self._ops.remove(op)
                self._requested |= op is Op.REQUEST
                return op, 0, b""
        count = min(len(self._output), self._credit, most, _MOST)
        if count > 0:
            data = bytes(self._output[:count])
            del self._output[:count]
            self._sent = self._sent + count & _WORD
            self._changed.set()
            return Op.RW, 0, data
        if (shut := self._wanted_shut) & ~self._shut:
            self._shut |= shut
            return Op.SHUTDOWN, self._shut, b""
        if self._output and self._credit <= 0 and not self._asked:
            self._asked = True
            return Op.CREDIT_REQUEST, 0, b""
        self._ops.discard(Op.CREDIT_UPDATE)
        return Op.CREDIT_UPDATE, 0, b""

    def told(self) -> int:
        """How many of the guest's bytes were taken. Every packet carries this number."""
        self._told = self._forwarded
        self._ops.discard(Op.CREDIT_UPDATE)
        return self._forwarded

    def take(self, op: int, flags: int, data: bytes, room: int, taken: int) -> bool:
        """Take a packet from the guest, with its credit. Returns False if it breaks the rules."""
        if not self.take_credit(room, taken):
            return False
        if op == Op.RESPONSE and self._stage is _Stage.REQUESTED and self._requested:
            self._stage = _Stage.OPEN
            self._changed.set()
        elif self._stage is not _Stage.OPEN:
            return False
        elif op == Op.RW:
            return self._take_data(data)
        elif op == Op.SHUTDOWN:
            self._guest_receives &= not flags & NO_MORE_RECEIVED
            self._guest_sends &= not flags & NO_MORE_SENT
            if not self._guest_receives:
                self._output.clear()
            self._changed.set()
            if not (self._guest_sends or self._guest_receives):
                self.refuse()  # 5.10.6.5: a reset confirms the end
        elif op == Op.CREDIT_REQUEST:
            self._ops.add(Op.CREDIT_UPDATE)
        elif op != Op.CREDIT_UPDATE:
            return False
        self._tell()
        return True

    def take_credit(self, room: int, taken: int) -> bool:
        """Take the guest's report about its buffer. False if the report is impossible."""
        under_way = self._sent - self._taken & _WORD
        if (self._sent - taken & _WORD) <= under_way:
            self._taken = taken
        elif (taken - self._sent & _WORD) <= _WINDOW:
            return False  # it claims to have taken more than was sent
        # Otherwise the report is older than the last one: Linux's senders overtake each other.
        self._room = room
        if self._credit > 0:
            self._asked = False
        return True

    def _take_data(self, data: bytes) -> bool:
        if not self._guest_sends or len(self._input) + len(data) > BUFFER:
            return False
        if self._closed or self._deaf:
            self._forward(len(data))
        else:
            self._input += data
            self._changed.set()
        self._tell()
        return True
