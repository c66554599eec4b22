"""The console device with its ports (VIRTIO 1.2, 5.3).

A driver that does not know F_MULTIPORT sees only the first port. To other drivers, control
messages announce the ports (5.3.6.2). While messages wait for the driver, only the latest of each
kind is kept for each port. So a driver that asks and never reads costs no memory.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Final

import trio

from avmm.ctrl_c import protected
from avmm.devices.state import DeviceState
from avmm.devices.virtio.device import GuestQueue, VirtioDevice
from avmm.devices.virtio.port import Port, Waiters
from avmm.errors import ConfigError
from avmm.plain import MAPPING, U16, Bytes, Int, ListOf, OneOf, Row, Text

F_SIZE: Final = 1 << 0
F_MULTIPORT: Final = 1 << 1

DEVICE_READY: Final = 0
DEVICE_ADD: Final = 1
PORT_READY: Final = 3
CONSOLE_PORT: Final = 4
RESIZE: Final = 5
PORT_OPEN: Final = 6
PORT_NAME: Final = 7

_CONTROL: Final = struct.Struct("<IHH")
_CONTROL_IN, _CONTROL_OUT = 2, 3
_MOST_PORTS: Final = 31
"""As many as early versions of Linux accepted. Each port has two queues."""
_CHUNK: Final = 64 * 1024
_AT_ONCE: Final = 256 * 1024
"""How many bytes go straight to a sink while other tasks of the program wait."""
_SIDE: Final = 0xFFFF
_SENT: Final = (DEVICE_ADD, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME)
_LONGEST: Final = 8 + 255


class Console(VirtioDevice):
    """A console with these ports. The first port is the driver's console (hvc0).

    Without ports it gets one, a console named "hvc0". `columns` and `rows` are the size that the
    guest is told; `queue_size` is the number of entries of each queue. `rows_first` is for Linux
    before 6.15, which swaps rows and columns when it reads a new size (its commit 5326ab737a47).
    """

    class State(DeviceState, version=1):
        size = Row(U16, U16)
        """[columns, rows]"""
        ports = ListOf(Row(Text(), MAPPING), most=_MOST_PORTS)
        """[name, state], in the order of their numbers."""
        messages = ListOf(
            Row(OneOf(*_SENT), Int(0, _MOST_PORTS - 1), Bytes(least=_CONTROL.size, most=_LONGEST))
        )
        """[event, port, message]"""

    device_id: ClassVar[int] = 3
    features = F_SIZE | F_MULTIPORT

    def __init__(
        self,
        *ports: Port,
        columns: int = 80,
        rows: int = 25,
        queue_size: int = 16,
        rows_first: bool = False,
    ) -> None:
        ports = ports or (Port("hvc0", console=True),)
        if len(ports) > _MOST_PORTS:
            raise ConfigError(f"a console of {len(ports)} ports: expected at most {_MOST_PORTS}")
        self.ports = {port.name: port for port in ports}
        """The ports by name, in the order of their numbers."""
        if len(self.ports) != len(ports):
            raise ConfigError("two ports of a console have the same name")
        self._ports = ports
        self.queue_sizes = (queue_size,) * 2 * (len(ports) + 1)
        self._size = _checked_size(columns, rows)
        self._rows_first = rows_first
        self._messages: dict[tuple[int, int], bytes] = {}
        """The messages that wait for the driver: (event, port) → message, the oldest first."""
        self._told = Waiters()
        for number, port in enumerate(ports):
            port.on_close = partial(self._host_closed, number)

    @property
    def name(self) -> str:
        return "console"

    @property
    def config(self) -> bytes:
        return struct.pack("<HHII", *self._size, len(self._ports), 0)

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest that its terminal has this size now. Call it in trio."""
        self._size = _checked_size(columns, rows)
        for number, port in enumerate(self._ports):
            if port.is_console and port.ready:
                self._tell_size(number)
        self.link.config_changed()

    # -- queues ------------------------------------------------------------------------------

    async def serve(self, queues: Mapping[int, GuestQueue], features: int) -> None:
        multiport = bool(features & F_MULTIPORT)
        if not multiport and not self._ports[0].is_open:
            self._ports[0].set_open(True)
        async with trio.open_nursery() as nursery:
            for number, port in enumerate(self._ports if multiport else self._ports[:1]):
                first = 2 * number + 2 if number else 0
                if first in queues:
                    nursery.start_soon(self._receive, queues[first], port)
                if first + 1 in queues:
                    nursery.start_soon(self._transmit, queues[first + 1], port)
            if multiport and _CONTROL_IN in queues:
                nursery.start_soon(self._tell, queues[_CONTROL_IN])
            if multiport and _CONTROL_OUT in queues:
                nursery.start_soon(self._listen, queues[_CONTROL_OUT])

    @protected
    async def _receive(self, queue: GuestQueue, port: Port) -> None:
        """Move input from the host to the guest."""
        while True:
            await port.some_input()
            chain = await queue.next()
            # If the port was closed meanwhile, the chain is kept for its next input.
            data = await port.some_input()
            written = chain.put(data[: chain.writable_bytes])
            port.took(written)
            queue.push(chain, written)

    @protected
    async def _transmit(self, queue: GuestQueue, port: Port) -> None:
        """Move output from the guest to the host. `chain.done` counts the bytes as they are
        taken."""
        while True:
            await queue.let_others_run()
            sink = port.sink
            chain = queue.pop() if sink is None else queue.send(sink, _AT_ONCE)
            if chain is None:
                await queue.wait()
                continue
            chain.skip(chain.done)
            while chain.readable:
                if not (count := port.write_now(chain.first(_CHUNK))):
                    data = chain.take(min(await port.room(), _CHUNK))
                    port.give(data)
                    count = len(data)
                else:
                    chain.skip(count)
                chain.done += count
                if chain.readable:
                    await trio.lowlevel.checkpoint()
            queue.push(chain)

    # -- control messages --------------------------------------------------------------------

    @protected
    async def _listen(self, queue: GuestQueue) -> None:
        while True:
            chain = await queue.next()
            message = chain.take(_CONTROL.size)
            if len(message) == _CONTROL.size:
                self._told_by_driver(*_CONTROL.unpack(message))
            queue.push(chain)

    def _told_by_driver(self, number: int, event: int, value: int) -> None:
        if event == DEVICE_READY and value == 1:
            for each in range(len(self._ports)):
                self._say(each, DEVICE_ADD, 1)
        if number >= len(self._ports):
            return
        port = self._ports[number]
        if event == PORT_READY and value == 1:
            port.ready = True
            if port.is_console:
                self._say(number, CONSOLE_PORT, 1)
                self._tell_size(number)
            self._say(number, PORT_NAME, 1, port.name.encode())
            if port.is_connected:
                self._say(number, PORT_OPEN, 1)
        elif event == PORT_OPEN:
            port.set_open(value == 1)

    def _say(self, number: int, event: int, value: int, rest: bytes = b"") -> None:
        self._messages[event, number] = _CONTROL.pack(number, event, value) + rest
        self._told.set()

    def _tell_size(self, number: int) -> None:
        sides = reversed(self._size) if self._rows_first else self._size
        self._say(number, RESIZE, 0, struct.pack("<HH", *sides))

    def _host_closed(self, number: int) -> None:
        if self._ports[number].ready:
            self._say(number, PORT_OPEN, 0)

    @protected
    async def _tell(self, queue: GuestQueue) -> None:
        while True:
            while not self._messages:
                await self._told.wait()
            chain = await queue.next()
            key = next(iter(self._messages))
            queue.push(chain, chain.put(self._messages.pop(key)))

    # -- its life ------------------------------------------------------------------------------

    def reset(self) -> None:
        self._messages.clear()
        for port in self._ports:
            port.forget()

    def finish(self) -> None:
        for port in self._ports:
            port.finish()

    async def release(self) -> None:
        for port in self._ports:
            port.release()

    async def acquire(self) -> None:
        for port in self._ports:
            port.acquire()

    def save(self) -> Mapping[str, Any]:
        return self.State.plain(
            size=list(self._size),
            ports=[[port.name, port.save()] for port in self._ports],
            messages=[[*key, message] for key, message in self._messages.items()],
        )

    def load(self, state: Mapping[str, Any]) -> None:
        saved = self.State.load(self.name, state)
        if [name for name, _ in saved.ports] != list(self.ports):
            raise saved.wrong("ports", f"those of {', '.join(self.ports)}")
        ports = [
            port.check(port_state)
            for port, (_, port_state) in zip(self._ports, saved.ports, strict=True)
        ]
        messages = {(event, port): message for event, port, message in saved.messages}
        if len(messages) != len(saved.messages):
            raise saved.wrong("messages", "each control message once")
        if not all(port < len(self._ports) for _, port in messages):
            raise saved.wrong("messages", f"those of ports up to {len(self._ports) - 1}")
        self._size = saved.size
        self._messages = messages
        for port, port_state in zip(self._ports, ports, strict=True):
            port.load(port_state)
        self._told.set()


def _checked_size(columns: int, rows: int) -> tuple[int, int]:
    if not (0 <= columns <= _SIDE and 0 <= rows <= _SIDE):
        raise ConfigError(f"a terminal of {columns} by {rows}: expected at most 65535 each")
    return columns, rows
