"""Move a guest to another process while somebody types: no key is lost, and none comes twice."""

import os
import socket
import subprocess
import sys
from functools import partial

import trio

import avmm

LINES = [b"echo line %d\r" % number for number in range(1, 21)]


async def type_text(vm: avmm.Machine, other: trio.Process) -> None:
    """Type one key at a time, to wherever the guest is. End the guest when it has moved."""
    assert other.stdin is not None
    keyboard: trio.abc.SendStream = vm.console
    for key in b"".join(LINES):
        await trio.sleep(0.005)
        try:
            await keyboard.send_all(bytes([key]))
        except trio.BrokenResourceError:  # the guest has moved without this key
            keyboard = other.stdin
            await keyboard.send_all(bytes([key]))
    await vm.wait()
    await other.stdin.send_all(b"exit 3\r")


async def show(screen: trio.abc.ReceiveStream) -> None:
    async for output in screen:
        print(output.decode(), end="", flush=True)


async def move(vm: avmm.Machine, line: trio.abc.Stream) -> None:
    await trio.sleep(0.5)
    report = await vm.migrate(line)
    print(f" <- here it moved, and stood still for {1000 * report.downtime:.0f} ms -> ", end="")


async def main() -> None:
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, str(theirs.fileno())]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "pass_fds": [theirs.fileno()]}
    line = await avmm.connect(f"fd:{ours.detach()}")
    async with trio.open_nursery() as nursery:
        other = await nursery.start(partial(trio.run_process, command, **pipes))
        theirs.close()
        async with line, avmm.Machine() as vm, trio.open_nursery() as here:
            here.start_soon(move, vm, line)
            here.start_soon(type_text, vm, other)
            await show(vm.console)
            await show(other.stdout)


async def other_process(descriptor: int) -> None:
    """Receive the guest. Standard input is its keyboard, and standard output its screen."""
    line = await avmm.connect(f"fd:{descriptor}")
    async with line, avmm.receive(line) as vm, trio.open_nursery() as nursery:

        async def keys() -> None:
            async for data in trio.lowlevel.FdStream(os.dup(0)):
                await vm.console.send_all(data)

        nursery.start_soon(keys)
        await show(vm.console)
        nursery.cancel_scope.cancel()
    print(f"in the other process: {await vm.wait()}")


if len(sys.argv) > 1:
    trio.run(other_process, int(sys.argv[1]))
else:
    trio.run(main)
