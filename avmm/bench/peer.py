"""The other process of the migrations in `avmm bench stall`.

    python -m avmm.bench.peer receive|send FD MEMORY

FD is a socket to the other side, and MEMORY is the guest's RAM in bytes. The process prints
"ready" when it is ready. A sender then waits for the end of standard input. A receiver keeps the
guest running until the process is killed.
"""

from __future__ import annotations

import socket
import sys

import trio

from avmm.arrivals import receive
from avmm.bench import shell
from avmm.machine import Machine


async def main(what: str, fd: int, memory: int) -> None:
    """Move a guest over the socket `fd`."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))
    if what == "receive":
        print("ready", flush=True)
        async with receive(stream):
            await trio.sleep_forever()
    async with Machine(memory=memory, acpi=False) as vm:
        await shell.fill(vm.console, memory)
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        await vm.migrate(stream)
    await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
