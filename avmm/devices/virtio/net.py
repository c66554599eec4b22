"""The network device (VIRTIO 1.2, 5.1): one pair of queues between the guest and a `Backend`.

**Checksums.** The guest may leave checksums to the device, and may accept frames whose checksum is
not complete. Such frames go unchanged to backends that can handle them (a TAP); for the others,
the checksum is completed here.

**What waits.** A frame is received from the backend only after the one before it was given to the
guest. So if the guest gives no buffers, or has no driver yet, one frame waits here, and the others
wait at the backend, which has its own limit: a TAP's queue drops what does not fit, and a socket's
sender waits. If the backend accepts no frame, the guest's queue fills up.

A frame that waits here when the machine is saved is lost, as may happen on any Ethernet.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import trio

from avmm import chance
from avmm.ctrl_c import protected
from avmm.devices.state import DeviceState
from avmm.devices.virtio.device import GuestQueue, VirtioDevice
from avmm.devices.virtio.frame import MOST_BYTES, Backend, Frame
from avmm.devices.virtio.port import Waiters
from avmm.devices.virtio.queue import Chain
from avmm.options import DEFAULT_MTU, MTUS, parse_mac
from avmm.plain import FLAG, Bytes, Int

F_CSUM: Final = 1 << 0
F_GUEST_CSUM: Final = 1 << 1
F_MTU: Final = 1 << 3
F_MAC: Final = 1 << 5
F_MRG_RXBUF: Final = 1 << 15
F_STATUS: Final = 1 << 16
LINK_UP: Final = 1
_HEADER: Final = struct.Struct("<BBHHHHH")
_NEEDS_CSUM: Final = 1
_DATA_VALID: Final = 2
_GSO_NONE: Final = 0
_RX, _TX = 0, 1
_SHORTEST: Final = 14
_MOST_BUFFERS: Final = 64
"""How many buffers one frame for the guest may take. Linux's buffers hold 1500 bytes or more."""


class Net(VirtioDevice):
    """A network device whose other side is `backend`.

    `mac` is the guest's address; by default it is random, and a loaded state sets it. `mtu` is the
    longest packet, in bytes.
    """

    class State(DeviceState, version=1):
        mac = Bytes(least=6, most=6)
        mtu = Int(MTUS.least, MTUS.most)
        link = FLAG

    device_id: ClassVar[int] = 1
    features = F_CSUM | F_GUEST_CSUM | F_MTU | F_MAC | F_MRG_RXBUF | F_STATUS
    queue_sizes = (256, 256)

    def __init__(
        self, backend: Backend, *, mac: str | None = None, mtu: int = DEFAULT_MTU
    ) -> None:
        self.backend = backend
        # A locally administered address of one station, in the range that QEMU uses.
        self._has_given_mac = mac is not None
        self.mac = parse_mac(mac) if mac is not None else b"\x52\x54\0" + chance.random_bytes(3)
        """The guest's address, 6 bytes."""
        self.mtu = MTUS.check("mtu", mtu)
        self.dropped = 0
        """How many frames were dropped: malformed ones, those too long for the guest's buffers,
        and those that came while there was no link."""
        self._link_wanted = True
        self._plugged = backend.is_connected
        self._replugged = Waiters()
        """Wakes `run`: the backend may have to wait for somebody at the other end."""
        self._is_loaded = False
        self._is_served = False
        """Is there a driver that takes what is received? It may stand still now."""
        self._frame: Frame | None = None

    @property
    def name(self) -> str:
        return "net"

    @property
    def config(self) -> bytes:
        return struct.pack("<6sHHH", self.mac, LINK_UP if self.link_up else 0, 1, self.mtu)

    @property
    def link_up(self) -> bool:
        """Does the guest have a link? It does if the link is wanted and somebody is at the other
        end."""
        return self._link_wanted and self._plugged

    def set_link(self, up: bool) -> None:
        """Plug the guest's cable in, or pull it. While it is pulled, frames are dropped. Call it
        in trio."""
        self._change(up, self._plugged)

    def _change(self, wanted: bool, plugged: bool) -> None:
        before = self.link_up
        self._link_wanted, self._plugged = wanted, plugged
        if self.link_up is not before:
            self.link.config_changed()

    # -- queues --------------------------------------------------------------------------------

    @protected
    async def run(self) -> None:
        while True:
            if not self.backend.is_connected:
                await self.backend.connected()
                self._change(self._link_wanted, True)
            if self._is_served:
                await self._replugged.wait()
            else:
                await self._mind()

    async def _mind(self) -> None:
        """Without a driver nobody receives, and nobody would notice that the other end has
        gone."""
        async with trio.open_nursery() as nursery:

            @protected
            async def look() -> None:
                await self.backend.gone()
                self._change(self._link_wanted, self.backend.is_connected)
                nursery.cancel_scope.cancel()

            nursery.start_soon(look)
            await self._replugged.wait()
            nursery.cancel_scope.cancel()

    async def serve(self, queues: Mapping[int, GuestQueue], features: int) -> None:
        if self._is_loaded:  # the link may differ from what it was when the state was saved
            self._is_loaded = False
            self.link.config_changed()
        self._is_served = _RX in queues
        self._replugged.set()
        async with trio.open_nursery() as nursery:
            if _RX in queues:
                nursery.start_soon(self._receive, queues[_RX], features)
            if _TX in queues:
                nursery.start_soon(self._transmit, queues[_TX], features)

    @protected
    async def _transmit(self, queue: GuestQueue, features: int) -> None:
        """Send the guest's frames to the backend."""
        while True:
            chain = await queue.next()
            frame = _taken(chain, features)
            if frame is None or not self.link_up:
                self.dropped += 1
            else:
                try:
                    await self.backend.send(
                        frame if self.backend.completes else Frame(frame.complete())
                    )
                except trio.BrokenResourceError:
                    self.dropped += 1
                    self._change(self._link_wanted, False)
            queue.push(chain)

    @protected
    async def _receive(self, queue: GuestQueue, features: int) -> None:
        """Give the backend's frames to the guest."""
        chains: list[Chain] = []
        most = _MOST_BUFFERS if features & F_MRG_RXBUF else 1
        while True:
            if self._frame is None:
                try:
                    self._frame = await self.backend.receive()
                except trio.EndOfChannel:
                    self._change(self._link_wanted, False)
                    if self.backend.is_connected:
                        return
                    self._replugged.set()
                    continue
            frame = self._frame
            needed = _HEADER.size + len(frame.data)
            count = room = 0
            while count == 0 or (room < needed and count < most):
                if count == len(chains):
                    chains.append(await queue.next())
                room += chains[count].writable_bytes
                count += 1
            # There is no `await` from here to the end, so the frame is given exactly once.
            self._frame = None
            if room < needed or not self.link_up or not frame.is_sound:
                self.dropped += 1
                continue
            # A dropped frame may have left buffers here. Only as many as this one fills go: the
            # others stay (5.1.6.4).
            filled, chains = chains[:count], chains[count:]
            packet = memoryview(_packet(frame, features, count))
            for chain in filled:
                written = chain.put(packet)
                packet = packet[written:]
                queue.push(chain, written, more=chain is not filled[-1])

    # -- its life ------------------------------------------------------------------------------

    def reset(self) -> None:
        self._frame = None
        self._is_served = False
        self._replugged.set()

    async def release(self) -> None:
        await self.backend.release()

    async def acquire(self) -> None:
        await self.backend.acquire()
        self._change(self._link_wanted, self.backend.is_connected)
        self._replugged.set()

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(mac=self.mac, mtu=self.mtu, link=self._link_wanted)

    def load(self, state: Mapping[str, Any]) -> None:
        saved = self.State.load(self.name, state)
        if not self._has_given_mac:
            self.mac = saved.mac
        self.mtu, self._link_wanted, self._frame = saved.mtu, saved.link, None
        self._is_loaded = True


def _packet(frame: Frame, features: int, buffers: int) -> bytes:
    """The bytes that go to the guest: the header and the frame."""
    if frame.start is None:
        flags = _DATA_VALID if frame.is_valid and features & F_GUEST_CSUM else 0
        return _HEADER.pack(flags, _GSO_NONE, 0, 0, 0, 0, buffers) + frame.data
    if not features & F_GUEST_CSUM:
        return _HEADER.pack(0, _GSO_NONE, 0, 0, 0, 0, buffers) + frame.complete()
    places = (frame.start, frame.offset)
    return _HEADER.pack(_NEEDS_CSUM, _GSO_NONE, 0, 0, *places, buffers) + frame.data


def _taken(chain: Chain, features: int) -> Frame | None:
    """The frame that the guest sends. None if it is malformed."""
    header = chain.take(_HEADER.size)
    if len(header) < _HEADER.size or not _SHORTEST <= chain.readable_bytes <= MOST_BYTES:
        return None
    flags, gso, _, _, start, offset, _ = _HEADER.unpack(header)
    if gso != _GSO_NONE:
        return None
    data = chain.take(MOST_BYTES)
    if not flags & _NEEDS_CSUM:
        return Frame(data)
    frame = Frame(data, start, offset)
    return frame if features & F_CSUM and frame.is_sound else None
