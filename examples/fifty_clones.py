"""Warm up a guest once, then make fifty clones that go on from there, all at the same time."""

from contextlib import AsyncExitStack

import trio

import avmm

CLONES = 50


async def said(vm: avmm.Machine, end: bytes) -> bytes:
    """What the guest prints, up to and including `end`."""
    text = b""
    while not text.endswith(end):
        text += await vm.console.receive_some()
    return text


async def finish_line(vm: avmm.Machine, number: int) -> None:
    """Finish the line that was begun before there were clones, with the clone's own number."""
    await vm.console.send_all(b"%d\r" % number)
    print((await said(vm, b"avmm> ")).decode().splitlines()[-2])


async def main() -> None:
    async with avmm.Machine(memory="64M") as vm, AsyncExitStack() as stack:
        await said(vm, b"avmm> ")
        await vm.console.send_all(b"echo I am clone ")
        await said(vm, b"clone ")
        begin = trio.current_time()
        clones = [await stack.enter_async_context(vm.clone()) for _ in range(CLONES)]
        elapsed = trio.current_time() - begin
        print(f"{CLONES} clones, {1000 * elapsed / CLONES:.1f} ms each")
        async with trio.open_nursery() as nursery:
            for number, clone in enumerate(clones):
                nursery.start_soon(finish_line, clone, number)


trio.run(main)
