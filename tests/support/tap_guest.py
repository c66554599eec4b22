"""A network device on a TAP in a network namespace of its own; run as a program, as root.

Does as a guest of 10.99.0.2 does and prints "fine", or says what was not. The namespace has no
other interface that is up, so nothing gets out.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys

import trio

from avmm.devices.virtio.net import Net
from avmm.net.tap import Tap
from support.virtio_driver import EVENT_IDX, VERSION_1, Bench, Driver

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCGIFHWADDR = 0x8914, 0x8916, 0x891C, 0x8927
CSUM, GUEST_CSUM = 1, 2
HOST, GUEST = socket.inet_aton("10.99.0.1"), socket.inet_aton("10.99.0.2")
MAC = bytes.fromhex("525400010203")


def bring_up(name: str) -> bytes:
    """10.99.0.1/24, up; its MAC address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:

        def set_address(request: int, address: bytes) -> None:
            sockaddr = struct.pack("<HH4s8x", socket.AF_INET, 0, address)
            fcntl.ioctl(sock, request, struct.pack("16s16s8x", name.encode(), sockaddr))

        set_address(SIOCSIFADDR, HOST)
        set_address(SIOCSIFNETMASK, socket.inet_aton("255.255.255.0"))
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), 0x1043))
        found = fcntl.ioctl(sock, SIOCGIFHWADDR, struct.pack("16s24x", name.encode()))
    return found[18:24]


def summed(data: bytes) -> int:
    """RFC 1071, the slow way."""
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) & ~1]))
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


class Guest:
    def __init__(self, driver: Driver) -> None:
        self.driver, self.memory, self.rings = driver, driver.bench.memory, driver.rings
        self.slots: list[int] = []
        self.came: list[bytes] = []
        for n in range(16):
            self.give(driver.end + 2048 * n)
        self.out = driver.end + 16 * 2048

    def give(self, at: int) -> None:
        self.rings[0].add([(at, 2048, True)])
        self.rings[0].kick()
        self.slots.append(at)

    def send(self, frame: bytes, start: int = 0, offset: int = 0) -> None:
        self.rings[1].take()
        header = struct.pack("<BBHHHHH", bool(start), 0, 0, 0, start, offset, 0)
        self.memory.write(self.out, header + frame)
        self.rings[1].add([(self.out, len(header + frame), False)])
        self.rings[1].kick()

    async def receive(self, kind: int) -> tuple[tuple[int, ...], bytes]:
        """The next frame of the Ethernet type `kind`, with its header."""
        while True:
            with trio.fail_after(5):
                while not self.came:
                    await trio.sleep(0.001)
                    for _, written in self.rings[0].take():
                        at = self.slots.pop(0)
                        self.came.append(self.memory.read(at, written))
                        self.give(at)
            data = self.came.pop(0)
            if data[24:26] == kind.to_bytes(2, "big"):
                return struct.unpack("<BBHHHHH", data[:12]), data[12:]


async def main() -> None:
    tap = Tap("avmm0")
    host_mac = bring_up("avmm0")
    net = Net(tap, mac="52:54:00:01:02:03")
    bench = Bench(net)
    async with bench.running() as driver:
        for features in (0, CSUM | GUEST_CSUM):
            await driver.start(VERSION_1 | EVENT_IDX | features, size=32)
            await exchange(Guest(driver), host_mac, bool(features))
    tap.close()
    check_mtu()
    print("fine")


def check_mtu() -> None:
    """An interface that is made gets the guest's MTU."""
    tap = Tap("avmm1", mtu=9000)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        found = fcntl.ioctl(sock, 0x8921, struct.pack("16si20x", b"avmm1", 0))
    assert struct.unpack_from("i", found, 16)[0] == 9000
    tap.close()


async def exchange(guest: Guest, host_mac: bytes, offload: bool) -> None:
    ethernet = b"\xff" * 6 + MAC
    arp = struct.pack(">HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, MAC, GUEST, bytes(6), HOST)
    guest.send(ethernet + b"\x08\x06" + arp)
    while True:
        _, frame = await guest.receive(0x806)
        if frame[20:22] == b"\0\2":
            break
    assert frame[22:28] == host_mac, frame
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("10.99.0.1", 4000))
        sock.settimeout(5)
        text = b"an odd text"
        pseudo = GUEST + HOST + struct.pack(">BBH", 0, 17, 8 + len(text))
        udp = struct.pack(">HHHH", 5000, 4000, 8 + len(text), 0) + text
        value = summed(pseudo) if offload else 0xFFFF - summed(pseudo + udp)
        udp = udp[:6] + value.to_bytes(2, "big") + udp[8:]
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, GUEST, HOST)
        ip = ip[:10] + (0xFFFF - summed(ip)).to_bytes(2, "big") + ip[12:]
        guest.send(host_mac + MAC + b"\x08\0" + ip + udp, 34 if offload else 0, 6)
        got, sender = await trio.to_thread.run_sync(sock.recvfrom, 100)
        assert (got, sender) == (text, ("10.99.0.2", 5000)), (got, sender)
        sock.sendto(b"back again", sender)
        header, frame = await guest.receive(0x800)
    assert frame[42:] == b"back again", frame
    pseudo = HOST + GUEST + struct.pack(">BBH", 0, 17, len(frame) - 34)
    if offload:
        assert header[0] & 1, header
        assert header[4:6] == (34, 6), header
        assert frame[40:42] == summed(pseudo).to_bytes(2, "big")
    else:
        assert not header[0] & 1, header
        assert summed(pseudo + frame[34:]) == 0xFFFF, frame


if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        print(f"no namespace: {os.strerror(ctypes.get_errno())}")
        sys.exit(77)
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        print("no /dev/net/tun")
        sys.exit(77)
    trio.run(main)
