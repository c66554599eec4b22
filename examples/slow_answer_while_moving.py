"""A device awaits a slow server while its guest moves. The server is asked once, and its answer
reaches the guest.

The guest moves within this program, over a pair of sockets. Any trio stream would do.
"""

import socket
from collections.abc import Mapping
from functools import partial
from typing import Any

import trio

import avmm

REGISTER = 0xD000_0000


class RemoteRegister(avmm.Device):
    """A read of this register asks the server and awaits its answer. It counts its reads."""

    class State(avmm.DeviceState, version=1):
        reads = avmm.plain.U64

    def __init__(self, port: int) -> None:
        self.port = port
        self.reads = 0

    async def read(self, offset: int, size: int) -> int:
        self.reads += 1
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as server:
            return int.from_bytes(await server.receive_some(4), "little")

    def save(self) -> Mapping[str, Any]:
        # A read that is under way is finished before anything is saved.
        return self.State.plain(reads=self.reads)

    def load(self, state: Mapping[str, Any]) -> None:
        self.reads = self.State.load(self.name, state).reads


class Server:
    """The server: take a second, then send the temperature."""

    def __init__(self) -> None:
        self.questions = 0
        self.is_asked = trio.Event()

    async def answer(self, client: trio.SocketStream) -> None:
        async with client:
            self.questions += 1
            self.is_asked.set()
            await trio.sleep(1)
            await client.send_all((21).to_bytes(4, "little"))


async def leave(vm: avmm.Machine, line: trio.SocketStream) -> None:
    report = await vm.migrate(line)
    print(f"moved: {report.total:.1f} s, of which it stood still for {report.downtime:.3f} s")


async def main() -> None:
    server = Server()
    lines = [trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in socket.socketpair()]
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(
            partial(trio.serve_tcp, server.answer, 0, host="127.0.0.1")
        )
        port = listener.socket.getsockname()[1]

        here, there = RemoteRegister(port), RemoteRegister(port)
        async with avmm.Machine(devices=[avmm.mmio(here, REGISTER, 4)]) as vm:
            await vm.console.send_all(f"peek.l {REGISTER:#x}\rexit\r".encode())
            await server.is_asked.wait()
            nursery.start_soon(leave, vm, lines[0])
            devices = [avmm.mmio(there, REGISTER, 4)]
            async with avmm.receive(lines[1], devices=devices) as moved:
                said = b"".join([data async for data in vm.console])
                said += b"".join([data async for data in moved.console])
        print(said.decode())
        print(f"questions: {server.questions}, reads: {there.reads}")
        nursery.cancel_scope.cancel()


trio.run(main)
