"""Ten guests leave a process at once. Each has a half-typed line, which is finished elsewhere."""

import subprocess
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


async def leave(vm: avmm.Machine, target: str) -> None:
    async with await avmm.connect(target) as line:  # between hosts: tls=avmm.Tls(...)
        await vm.migrate(line)


async def main() -> None:
    command = [sys.executable, __file__, "elsewhere"]
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        other = await nursery.start(partial(trio.run_process, command, stdout=subprocess.PIPE))
        guests = [
            await stack.enter_async_context(avmm.Machine(memory="16M")) for _ in range(GUESTS)
        ]
        async with trio.open_nursery() as ready:
            for number, vm in enumerate(guests):
                ready.start_soon(begin_line, vm, number)
        target = (await other.stdout.receive_some()).decode()
        begin = trio.current_time()
        async with trio.open_nursery() as gone:
            for vm in guests:
                gone.start_soon(leave, vm, target)
        print(f"all have left within {trio.current_time() - begin:.2f} s", flush=True)
        async for text in other.stdout:
            print(text.decode(), end="")


async def take_in(listener: avmm.Listener, texts: list[str]) -> None:
    """In the other process: receive a guest, and finish its line."""
    async with await listener.accept() as line, avmm.receive(line) as vm:
        await vm.console.send_all(b"\r")
        texts.append((await said(vm, b"avmm> ")).decode().splitlines()[-2])


async def other_process() -> None:
    texts: list[str] = []
    async with await avmm.listen("tcp:127.0.0.1:0") as listener, trio.open_nursery() as nursery:
        print(listener.target, end="", flush=True)
        for _ in range(GUESTS):
            nursery.start_soon(take_in, listener, texts)
    print(*sorted(texts), sep="\n")


if len(sys.argv) > 1:
    trio.run(other_process)
else:
    trio.run(main)
