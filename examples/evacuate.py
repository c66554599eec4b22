"""Ten guests leave a process at once. Each has a half-typed line, which is finished elsewhere."""

import socket
import sys
from contextlib import AsyncExitStack
from functools import partial

import trio

import avmm

GUESTS = 10


async def said(vm: avmm.Machine, end: bytes) -> bytes:
    """What the guest prints, up to and including `end`."""
    text = b""
    while not text.endswith(end):
        text += await vm.console.receive_some()
    return text


async def begin_line(vm: avmm.Machine, number: int) -> None:
    await said(vm, b"avmm> ")
    await vm.console.send_all(b"echo guest %d has moved" % number)
    await said(vm, b"has moved")


async def leave(vm: avmm.Machine, port: int) -> None:
    async with await trio.open_tcp_stream("127.0.0.1", port) as line:  # between hosts: use TLS
        await vm.migrate(line)


async def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=GUESTS) as listener:
        port, fd = listener.getsockname()[1], listener.fileno()
        command = [sys.executable, __file__, str(fd)]
        async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
            nursery.start_soon(partial(trio.run_process, command, pass_fds=[fd]))
            guests = [
                await stack.enter_async_context(avmm.Machine(memory="16M")) for _ in range(GUESTS)
            ]
            async with trio.open_nursery() as ready:
                for number, vm in enumerate(guests):
                    ready.start_soon(begin_line, vm, number)
            begin = trio.current_time()
            async with trio.open_nursery() as gone:
                for vm in guests:
                    gone.start_soon(leave, vm, port)
            print(f"all have left within {trio.current_time() - begin:.2f} s", flush=True)


async def take_in(listener: trio.SocketListener, texts: list[str]) -> None:
    """In the other process: receive a guest, and finish its line."""
    async with await listener.accept() as line, avmm.receive(line) as vm:
        await vm.console.send_all(b"\r")
        texts.append((await said(vm, b"avmm> ")).decode().splitlines()[-2])


async def other_process(descriptor: int) -> None:
    listener = trio.SocketListener(
        trio.socket.from_stdlib_socket(socket.socket(fileno=descriptor))
    )
    texts: list[str] = []
    async with listener, trio.open_nursery() as nursery:
        for _ in range(GUESTS):
            nursery.start_soon(take_in, listener, texts)
    print(*sorted(texts), sep="\n")


if len(sys.argv) > 1:
    trio.run(other_process, int(sys.argv[1]))
else:
    trio.run(main)
