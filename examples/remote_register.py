"""A device whose register lives on a TCP server: only the vCPU that reads it waits."""

from functools import partial

import trio

import avmm

REGISTER = 0xD000_0000


class RemoteRegister(avmm.Device):
    """Reading this register asks the server, and awaits its answer."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def read(self, offset: int, size: int) -> int:
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as server:
            return int.from_bytes(await server.receive_some(4), "little")


async def answer(client: trio.SocketStream) -> None:
    """The server: take half a second, then send the temperature."""
    async with client:
        await trio.sleep(0.5)
        await client.send_all((21).to_bytes(4, "little"))


async def main() -> None:
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_tcp, answer, 0, host="127.0.0.1")
        (listener,) = await nursery.start(serve)
        device = RemoteRegister(listener.socket.getsockname()[1])
        async with avmm.Machine(devices=[avmm.mmio(device, REGISTER, 4)]) as vm:
            await vm.console.send_all(f"peek.l {REGISTER:#x}\rexit\r".encode())
            async for output in vm.console:
                print(output.decode(), end="")
        nursery.cancel_scope.cancel()


trio.run(main)
