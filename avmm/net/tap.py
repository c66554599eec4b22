"""A TAP: an Ethernet interface of the host (Documentation/networking/tuntap.rst).

Frames with incomplete checksums pass in both directions, with a header that says so, which the
kernel shares with virtio. Frames that the guest does not take wait in the interface's queue, whose
length is `txqueuelen`. The kernel drops those that do not fit.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import struct
from typing import Final

import trio

from avmm.devices.virtio.frame import MOST_BYTES, Backend, Frame
from avmm.errors import ConfigError
from avmm.forks import close_descriptor, closed_in_child
from avmm.options import DEFAULT_MTU
from avmm.threads import in_thread, in_thread_shielded

logger = logging.getLogger(__name__)

# include/uapi/linux/sockios.h and if_tun.h
_SIOCGIFMTU: Final = 0x8921
_SIOCSIFMTU: Final = 0x8922
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETVNETLE: Final = 0x400454DC
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_TUN_F_CSUM: Final = 1
_HEADER: Final = struct.Struct("<BBHHHHH")
_NEEDS_CSUM: Final = 1
_DATA_VALID: Final = 2
_LONGEST_NAME: Final = 15
_REFUSED: Final = (errno.EIO, errno.EINVAL, errno.ENOMEM, errno.ENOBUFS)
"""The errors with which the kernel refuses a frame: the interface is down, or the frame is
malformed."""


class Tap(Backend):
    """The interface `name` of the network namespace that the process is in.

    If it does not exist, it is created, with this MTU, and removed when this is closed. The MTU of
    an interface that exists stays as it is. To create one, or to use another user's, takes
    CAP_NET_ADMIN. Raises `ConfigError` if it cannot be opened. Only one program can hold it at a
    time; with `held` False, this one does not hold it before `acquire`.
    """

    completes = True

    def __init__(self, name: str, *, held: bool = True, mtu: int = DEFAULT_MTU) -> None:
        if not isinstance(name, str) or not 0 < len(name.encode()) <= _LONGEST_NAME or "/" in name:
            raise ConfigError(
                f"tap {name!r}: expected the name of an interface, 1 to {_LONGEST_NAME} bytes"
            )
        self.name = name
        self._mtu = mtu
        self._fd = self._open() if held else -1
        closed_in_child(self, lambda tap: close_descriptor(tap._fd))

    def _open(self) -> int:
        """Open the interface. This blocks, because making or removing an interface waits for the
        lock of the host's whole network."""
        name = self.name
        is_new = not _exists(name)
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"tap {name}: /dev/net/tun: {error.strerror}") from None
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        try:
            made = fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            name = made[:16].rstrip(b"\0").decode()  # of "tap%d" the kernel makes a name
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _HEADER.size))
            fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("i", 1))
            fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM)
            if is_new and self._mtu != DEFAULT_MTU:
                _set_mtu(name, self._mtu)
            if (found := _mtu(name)) < self._mtu:
                logger.warning(
                    "tap %s: its MTU is %d, and the guest's is %d: longer frames are lost",
                    *(name, found, self._mtu),
                )
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"tap {name}: {_why(error)}") from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    async def receive(self) -> Frame:
        """See `Backend`; ends when the interface is removed."""
        await trio.lowlevel.checkpoint()
        while True:
            try:
                packet = os.read(self._fd, _HEADER.size + MOST_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd)
            except OSError:
                raise trio.EndOfChannel from None
            else:
                break
        flags, _, _, _, start, offset, _ = _HEADER.unpack_from(packet)
        data = packet[_HEADER.size :]
        if flags & _NEEDS_CSUM:
            return Frame(data, start, offset)
        return Frame(data, is_valid=bool(flags & _DATA_VALID))

    async def send(self, frame: Frame) -> None:
        """See `Backend`. A frame that the kernel refuses is lost, also while the interface is
        down."""
        await trio.lowlevel.checkpoint()
        flags, places = 0, (0, 0)
        if frame.start is not None:
            flags, places = _NEEDS_CSUM, (frame.start, frame.offset)
        header = _HEADER.pack(flags, 0, 0, 0, *places, 0)
        while True:
            try:
                os.writev(self._fd, [header, frame.data])
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._fd)
            except OSError as error:
                if error.errno in _REFUSED:
                    return
                raise trio.BrokenResourceError(f"tap {self.name}: {error.strerror}") from None
            else:
                return

    async def release(self) -> None:
        """See `Backend`. An interface that this has made is removed, and `acquire` makes it
        again."""
        await in_thread_shielded(self.close)

    async def acquire(self) -> None:
        """See `Backend`. If this is cancelled, it may hold the interface all the same."""
        if self._fd < 0:
            self._fd = await in_thread(self._open)

    def close(self) -> None:
        """Let go of the interface; idempotent. Blocks if that removes the interface."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _exists(name: str) -> bool:
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def _set_mtu(name: str, mtu: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, _SIOCSIFMTU, struct.pack("16si20x", name.encode(), mtu))
        except OSError as error:
            raise ConfigError(f"tap {name}: an MTU of {mtu}: {error.strerror}") from None


def _mtu(name: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFMTU, struct.pack("16si20x", name.encode(), 0))
    return int(struct.unpack_from("i", answer, 16)[0])


def _why(error: OSError) -> str:
    known = {
        errno.EPERM: "this user may not use it: expected root, or an interface made with "
        "`ip tuntap add NAME mode tap vnet_hdr user USER`",
        errno.EBUSY: "another program already has it",
        errno.EINVAL: "it is not a TAP, or it has several queues",
    }
    return known.get(error.errno or 0, error.strerror or str(error))
