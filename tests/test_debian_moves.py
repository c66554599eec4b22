"""Debian's kernel, with a mounted ext4, a TCP connection and a shell loop, on its way through
several machines and a snapshot."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from support.tap_guest import bring_up

import avmm

pytestmark = [
    pytest.mark.lab(only="stock"),
    pytest.mark.usefixtures("kvm", "nothing_left"),
    pytest.mark.timeout(400),
]

GUEST = Path("sent/debian")
CMDLINE = "console=ttyS0 quiet reboot=t panic=-1"
PROMPT = "avmm:/root# "
TAP = "avmm1"
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB
TAP_FLAGS = 0x5002  # a TAP without packet information, with virtio's header
MOVES = 4


def keep_tap(persistent: bool) -> None:
    """The interface outlives, or does not, whoever has it open."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", TAP.encode(), TAP_FLAGS))
        fcntl.ioctl(fd, TUNSETPERSIST, int(persistent))
    finally:
        os.close(fd)


class Guest:
    """What is typed and said, in whichever machine the guest is."""

    def __init__(self) -> None:
        self.text = ""

    async def until(self, vm: avmm.Machine, what: str) -> str:
        with trio.fail_after(120):
            while what not in self.text:
                self.text += (await vm.console.receive_some()).decode()
        said, _, self.text = self.text.partition(what)
        return said

    async def command(self, vm: avmm.Machine, line: str) -> str:
        await vm.console.send_all(line.encode() + b"\r")
        return (await self.until(vm, PROMPT)).partition("\n")[2].replace("\r", "")


@asynccontextmanager
async def moved(vm: avmm.Machine, links: dict[str, list[str]]) -> AsyncIterator[avmm.Machine]:
    """The same guest in another machine."""
    near, far = (trio.SocketStream(end) for end in trio.socket.socketpair())
    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(vm.migrate, near)
        async with avmm.receive(far, **links) as twin:
            assert (await vm.wait()).cause is avmm.Cause.MOVED
            yield twin


async def test_a_busy_guest_moves_and_is_restored(tmp_path: Path) -> None:
    image, saved = tmp_path / "image", tmp_path / "saved"
    shutil.copy(GUEST / "ext4.img", image)
    links = {"disks": [str(image)], "net": [f"tap={TAP}"]}
    guest = Guest()
    numbers: list[int] = []

    async def take(listener: trio.SocketListener) -> None:
        rest = b""
        async with await listener.accept() as stream:
            async for data in stream:
                *lines, rest = (rest + data).split(b"\n")
                numbers.extend(map(int, lines))

    async def on(vm: avmm.Machine, moves: int) -> None:
        seen = len(numbers)
        up = float((await guest.command(vm, "cut -d' ' -f1 /proc/uptime")).split()[0])
        assert up >= ups[-1]
        ups.append(up)
        await guest.command(vm, f"echo {moves} > /mnt/move{moves}; sync")
        with trio.fail_after(60):
            while len(numbers) < seen + 20:  # the connection goes on
                await trio.sleep(0.05)
        if moves:
            async with moved(vm, links) as twin:
                await on(twin, moves - 1)
            return
        await guest.command(vm, "kill %1; wait; umount /mnt")
        assert await guest.command(vm, "dmesg | grep -e stall -e 'hung task' -e unstable") == ""
        await vm.console.send_all(b"exit 7\r")
        assert (await vm.wait()).status == 7

    keep_tap(True)
    try:
        bring_up(TAP)
        ups = [0.0]
        (listener,) = await trio.open_tcp_listeners(4001, host="10.99.0.1")
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(take, listener)
            async with avmm.Machine(
                kernel=GUEST / "vmlinuz",
                initrd=GUEST / "initrd.cpio.gz",
                memory="256M",
                cpus=2,
                cmdline=CMDLINE,
                **links,
            ) as vm:
                await guest.until(vm, PROMPT)
                await guest.command(vm, "mkdir -p /mnt; mount -t ext4 /dev/vda /mnt")
                await guest.command(vm, "ip addr add 10.99.0.2/24 dev eth0")
                loop = "i=0; while :; do echo $i; echo $i > /mnt/i; i=$((i+1)); usleep 20000; done"
                await guest.command(vm, f"({loop}) | nc 10.99.0.1 4001 &")
                with trio.fail_after(60):
                    while len(numbers) < 20:
                        await trio.sleep(0.05)
                async with vm.paused(deadline=20):
                    await vm.snapshot(saved)
                    vm.stop()
            async with avmm.restore(saved, **links) as vm:
                await on(vm, MOVES)
            nursery.cancel_scope.cancel()
    finally:
        keep_tap(False)
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 20 * (MOVES + 1)
    checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
