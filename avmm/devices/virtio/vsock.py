"""The socket device (VIRTIO 1.2, 5.10): connections between programs in the guest and the host.

    stream = await vm.vsock.connect(1024)               # the guest listens at port 1024
    async with vm.vsock.listen(5000) as listener:       # the guest connects to host port 5000
        await trio.serve_listeners(handle, [listener])

Only streams are supported, not SEQPACKET. The host has CID 2.

**Bounds.** `avmm.devices.virtio.vsock_stream` bounds what a connection holds. There are at most
`MOST` connections, and a listener holds at most `BACKLOG` that nobody has accepted yet; more are
refused with a reset. Resets that the guest does not fetch are kept up to a limit; beyond it, the
guest's own packets wait (5.10.6.1.1).

**After a load** there are no connections: before anything else, a TRANSPORT_RESET event tells the
guest that all its connections are gone and that it should read its CID again (5.10.6.6). So the
saved state is empty, and the machine may be loaded with another CID.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections import OrderedDict, deque
from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Final

import trio

from avmm.ctrl_c import protected
from avmm.devices import sockets
from avmm.devices.state import DeviceState
from avmm.devices.virtio import vsock_unix
from avmm.devices.virtio.device import GuestQueue, VirtioDevice
from avmm.devices.virtio.port import Waiters
from avmm.devices.virtio.queue import Chain
from avmm.devices.virtio.vsock_stream import BOTH, BUFFER, Op, VsockStream
from avmm.options import CIDS
from avmm.threads import in_thread, in_thread_shielded

HOST_CID: Final = 2
F_STREAM: Final = 1 << 0
MOST: Final = 1024
"""The most connections at the same time."""
BACKLOG: Final = 128
_HEADER: Final = struct.Struct("<QQIIIHHIII")
_STREAM: Final = 1
_RX, _TX, _EVENT = 0, 1, 2
_TRANSPORT_RESET: Final = bytes(4)
_REPLIES: Final = 256
_LINGER_SECONDS: Final = 8.0
"""How many seconds the guest has to confirm the end of a connection; the same as in Linux's own
close."""
_WORD: Final = 0xFFFF_FFFF
_FIRST_PORT: Final = 1 << 30
"""The first port number for the host's end of connections to the guest. It is far from the numbers
that people choose."""
_ANY_PORT: Final = _WORD


class VsockListener(trio.abc.Listener[VsockStream]):
    """The guest's connections to one port of the host; see `Vsock.listen`."""

    def __init__(self, vsock: Vsock, port: int | None) -> None:
        self._vsock = vsock
        self.port = port
        """None for a listener on every port at which nobody else listens."""
        self._waiting: deque[VsockStream] = deque()
        self._changed = Waiters()
        self._closed = False

    @protected
    async def accept(self) -> VsockStream:
        """The next connection. Cancelling loses none."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise trio.ClosedResourceError("this listener was closed")
            if self._waiting:
                return self._waiting.popleft()
            await self._changed.wait()

    async def aclose(self) -> None:
        """Stop listening. Connections that were not accepted are reset."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """As `aclose`, for code that is not async. Does nothing the second time."""
        if not self._closed:
            self._closed = True
            self._vsock.forget_listener(self)
            for stream in self._waiting:
                stream.refuse()
                stream.close()
            self._waiting.clear()
            self._changed.set()

    def offer(self, stream: VsockStream) -> bool:
        """Queue a connection from the guest. Returns whether there is room for it."""
        while self._waiting and self._waiting[0].is_gone:
            self._waiting.popleft().close()
        if len(self._waiting) >= BACKLOG:
            return False
        if self.port is not None:
            stream.accept()
        self._waiting.append(stream)
        self._changed.set()
        return True


class Vsock(VirtioDevice):
    """A socket device. The guest's address is `cid`, 3 or more (`avmm.options.CIDS`).

    `unix` is the path at which its sockets appear as unix sockets; see
    `avmm.devices.virtio.vsock_unix`. With `held` False they do not appear before `acquire`.
    """

    class State(DeviceState, version=1):
        """Nothing but the version, because all connections are reset."""

    device_id: ClassVar[int] = 19
    features = F_STREAM
    queue_sizes = (128, 128, 8)

    def __init__(
        self, cid: int = CIDS.least, *, unix: str | PathLike[str] | None = None, held: bool = True
    ) -> None:
        self.cid = CIDS.check("vsock cid", cid)
        self._unix = unix
        self._is_acquired = trio.Event()
        if held:
            self._is_acquired.set()
        self._listener: socket.socket | None = None
        """The socket at `unix`, from `acquire` until it is served."""
        self._serving = trio.CancelScope()
        self._served = trio.Event()
        self._served.set()
        self._streams: dict[tuple[int, int], VsockStream] = {}
        """The connections that the guest may know of, by (host port, guest port)."""
        self._held = 0
        """How many streams there are that somebody on the host holds or the guest may know of."""
        self._listeners: dict[int, VsockListener] = {}
        self._due: OrderedDict[VsockStream, None] = OrderedDict()
        self._some = Waiters()
        self._replies: deque[tuple[int, int]] = deque()
        self._sent = Waiters()
        self._closing: OrderedDict[VsockStream, None] = OrderedDict()
        self._has_closing = Waiters()
        self._next_port = _FIRST_PORT
        self._tell_reset = False
        self._finished = False

    @property
    def name(self) -> str:
        return "vsock"

    @property
    def config(self) -> bytes:
        return struct.pack("<Q", self.cid)

    # -- the host's side -----------------------------------------------------------------------

    @protected
    async def connect(self, port: int) -> VsockStream:
        """Connect to `port` in the guest.

        Waits if the guest's driver does not run yet. Raises `ConnectionRefusedError` if nobody in
        the guest listens there or if the guest ends, and `OSError` (EMFILE) if there are already
        as many connections as possible. If it is cancelled, there is no connection.
        """
        stream = self.request(port)
        try:
            await stream.connected()
        except BaseException:
            stream.close()
            raise
        return stream

    def request(self, port: int) -> VsockStream:
        """Ask for a connection. This is `connect` without the waiting."""
        if type(port) is not int or not 0 <= port < _ANY_PORT:
            raise ValueError(f"vsock port {port!r}: expected a number below {_ANY_PORT:#x}")
        if self._finished:
            raise ConnectionRefusedError("the guest has ended")
        if self._held >= MOST:
            raise OSError(errno.EMFILE, f"the guest has {MOST} connections already")
        while (self._next_port, port) in self._streams or self._next_port in self._listeners:
            self._count_port()
        host_port = self._next_port
        self._count_port()
        stream = self._add(host_port, port, offered=False)
        self._make_due(stream)
        return stream

    def _count_port(self) -> None:
        self._next_port = self._next_port + 1 if self._next_port < _ANY_PORT - 1 else _FIRST_PORT

    def listen(self, port: int | None) -> VsockListener:
        """Accept the guest's connections to `port`, from now on until the listener is closed.

        With None it accepts connections to all ports at which nobody else listens; answer each of
        them with its `accept` or `refuse`. Raises `OSError` (EADDRINUSE) if somebody already
        listens.
        """
        if port is not None and (type(port) is not int or not 0 <= port < _ANY_PORT):
            raise ValueError(f"vsock port {port!r}: expected a number below {_ANY_PORT:#x}")
        key = _ANY_PORT if port is None else port
        if key in self._listeners:
            raise OSError(errno.EADDRINUSE, f"somebody listens at vsock port {port} already")
        listener = self._listeners[key] = VsockListener(self, port)
        return listener

    def forget_listener(self, listener: VsockListener) -> None:
        """A listener was closed."""
        del self._listeners[_ANY_PORT if listener.port is None else listener.port]

    # -- connections ---------------------------------------------------------------------------

    def _add(self, host_port: int, guest_port: int, *, offered: bool) -> VsockStream:
        stream = VsockStream(
            host_port, guest_port, offered=offered, due=self._make_due, closed=self._forget_if_gone
        )
        self._streams[host_port, guest_port] = stream
        self._held += 1
        return stream

    def _make_due(self, stream: VsockStream) -> None:
        self._due.setdefault(stream)
        self._some.set()

    def _forget_if_gone(self, stream: VsockStream) -> None:
        """A connection keeps its ports as long as the guest may know of it, and counts as long as
        the host holds it."""
        key = (stream.host_port, stream.guest_port)
        if stream.is_gone:
            if self._streams.get(key) is stream:
                del self._streams[key]
            self._due.pop(stream, None)
            self._closing.pop(stream, None)
            if stream.is_closed and stream.is_counted:
                stream.is_counted = False
                self._held -= 1

    def _lose(self, stream: VsockStream) -> None:
        stream.lose()
        self._forget_if_gone(stream)

    # -- queues --------------------------------------------------------------------------------

    @protected
    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reap)
            while self._unix is not None:
                while not self._is_acquired.is_set():  # it may have been released since
                    await self._is_acquired.wait()
                self._serving, self._served = trio.CancelScope(), trio.Event()
                try:
                    with self._serving:
                        listener, self._listener = self._listener, None
                        if listener is None:
                            listener = await in_thread(vsock_unix.listen, self._unix)
                        await vsock_unix.serve_sockets(self, listener, self._unix)
                finally:
                    self._served.set()

    @protected
    async def _reap(self) -> None:
        """After a while, reset connections whose end the guest does not confirm."""
        while True:
            while not self._closing:
                await self._has_closing.wait()
            stream = next(iter(self._closing))
            await trio.sleep_until(stream.deadline)
            self._closing.pop(stream, None)
            stream.refuse()

    async def serve(self, queues: Mapping[int, GuestQueue], features: int) -> None:
        async with trio.open_nursery() as nursery:
            if _TX in queues:
                nursery.start_soon(self._receive, queues[_TX])
            if self._tell_reset and _EVENT in queues:
                chain = await queues[_EVENT].next()
                queues[_EVENT].push(chain, chain.put(_TRANSPORT_RESET))
            self._tell_reset = False
            if _RX in queues:
                nursery.start_soon(self._send, queues[_RX])

    @protected
    async def _send(self, queue: GuestQueue) -> None:
        """Send packets to the guest: replies first, then those of the connections in turn."""
        chain: Chain | None = None
        while True:
            while not (self._replies or self._due):
                await self._some.wait()
            if chain is None:
                chain = await queue.next()
                continue  # the packet that was due may be gone meanwhile
            room = chain.writable_bytes - _HEADER.size
            if room < 0:
                queue.push(chain)
            elif self._replies:
                host_port, guest_port = self._replies.popleft()
                self._sent.set()
                header = self._header(host_port, guest_port, Op.RST, 0, 0, 0)
                queue.push(chain, chain.put(header))
            elif (packet := self._next_packet(room)) is not None:
                queue.push(chain, chain.put(packet))
            else:
                continue
            chain = None

    def _header(
        self, host_port: int, guest_port: int, op: Op, flags: int, length: int, forwarded: int
    ) -> bytes:
        ports = (HOST_CID, self.cid, host_port, guest_port)
        return _HEADER.pack(*ports, length, _STREAM, op, flags, BUFFER, forwarded)

    def _next_packet(self, room: int) -> bytes | None:
        stream, _ = self._due.popitem(last=False)
        if not stream.is_due:
            return None
        op, flags, data = stream.next_packet(room)
        if op == Op.SHUTDOWN and flags == BOTH:
            stream.deadline = trio.current_time() + _LINGER_SECONDS
            self._closing.setdefault(stream)
            self._has_closing.set()
        ports = (stream.host_port, stream.guest_port)
        header = self._header(*ports, op, flags, len(data), stream.told())
        if stream.is_due:
            self._make_due(stream)
        self._forget_if_gone(stream)
        return header + data

    @protected
    async def _receive(self, queue: GuestQueue) -> None:
        """Take packets from the guest."""
        while True:
            while len(self._replies) >= _REPLIES:
                await self._sent.wait()
            chain = await queue.next()
            self._take(chain)
            queue.push(chain)

    def _take(self, chain: Chain) -> None:
        data = chain.take(_HEADER.size)
        if len(data) < _HEADER.size:
            return
        cid, to, guest_port, host_port, length, kind, op, flags, room, taken = _HEADER.unpack(data)
        if cid != self.cid or to != HOST_CID:
            return  # 5.10.6.4: nobody is there to answer
        stream = self._streams.get((host_port, guest_port))
        if op == Op.RST:
            if stream is not None:
                self._lose(stream)
            return
        # Never more than the credit that the guest was given, whatever the packet says.
        data = chain.take(min(length, BUFFER + 1)) if op == Op.RW else b""
        valid = kind == _STREAM and (op != Op.RW or len(data) == length)
        if op == Op.REQUEST and valid:
            self._take_request(host_port, guest_port, stream, room, taken)
        elif stream is None:
            self._replies.append((host_port, guest_port))
            self._some.set()
        elif not (valid and stream.take(op, flags, data, room, taken)):
            stream.refuse()
        if stream is not None:
            self._forget_if_gone(stream)

    def _take_request(
        self, host_port: int, guest_port: int, old: VsockStream | None, room: int, taken: int
    ) -> None:
        if old is not None:
            self._lose(old)
        # If the host has closed the old connection, the guest may reuse its port. Otherwise it
        # asks twice for the same connection.
        is_free = old is None or old.is_closed
        listener = self._listeners.get(host_port) or self._listeners.get(_ANY_PORT)
        if listener is not None and self._held < MOST and is_free:
            stream = self._add(host_port, guest_port, offered=True)
            stream.take_credit(room, taken)
            if listener.offer(stream):
                return
            self._lose(stream)
            stream.close()
        self._replies.append((host_port, guest_port))
        self._some.set()

    # -- its life ------------------------------------------------------------------------------

    def reset(self) -> None:
        for stream in list(self._streams.values()):
            if not stream.is_unanswered:
                self._lose(stream)
        self._replies.clear()
        self._sent.set()
        self._tell_reset = False

    def finish(self) -> None:
        self._finished = True
        for stream in list(self._streams.values()):
            self._lose(stream)

    async def release(self) -> None:
        if self._unix is not None and self._is_acquired.is_set():
            self._is_acquired = trio.Event()
            listener, self._listener = self._listener, None
            if listener is not None:
                await in_thread_shielded(sockets.close, listener, self._unix)
            self._serving.cancel()
            await self._served.wait()

    async def acquire(self) -> None:
        if self._unix is not None and not self._is_acquired.is_set():
            # Done here, where it can still be refused, and not when the guest runs.
            self._listener = await in_thread(vsock_unix.listen, self._unix)
        self._is_acquired.set()

    def close(self) -> None:
        """Close the sockets that `acquire` opened and that nobody serves. Whoever made the device
        calls this. Idempotent."""
        if self._listener is not None and self._unix is not None:
            sockets.close(self._listener, self._unix)
            self._listener = None

    def save(self) -> Mapping[str, Any]:
        return self.State.plain()

    def load(self, state: Mapping[str, Any]) -> None:
        self.State.load(self.name, state)
        self.reset()
        self._tell_reset = True
