"""bzImage, the format that distributions ship: a compressed vmlinux inside a program that unpacks
it.

avmm unpacks the vmlinux itself (`compressed`), so the program around it, which consists of the
real mode setup and a decompressor, never runs. The vmlinux is entered by Linux's 64-bit boot
protocol, which is part of what `longmode` promises. The bzImage's header goes into the zero page.

A program that only uses the format, and has no payload, is entered as it is: by the same protocol,
0x200 bytes behind where it is loaded.

Documentation/arch/x86/boot.rst: "The Real-Mode Kernel Header", fields payload_offset and
payload_length (protocol 2.08 on, Linux 2.6.26), pref_address and init_size (2.10), xloadflags
(2.12); "64-bit Boot Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from avmm.arch.x86_64.boot import longmode, zeropage
from avmm.arch.x86_64.boot.assembly import Assembly
from avmm.boot import compressed
from avmm.boot.compressed import MAGIC_SIZE
from avmm.boot.elf_headers import MAGIC as ELF_MAGIC
from avmm.boot.entry import Entry, Protocol
from avmm.boot.image import Image

_MAGIC_AT: Final = 0x202
_MAGIC: Final = b"HdrS"
_VERSION, _XLOADFLAGS, _PAYLOAD, _END = 0x206, 0x236, 0x248, 0x290
_PREF_ADDRESS: Final = 0x258
"""pref_address, and init_size behind it."""
_ENTRY_64: Final = 0x200
"""Where the 64-bit entry point lies in the protected-mode part."""
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
class Setup:
    """The fields of the header that are needed here, and the header itself (`raw`), which goes to
    the guest.
    """

    raw: bytes
    program: int
    """The offset in the file of the protected-mode part."""
    payload: int
    """The payload's offset in the file."""
    payload_size: int
    """0 if there is no payload."""
    address: int
    """Where the protected-mode part is loaded, if it is entered as it is."""
    room: int
    """How many bytes it needs there."""


def is_bzimage(image: Image) -> bool:
    """Does the file have the magic number of a bzImage's header, in its place?"""
    return image.head(_MAGIC_AT + 4)[_MAGIC_AT:] == _MAGIC


@contextmanager
def unpack(image: Image, setup: Setup, limit: int) -> Iterator[Image]:
    """The vmlinux, which may have at most `limit` bytes. Raises `ImageError`."""
    magic = image.read(setup.payload, MAGIC_SIZE, "the payload's beginning")
    codec = compressed.find(magic)
    if codec is None:
        raise image.error(
            f"is a bzImage whose payload at {setup.payload:#x} begins with {magic.hex(' ')}; "
            f"expected {', '.join(compressed.NAMES)}"
        )
    trailer = _SIZE_AFTER if codec.name != "gzip" else 0
    with image.unpacked(codec, setup.payload, setup.payload_size, limit, trailer) as vmlinux:
        if vmlinux.head(4) != ELF_MAGIC:
            raise image.error(
                f"is a bzImage whose payload unpacks to {vmlinux.head(8).hex(' ')}...; "
                "expected an ELF"
            )
        yield vmlinux


def load_as_it_is(assembly: Assembly, image: Image, setup: Setup, protocol: Protocol) -> Entry:
    """Load the protected-mode part of a program without a payload (memtest86+ is one), and enter
    it at its 64-bit entry point, as `longmode` says. Raises `ImageError`.
    """
    if protocol is Protocol.PVH:
        raise image.error(
            "has no vmlinux in it, and so no PVH note, which the protocol 'pvh' needs"
        )
    size = image.size - setup.program
    longmode.claim(assembly)
    assembly.claims.claim(setup.address, max(size, setup.room), image.name)
    assembly.load(image, setup.program, size, setup.address)
    return longmode.enter(assembly, setup.address + _ENTRY_64, setup.raw)


def parse(image: Image) -> Setup:
    """Read the header. Raises `ImageError` if the file cannot be entered in long mode."""
    head = image.read(0, _END, "the header of a bzImage")
    (version,) = struct.unpack_from("<H", head, _VERSION)
    named = f"boot protocol {version >> 8}.{version & 0xFF:02}"
    if version < _OLDEST:
        raise image.error(
            f"starts in real mode and needs a BIOS, which there is not: it has {named} and no "
            "64-bit entry point; expected a Linux of 2.6.26 (protocol 2.08) or newer"
        )
    (flags,) = struct.unpack_from("<H", head, _XLOADFLAGS)
    has_entry = version >= _HAS_XLOADFLAGS and bool(flags & _XLF_KERNEL_64)
    if version >= _HAS_XLOADFLAGS and not has_entry:
        raise image.error("is a bzImage of a 32-bit kernel; expected a 64-bit one")
    sectors = head[zeropage.HEADER] or _DEFAULT_SETUP_SECTORS
    offset, size = struct.unpack_from("<II", head, _PAYLOAD)
    program = (sectors + 1) * _SECTOR
    if size == 0:
        if not has_entry:
            raise image.error(
                f"starts in real mode and needs a BIOS, which there is not: it has {named}, no "
                "payload and no 64-bit entry point"
            )
        image.check(program, _ENTRY_64 + 1, "the program of this bzImage")
    elif size <= MAGIC_SIZE + _SIZE_AFTER:
        raise image.error(f"is a bzImage with a payload of {size} bytes")
    else:
        image.check(program + offset, size, "the payload of this bzImage")
    address, room = struct.unpack_from("<QI", head, _PREF_ADDRESS)
    end = max(_MAGIC_AT + head[_MAGIC_AT - 1], _PAYLOAD)
    raw = head[zeropage.HEADER : end]
    return Setup(raw, program, program + offset, size, address, room)
