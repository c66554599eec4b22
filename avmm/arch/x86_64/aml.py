"""The part of AML that is needed to describe devices: names, numbers, packages, resources, and
methods that notify.

ACPI specification 6.5, chapter 20 ("AML Specification") for the encoding and 6.4 for resource
descriptors. Terms are bytes; they are put together with `+` and `b"".join`.
"""

from __future__ import annotations

import struct
from typing import Final

_ZERO, _ONE, _ONES = b"\x00", b"\x01", b"\xff"
_BYTE, _WORD, _DWORD, _STRING, _QWORD = b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x0e"
_NAME, _SCOPE, _BUFFER, _PACKAGE, _DEVICE = b"\x08", b"\x10", b"\x11", b"\x12", b"\x5b\x82"
_METHOD, _NOTIFY, _DUAL = b"\x14", b"\x86", b"\x2e"
_SERIALIZED: Final = 1 << 3
_END_TAG: Final = b"\x79\x00"
"""6.4.2.9. Guests accept a checksum of 0."""


def integer(value: int) -> bytes:
    """20.2.3: the shortest form of a number of up to 64 bits."""
    if value < 2:
        return _ONE if value else _ZERO
    for prefix, form, bits in ((_BYTE, "<B", 8), (_WORD, "<H", 16), (_DWORD, "<I", 32)):
        if value < 1 << bits:
            return prefix + struct.pack(form, value)
    return _QWORD + struct.pack("<Q", value)


def string(text: str) -> bytes:
    """20.2.3: an ASCII string."""
    return _STRING + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """19.6.37: an id of seven characters, such as "PNP0501", as a number."""
    vendor = sum(
        (ord(letter) - 0x40 & 0x1F) << shift
        for letter, shift in zip(text, (10, 5, 0), strict=False)
    )
    return integer(struct.unpack("<I", struct.pack(">HH", vendor, int(text[3:], 16)))[0])


def name(path: str, value: bytes) -> bytes:
    """20.2.5.1: `Name (path, value)`."""
    return _NAME + _segment(path) + value


def package(*elements: bytes) -> bytes:
    """20.2.5.4: `Package () {...}`."""
    return _PACKAGE + _sized(bytes([len(elements)]) + b"".join(elements))


def scope(path: str, body: bytes) -> bytes:
    """20.2.5.1: `Scope (\\path) {...}`."""
    return _SCOPE + _sized(b"\\" + _segment(path) + body)


def device(path: str, body: bytes) -> bytes:
    """20.2.5.2: `Device (path) {...}`."""
    return _DEVICE + _sized(_segment(path) + body)


def method(path: str, arguments: int, body: bytes) -> bytes:
    """20.2.5.2: `Method (path, arguments, Serialized) {...}`."""
    return _METHOD + _sized(_segment(path) + bytes([arguments | _SERIALIZED]) + body)


def notify(scope_: str, path: str, value: int) -> bytes:
    """20.2.5.3: `Notify (\\scope.path, value)`."""
    return _NOTIFY + b"\\" + _DUAL + _segment(scope_) + _segment(path) + integer(value)


def event_device(path: str, uid: int, gsi: int, device: str, value: int) -> bytes:
    """5.6.9: a generic event device that notifies `\\_SB.device` at each interrupt `gsi`."""
    body = name("_HID", string("ACPI0013")) + name("_UID", integer(uid))
    body += name("_CRS", resources(interrupt(gsi)))
    body += method("_EVT", 1, notify("_SB", device, value))
    return _DEVICE + _sized(_segment(path) + body)


def resources(*descriptors: bytes) -> bytes:
    """19.6.118: `ResourceTemplate () {...}`, which is a buffer."""
    data = b"".join(descriptors) + _END_TAG
    return _BUFFER + _sized(integer(len(data)) + data)


def io_ports(base: int, count: int) -> bytes:
    """6.4.2.5: at most 255 ports, each decoded with all 16 address bits."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, count)


def memory(base: int, size: int) -> bytes:
    """6.4.3.4: a fixed range that can be read and written. A range that reaches above 4 GiB is
    described as in 6.4.3.5.1.
    """
    if base + size > 1 << 32:
        fixed, last = 0b1100, base + size - 1
        return struct.pack("<BHBBB5Q", 0x8A, 43, 0, fixed, 1, 0, base, last, 0, size)
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def interrupt(gsi: int, *, level: bool = False) -> bytes:
    """6.4.3.6: an active high interrupt: edge triggered and the device's own, or level triggered
    and shared."""
    consumer, edge, shared = 1 << 0, 1 << 1, 1 << 3
    return struct.pack("<BHBBI", 0x89, 6, consumer | (shared if level else edge), 1, gsi)


def _segment(path: str) -> bytes:
    """20.2.2: a name of up to four characters."""
    return path.ljust(4, "_").encode("ascii")


def _sized(body: bytes) -> bytes:
    """20.2.4: `body` with its length in front; the length includes its own bytes."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            lead = extra << 6 | total & 0xF
            return bytes([lead]) + (total >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"{len(body)} bytes are too many for one AML package")
