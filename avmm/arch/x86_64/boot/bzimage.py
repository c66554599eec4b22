"""bzImage, the format that distributions ship: a compressed vmlinux inside a program that unpacks
it.

avmm unpacks the vmlinux itself (`compressed`), so the program around it, which consists of the
real mode setup and a decompressor, never runs. The vmlinux is entered by Linux's 64-bit boot
protocol, which is part of what `longmode` promises. The bzImage's header goes into the zero page.

Documentation/arch/x86/boot.rst: "The Real-Mode Kernel Header", fields payload_offset and
payload_length (protocol 2.08 on, Linux 2.6.26).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from avmm.arch.x86_64.boot import zeropage
from avmm.boot import compressed
from avmm.boot.compressed import MAGIC_SIZE
from avmm.boot.elf_headers import MAGIC as ELF_MAGIC
from avmm.boot.image import Image

_MAGIC_AT: Final = 0x202
_MAGIC: Final = b"HdrS"
_VERSION, _XLOADFLAGS, _PAYLOAD, _END = 0x206, 0x236, 0x248, 0x290
_SECTOR: Final = 512
_DEFAULT_SETUP_SECTORS: Final = 4
_OLDEST: Final = 0x208
_HAS_XLOADFLAGS: Final = 0x20C
_XLF_KERNEL_64: Final = 1 << 0
_SIZE_AFTER: Final = 4
"""Linux's build appends the unpacked size in these many bytes, except to gzip, which ends with it
anyway.
"""


@dataclass(frozen=True)
class _Header:
    """The fields of the header that are needed here, and the header itself (`raw`), which goes to
    the guest.
    """

    raw: bytes
    payload: int
    """The payload's offset in the file."""
    payload_size: int


def is_bzimage(image: Image) -> bool:
    """Does the file have the magic number of a bzImage's header, in its place?"""
    return image.head(_MAGIC_AT + 4)[_MAGIC_AT:] == _MAGIC


@contextmanager
def unpack(image: Image, limit: int) -> Iterator[tuple[Image, bytes]]:
    """The vmlinux, which may have at most `limit` bytes, and the setup header. Raises
    `ImageError`.
    """
    header = _parse(image)
    magic = image.read(header.payload, MAGIC_SIZE, "the payload's beginning")
    codec = compressed.find(magic)
    if codec is None:
        raise image.error(
            f"is a bzImage whose payload at {header.payload:#x} begins with {magic.hex(' ')}; "
            f"expected {', '.join(compressed.NAMES)}"
        )
    trailer = _SIZE_AFTER if codec.name != "gzip" else 0
    with image.unpacked(codec, header.payload, header.payload_size, limit, trailer) as vmlinux:
        if vmlinux.head(4) != ELF_MAGIC:
            raise image.error(
                f"is a bzImage whose payload unpacks to {vmlinux.head(8).hex(' ')}...; "
                "expected an ELF"
            )
        yield vmlinux, header.raw


def _parse(image: Image) -> _Header:
    head = image.read(0, _END, "the header of a bzImage")
    (version,) = struct.unpack_from("<H", head, _VERSION)
    if version < _OLDEST:
        raise image.error(
            f"is a bzImage of boot protocol {version >> 8}.{version & 0xFF:02}; expected 2.08 "
            "(Linux 2.6.26) or newer"
        )
    (flags,) = struct.unpack_from("<H", head, _XLOADFLAGS)
    if version >= _HAS_XLOADFLAGS and not flags & _XLF_KERNEL_64:
        raise image.error("is a bzImage of a 32-bit kernel; expected a 64-bit one")
    sectors = head[zeropage.HEADER] or _DEFAULT_SETUP_SECTORS
    offset, size = struct.unpack_from("<II", head, _PAYLOAD)
    payload = (sectors + 1) * _SECTOR + offset
    if size <= MAGIC_SIZE + _SIZE_AFTER:
        raise image.error(f"is a bzImage with a payload of {size} bytes")
    image.check(payload, size, "the payload of this bzImage")
    end = max(_MAGIC_AT + head[_MAGIC_AT - 1], _PAYLOAD)
    return _Header(head[zeropage.HEADER : end], payload, size)
