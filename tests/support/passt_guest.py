"""A network device behind passt, in a network namespace of its own; run as a program, as root.

Does as a guest does that talks to an echo server on the host, and prints "fine". 77 is the status
where that cannot be here.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import trio

from avmm.devices.virtio.frame import Frame
from avmm.errors import ConfigError
from avmm.net.unix import UnixStream
from support.tap_guest import CLONE_NEWNET, summed

GUEST_MAC = bytes.fromhex("525400010203")
GUEST, GATEWAY = socket.inet_aton("192.0.2.2"), socket.inet_aton("192.0.2.1")
PORT = 7007
COUNT = 200
INTERFACE = """
ip link set lo up
ip link add host type veth peer name nobody
ip address add 192.0.2.2/24 dev host
ip link set host up
ip link set nobody up
ip route add default via 192.0.2.1
"""
"""What passt looks for: an interface with a route. It sends nothing by it here."""


async def reach(path: str | os.PathLike[str]) -> UnixStream:
    """Connect as soon as somebody listens at `path`, who tells nobody when that is."""
    while True:
        try:
            return UnixStream.connect(path)
        except ConfigError:
            await trio.sleep(0.01)


async def arp(link: UnixStream) -> bytes:
    """The gateway's MAC address: the gateway is passt."""
    request = struct.pack(">HHBBH", 1, 0x800, 6, 4, 1) + GUEST_MAC + GUEST + bytes(6) + GATEWAY
    await link.send(Frame(b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + request))
    while (frame := (await link.receive()).data)[12:14] != b"\x08\x06":
        pass
    assert frame[:6] == GUEST_MAC, frame
    assert frame[28:32] == GATEWAY, frame
    return frame[6:12]


def datagram(mac: bytes, data: bytes) -> bytes:
    """An Ethernet frame with a UDP datagram to the echo server."""
    udp = struct.pack(">HHHH", 5005, PORT, 8 + len(data), 0) + data
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + GUEST + GATEWAY
    ip = ip[:10] + (0xFFFF - summed(ip)).to_bytes(2, "big") + ip[12:]
    return mac + GUEST_MAC + b"\x08\x00" + ip + udp


async def echo(server: trio.socket.SocketType) -> None:
    while True:
        data, peer = await server.recvfrom(2000)
        await server.sendto(data, peer)


async def main(path: str) -> None:
    with trio.fail_after(30), trio.socket.socket(type=socket.SOCK_DGRAM) as server:
        await server.bind(("127.0.0.1", PORT))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo, server)
            with closing(await reach(path)) as link:
                mac = await arp(link)
                for number in range(COUNT):
                    data = bytes([number]) * (1 + 7 * number)
                    await link.send(Frame(datagram(mac, data)))
                    while (frame := (await link.receive()).data)[12:14] != b"\x08\x00":
                        pass
                    assert frame[23] == 17, frame
                    assert frame[42:] == data, (number, frame)
            nursery.cancel_scope.cancel()
    print("fine")


def impossible(why: str) -> None:
    print(why)
    sys.exit(77)


if __name__ == "__main__":
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        impossible(f"no namespace: {os.strerror(ctypes.get_errno())}")
    made = subprocess.run(["sh", "-ec", INTERFACE], capture_output=True, text=True, check=False)
    if made.returncode:
        impossible(f"no interface: {made.stderr.strip()}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)  # passt becomes nobody first
        command = ["passt", "--foreground", "--one-off", "--socket", f"{folder}/socket"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as passt:
            assert passt.stderr is not None
            said = ""
            for line in passt.stderr:
                said += line
                if "socket bound" in line:
                    break
            else:
                impossible(f"passt cannot run here: {said.strip()}")
            try:
                trio.run(main, f"{folder}/socket")
            finally:
                passt.kill()
