"""A process that counts with a guest (`support.counting`) and then lets it go on in another one.

`python -m support.moving migrate HOPS STEP DISK MINE OTHER [first]`: hand it over and back, HOPS
times in all, between the unix sockets of two such processes; what was counted so far follows the
guest on the same stream. `... snapshot NUMBER DISK FOLDER`: go on from the snapshot in the folder,
or boot, count to NUMBER and leave a snapshot.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import trio

import avmm
from support.counting import Counting

CHANNELS = ("serial", "hvc", "vsock", "disk")
END = 30
"""So many numbers more than the hops need."""


def links(disk: str) -> dict[str, Any]:
    return {"disks": [disk], "vsock": "cid=3", "devices": [avmm.virtio(avmm.Console())]}


async def all_of(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(data) async for data in stream])


async def connected(path: str) -> trio.SocketStream:
    """As soon as the other process listens there."""
    with trio.fail_after(30):
        while True:
            with contextlib.suppress(OSError):
                return await trio.open_unix_socket(path)
            await trio.sleep(0.01)


async def migrate(hops: int, step: int, disk: str, mine: str, other: str, first: bool) -> None:
    socket = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    await socket.bind(mine)
    socket.listen()
    listener = trio.SocketListener(socket)
    last = hops * step + END
    async with listener:
        for hop in range(0 if first else 1, hops + 1, 2):
            async with contextlib.AsyncExitStack() as stack:
                if hop == 0:
                    vm = await stack.enter_async_context(avmm.Machine(memory="16M", **links(disk)))
                    counting = Counting(last, *CHANNELS)
                    await vm.console.send_all(counting.command)
                else:
                    stream = await stack.enter_async_context(await listener.accept())
                    vm = await stack.enter_async_context(avmm.receive(stream, **links(disk)))
                    counting = Counting.load(json.loads(await all_of(stream)))
                async with counting.attached(vm):
                    if hop == hops:
                        await counting.finished()
                        await vm.console.send_all(b"exit 7\r")
                        assert (await vm.wait()).status == 7
                        break
                    await counting.reached((hop + 1) * step)
                    there = await stack.enter_async_context(await connected(other))
                    await vm.migrate(there)
                await there.send_all(json.dumps(counting.save()).encode())
        else:
            return
    counting.check(Path(disk))
    print("ok", hops)


async def snapshot(number: int, disk: str, folder: str) -> None:
    file, notes = Path(folder, "snap"), Path(folder, "notes")
    machine: contextlib.AbstractAsyncContextManager[avmm.Machine]
    if file.exists():
        counting = Counting.load(json.loads(notes.read_text()))
        machine = avmm.restore(file, **links(disk))
    else:
        counting = Counting(int(Path(folder, "last").read_text()), *CHANNELS)
        machine = avmm.Machine(memory="16M", **links(disk))
    async with machine as vm:
        if not file.exists():
            await vm.console.send_all(counting.command)
        async with contextlib.AsyncExitStack() as pause:
            async with counting.attached(vm):
                if number >= counting.last:
                    await counting.finished()
                    await vm.console.send_all(b"exit 7\r")
                    assert (await vm.wait()).status == 7
                    counting.check(Path(disk))
                    return
                await counting.reached(number)
                await pause.enter_async_context(vm.paused(deadline=20))
            await vm.snapshot(file)
            notes.write_text(json.dumps(counting.save()))
            # It must not go on after its snapshot: they have the same disk, where the next process
            # finds each sector empty that it has not written itself.
            vm.stop()


def main() -> None:
    how, *rest = sys.argv[1:]
    if how == "migrate":
        hops, step, disk, mine, other = rest[:5]
        trio.run(migrate, int(hops), int(step), disk, mine, other, rest[5:] == ["first"])
    else:
        trio.run(snapshot, int(rest[0]), rest[1], rest[2])


if __name__ == "__main__":
    main()
