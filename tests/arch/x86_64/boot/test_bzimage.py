"""bzImages: the vmlinux inside of them, and the zero page by which it is entered."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.images import BzImage, Elf, Segment, pvh_elf
from support.packing import PACK

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.boot.load import load
from avmm.boot import Mode, Protocol
from avmm.errors import ConfigError, ImageError
from avmm.memory.ram import GuestMemory

Write = Callable[..., Path]
CODE = bytes(range(1, 200))
VMLINUX = bytes(Elf([Segment(CODE, paddr=0x200000, memsz=0x3000)], entry=0x200010))


def packed(name: str, vmlinux: bytes = VMLINUX) -> bytes:
    """As Linux's build makes a payload: all but gzip have the size after them."""
    size = len(vmlinux).to_bytes(4, "little")
    return PACK[name](vmlinux) + (b"" if name == "gzip" else size)


def zero_page(memory: GuestMemory) -> bytes:
    return memory.read(layout.ZERO_PAGE, layout.ZERO_PAGE_SIZE)


@pytest.mark.parametrize("sectors", [0, 4, 39])
@pytest.mark.parametrize("name", PACK)
def test_the_vmlinux_is_unpacked_and_entered(
    memory: GuestMemory, write: Write, name: str, sectors: int
) -> None:
    entry = load(memory, write(BzImage(packed(name), sectors=sectors)), cmdline="quiet")
    assert (entry.mode, entry.ip, entry.is_kernel) == (Mode.LONG, 0x200010, True)
    assert entry.registers["rsi"] == layout.ZERO_PAGE
    assert memory.read(0x200000, 0x3000) == CODE + bytes(0x3000 - len(CODE))


def test_relocations_after_the_vmlinux_are_left_out(memory: GuestMemory, write: Write) -> None:
    """CONFIG_RELOCATABLE appends them to it before it is packed."""
    load(memory, write(BzImage(packed("xz", VMLINUX + b"\xff" * 4000))))
    assert memory.read(0x200000, len(CODE)) == CODE


def test_what_the_zero_page_tells(memory: GuestMemory, write: Write) -> None:
    initrd = write(b"initrd" * 1000, "initrd")
    image = BzImage(packed("gzip"), initrd_addr_max=0x7F_FFFF)
    load(memory, write(image), cmdline="console=ttyS0 quiet", initrd=initrd)
    page = zero_page(memory)
    assert page[0x202:0x206] == b"HdrS"
    assert (
        page[0x1F1 : 0x202 + image.jump]
        == bytes(image)[0x1F1:0x210] + b"\xff" + (page[0x211 : 0x202 + image.jump])
    )
    at, size = struct.unpack_from("<II", page, 0x218)
    assert memory.read(at, size) == b"initrd" * 1000
    assert at + size <= 0x80_0000, "above what the kernel can have"
    (cmdline,) = struct.unpack_from("<I", page, 0x228)
    assert memory.read(cmdline, 20) == b"console=ttyS0 quiet\0"
    count = page[0x1E8]
    table = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(count)]
    assert table[0] == (0, 0x90000, 1)
    assert (0x100000, memory.size - 0x100000, 1) in table
    assert all(a + n <= b for (a, n, _), (b, _, _) in itertools.pairwise(table))


def test_without_initrd_the_header_s_own_is_not_believed(
    memory: GuestMemory, write: Write
) -> None:
    data = bytearray(bytes(BzImage(packed("gzip"))))
    struct.pack_into("<II", data, 0x218, 0x1000, 0x1000)
    load(memory, write(data))
    assert struct.unpack_from("<II", zero_page(memory), 0x218) == (0, 0)


def test_a_plain_vmlinux_gets_a_zero_page_too(memory: GuestMemory, write: Write) -> None:
    entry = load(memory, write(VMLINUX), cmdline="x")
    assert entry.registers["rsi"] == layout.ZERO_PAGE
    page = zero_page(memory)
    assert (page[0x1FE:0x200], page[0x202:0x206]) == (b"\x55\xaa", b"HdrS")
    assert page[0x1E8] > 1


@pytest.mark.parametrize("wrap", [bytes, lambda elf: bytes(BzImage(packed("zstd", bytes(elf))))])
def test_the_protocol_can_be_chosen(
    memory: GuestMemory, write: Write, wrap: Callable[[object], bytes]
) -> None:
    image = write(wrap(pvh_elf()))
    assert load(memory, image, protocol=Protocol.PVH).mode is Mode.PROTECTED
    other = GuestMemory("16M")
    assert load(other, image, protocol=Protocol.LINUX64).mode is Mode.LONG
    other.close()


def test_a_protocol_that_the_image_does_not_have_is_refused(
    memory: GuestMemory, write: Write
) -> None:
    with pytest.raises(ImageError, match="has no PVH note, which the protocol 'pvh' needs"):
        load(memory, write(VMLINUX), protocol=Protocol.PVH)
    with pytest.raises(ImageError, match=r"looks like text\. Expected a vmlinux or bzImage"):
        load(memory, write(b"hello"), protocol=Protocol.LINUX64)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a payload of nothing": ({"payload": b"x"}, "a bzImage with a payload of 1 bytes"),
    "no payload, no 64-bit entry": (
        {"payload": b"", "version": 0x20A},
        "needs a BIOS, which there is not: it has boot protocol 2.10, no payload and no 64-bit",
    ),
    "a program without an entry": ({"payload": b""}, "the program of this bzImage should be"),
    "32 bits": ({"xloadflags": 0}, "a 32-bit kernel; expected a 64-bit one"),
    "needs a BIOS": (
        {"version": 0x207},
        r"starts in real mode and needs a BIOS, which there is not: it has boot protocol 2.07",
    ),
    "beyond the file": (
        {"payload_length": 1 << 31},
        r"the payload of this bzImage should be the 2147483648 bytes at offset 0xa40",
    ),
    "offset beyond the file": (
        {"payload_offset": 0x40, "payload_length": 1 << 16},
        "but the file",
    ),
    "wrong magic": ({"payload": b"\x7fELF" * 10}, r"begins with 7f 45 4c 46 7f 45; expected gzip"),
    "lzo": ({"payload": b"\x89LZO\0\r\n\x1a\n" + bytes(99)}, "expected gzip, xz, lzma, bzip2"),
    "no ELF in it": ({"payload": packed("gzip", b"hello world")}, "unpacks to 68 65 6c 6c 6f"),
    "cut off": ({"payload": packed("xz")[:150]}, "is cut off: its xz data do not end within"),
    "harmed": ({"payload": b"\xfd7zXZ\0" + bytes(500)}, "is damaged .xz."),
    "a bomb": (
        {"payload": packed("gzip", VMLINUX + bytes(400 << 20))},
        "decompresses to more than .* bomb",
    ),
    "more after it": ({"payload": packed("gzip") + b"tail"}, "there are more data after its end"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(memory: GuestMemory, write: Write, case: str) -> None:
    fields, text = WRONG[case]
    image = write(BzImage(**({"payload": packed("gzip")} | fields)))
    with pytest.raises(ImageError, match=text) as caught:
        load(memory, image)
    assert str(caught.value).startswith(f"{image}: ")


def test_a_header_that_is_cut_off_is_said(memory: GuestMemory, write: Write) -> None:
    with pytest.raises(ImageError, match="the header of a bzImage should be the 656 bytes"):
        load(memory, write(bytes(BzImage(b""))[:0x220]))


def test_a_kernel_over_the_zero_page_is_refused(memory: GuestMemory, write: Write) -> None:
    low = bytes(Elf([Segment(CODE, paddr=0x95000)], entry=0x95000))
    with pytest.raises(ImageError, match="segment 0 at 0x95000-0x950c7 overlaps avmm's zero page"):
        load(memory, write(BzImage(packed("lz4", low))))


def test_an_initrd_that_does_not_fit_is_refused(memory: GuestMemory, write: Write) -> None:
    initrd = write(bytes(20 << 20), "initrd")
    with pytest.raises(ImageError, match="for which there is no room in guest RAM below"):
        load(memory, write(BzImage(packed("bzip2"))), initrd=initrd)


def test_a_program_without_a_payload_is_entered_as_it_is(
    memory: GuestMemory, write: Write
) -> None:
    """As Debian's memtest86+ is made: protocol 2.12, the 64-bit entry, its own code."""
    program = bytes(0x1C0) + CODE * 100
    image = BzImage(b"", version=0x20C, sectors=2, payload_offset=0x40, init_size=0x10000)
    entry = load(memory, write(bytes(image) + program), cmdline="console=ttyS0,115200")
    assert (entry.mode, entry.ip) == (Mode.LONG, 0x100200)
    assert memory.read(0x100040, len(program)) == program
    assert entry.registers["rsi"] == layout.ZERO_PAGE
    with pytest.raises(ImageError, match="no PVH note, which the protocol 'pvh' needs"):
        load(memory, write(bytes(image) + program), protocol=Protocol.PVH)


def test_a_command_line_that_the_kernel_does_not_take_is_refused(
    memory: GuestMemory, write: Write
) -> None:
    image = write(BzImage(packed("gzip"), cmdline_size=255))
    with pytest.raises(ConfigError, match=f"expected at most 255, because {image} takes no more"):
        load(memory, image, cmdline="x" * 256)
    devices = ["virtio_mmio.device=0x200@0xd0000000:5"]
    with pytest.raises(ConfigError, match="is 258 bytes with what avmm adds to it"):
        load(memory, image, cmdline="x" * 220, devices=devices)


@pytest.mark.parametrize("protocol", Protocol)
def test_what_linux_would_cut_off_is_refused(
    memory: GuestMemory, write: Write, protocol: Protocol
) -> None:
    """A vmlinux has no header that says how much it takes."""
    with pytest.raises(ConfigError, match=r"is 2048 bytes .* expected at most 2047"):
        load(memory, write(pvh_elf()), cmdline="x" * 2048, protocol=protocol)


def test_another_kernel_takes_more(memory: GuestMemory, write: Write) -> None:
    load(memory, write(pvh_elf(system=b"Other\0")), cmdline="x" * 2048)
