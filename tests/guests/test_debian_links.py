"""Linux's own drivers of the network, socket and balloon devices: Debian's kernel as a guest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import trio
from support import stock
from support.tap_guest import bring_up

import avmm
from avmm.devices.virtio.balloon import Balloon
from avmm.devices.virtio.net import Net
from avmm.devices.virtio.vsock import Vsock
from avmm.net.tap import Tap

pytestmark = [
    pytest.mark.lab(also="stock"),
    pytest.mark.usefixtures("kvm", "fitting_engine", "nothing_left"),
    pytest.mark.timeout(240),
]

CMDLINE = "console=ttyS0 quiet reboot=t panic=-1"
PROMPT = b"avmm:/root# "
DATA = bytes(range(251)) * 4000


def machine(*devices: object, **settings: object) -> avmm.Machine:
    places = [avmm.virtio(device) for device in devices]
    return avmm.Machine(
        kernel=stock.folder(stock.GUEST) / "vmlinuz",
        initrd=stock.folder(stock.GUEST) / "initrd.cpio.gz",
        memory="256M",
        cmdline=CMDLINE,
        devices=places,
        **settings,
    )


async def said(vm: avmm.Machine, what: bytes = PROMPT) -> bytes:
    found = b""
    with trio.fail_after(120):
        while what not in found:
            found += await vm.console.receive_some()
    return found


async def command(vm: avmm.Machine, line: str) -> str:
    await vm.console.send_all(line.encode() + b"\r")
    answer = await said(vm)
    return answer.partition(b"\n")[2].decode().replace("\r", "")


async def test_sockets() -> None:
    async with machine(Vsock(5)) as vm:
        await said(vm)
        async with vm.vsock.listen(5000) as listener:
            await vm.console.send_all(b"vsock send 5000 < /bin/busybox | sha256sum\r")
            with trio.fail_after(60):
                async with await listener.accept() as stream:
                    got = bytearray()
                    async for part in stream:
                        got += part
                    await stream.send_all(bytes(reversed(got)))
            digest = hashlib.sha256(bytes(reversed(got))).hexdigest()
            assert len(got) > 1 << 20
            assert digest in (await said(vm)).decode()
            assert hashlib.sha256(got).hexdigest() in await command(vm, "sha256sum /bin/busybox")
        assert "reset" in await command(vm, "vsock send 5000 < /dev/null")
        with pytest.raises(ConnectionRefusedError):
            await vm.vsock.connect(77)
        await vm.console.send_all(b"vsock echo 77\r")
        await said(vm, b"listening")
        received = b""
        with trio.fail_after(60):
            async with await vm.vsock.connect(77) as stream, trio.open_nursery() as nursery:

                @nursery.start_soon
                async def send() -> None:
                    await stream.send_all(DATA)
                    await stream.send_eof()

                while part := await stream.receive_some():
                    received += part
                    await trio.sleep(0.001)  # slower than the guest
        assert received == DATA
        await said(vm)


@pytest.mark.lab(also="stock", long=True)
async def test_sockets_after_a_load() -> None:
    async with machine(Vsock(5)) as vm:
        await said(vm)
        async with vm.vsock.listen(5000) as listener:
            await vm.console.send_all(b"vsock send 5000 < /dev/null &\r")
            with trio.fail_after(60):
                stream = await listener.accept()
            assert await stream.receive_some() == b""
            await said(vm)
            # It must wait in its read: one that comes to it later finds no connection at all.
            await vm.console.send_all(b"until grep -q '^State:.S' /proc/$!/status; do :; done\r")
            await said(vm)
            async with vm.paused(deadline=20):
                state = vm.save()
    async with machine(Vsock(6), state=state) as vm:
        await vm.console.send_all(b"wait; echo o''ver\r")
        assert b"read: Connection reset by peer" in await said(vm, b"over")
        await said(vm)
        async with vm.vsock.listen(5000) as listener:
            await vm.console.send_all(b"echo again | vsock send 5000\r")
            with trio.fail_after(60):
                async with await listener.accept() as stream:
                    assert await stream.receive_some() == b"again\n"
            await said(vm)


async def test_the_network() -> None:
    tap = Tap("avmm0")
    try:
        bring_up("avmm0")
        async with machine(Net(tap, mac="52:54:00:01:02:03")) as vm:
            await said(vm)
            await command(vm, "ip addr add 10.99.0.2/24 dev eth0")
            assert "52:54:00:01:02:03" in await command(vm, "ip link show eth0")
            assert " 0% packet loss" in await command(vm, "ping -c 3 -s 1400 10.99.0.1")
            size = int((await command(vm, "wc -c < /bin/busybox")).split()[0])
            digest = await command(vm, "sha256sum /bin/busybox")
            (listener,) = await trio.open_tcp_listeners(4000, host="10.99.0.1")
            async with listener:
                await vm.console.send_all(b"nc 10.99.0.1 4000 < /bin/busybox | sha256sum\r")
                with trio.fail_after(60):
                    async with await listener.accept() as stream:
                        got = b""
                        while len(got) < size:
                            got += await stream.receive_some()
                        assert hashlib.sha256(got).hexdigest() in digest
                        await stream.send_all(DATA)
                assert hashlib.sha256(DATA).hexdigest() in (await said(vm)).decode()
            (net,) = vm.nets
            net.set_link(False)
            assert "0" in await command(vm, "sleep 1; cat /sys/class/net/eth0/carrier")
            net.set_link(True)
            assert "1" in await command(vm, "sleep 1; cat /sys/class/net/eth0/carrier")
            assert " 0% packet loss" in await command(vm, "ping -c 1 10.99.0.1")
    finally:
        tap.close()


def held_by(vm: avmm.Machine) -> int:
    """Bytes of its RAM that the host has pages for."""
    return sum(len(data) for _, data in vm.memory.contents())


async def test_the_balloon() -> None:
    async with machine(Balloon()) as vm:
        await said(vm)
        with trio.fail_after(60):
            before = await vm.balloon.stats()
            await command(vm, "dd if=/dev/zero of=/tmp/x bs=1M count=100")
            assert held_by(vm) > 150 << 20
            await command(vm, "rm /tmp/x")
            # What is free now goes back by itself, some seconds later.
            while held_by(vm) > 110 << 20:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.5)
            await vm.balloon.set_target(150 << 20)
        assert vm.balloon.refused == 0
        assert held_by(vm) < (256 - 150) << 20
        with trio.fail_after(60):
            after = await vm.balloon.stats()
            assert before["free_memory"] - after["free_memory"] > 100 << 20
            await vm.balloon.set_target(0)
        answer = await command(vm, "dd if=/dev/urandom of=/tmp/x bs=1M count=60; echo $?")
        assert answer.splitlines()[-2] == "0"


async def test_a_second_port_a_file_system_and_entropy(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    console = avmm.Console(avmm.Port("hvc0", console=True), avmm.Port("data"))
    async with machine(console, disks=[str(image)], rng=True) as vm:
        await said(vm)
        assert (await command(vm, "od -An -N64 -x /dev/hwrng | wc -l")).startswith("4\n")
        # The guest makes the file system, and the host reads what is in it.
        await command(vm, "mke2fs -F /dev/vda; mkdir -p /mnt; mount -t ext4 /dev/vda /mnt")
        await command(vm, "dd if=/dev/urandom of=/mnt/data bs=64k count=32")
        digest = (await command(vm, "sha256sum /mnt/data; umount /mnt")).split()[0]
        port = vm.ports["data"]
        names = "/sys/class/virtio-ports/*/name"
        device = (await command(vm, f"grep -l '^data$' {names} | cut -d/ -f5")).split()[0]
        # A port can be opened once.
        await vm.console.send_all(f"cat 0<>/dev/{device} 1>&0 &\r".encode())
        with trio.fail_after(120):
            await port.opened()
            received = bytearray()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(port.send_all, DATA)
                while len(received) < len(DATA):
                    received += await port.receive_some()
        assert hashlib.sha256(received).digest() == hashlib.sha256(DATA).digest()
        await vm.console.send_all(b"exit 7\r")
        assert (await vm.wait()).status == 7
    checked = await trio.run_process(["e2fsck", "-fn", image], capture_stdout=True, check=False)
    assert checked.returncode == 0, checked.stdout
    debugfs = ["debugfs", "-R", "cat data", image]
    data = (await trio.run_process(debugfs, capture_stdout=True)).stdout
    assert len(data) == 32 << 16
    assert hashlib.sha256(data).hexdigest() == digest
