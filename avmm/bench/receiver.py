"""The other process of `avmm bench migration`: receives a guest, and shows that it runs.

    python -m avmm.bench.receiver FD

FD is a socket to the source. When the guest runs here, the process types a line on its console,
prints the answer and ends.
"""

from __future__ import annotations

import sys

import trio

from avmm.arrivals import receive
from avmm.bench.shell import ask
from avmm.transfer.transports import connect


async def main(fd: int) -> None:
    """Receive the guest that comes over the socket `fd`."""
    async with await connect(f"fd:{fd}") as stream, receive(stream) as vm:
        print(await ask(vm.console, b"\r"), flush=True)


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]))
