"""Multiboot: header search, both ways of loading, the information, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from support import guestview
from support.images import Elf, Segment, multiboot_elf, multiboot_header, pvh_elf

from avmm.arch.x86_64.boot.load import load
from avmm.boot import Mode
from avmm.errors import ConfigError, ImageError
from avmm.memory.ram import GuestMemory

pytestmark = pytest.mark.timeout(60)
Write = Callable[..., Path]
LOADER_MAGIC = 0x2BADB002
ADDRESSES = 1 << 16


def failure(memory: GuestMemory, path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        load(memory, path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_elf_as_kvm_unit_tests_have_it(memory: GuestMemory, write: Write) -> None:
    """Flags 0, 32-bit ELF, environment in the first module, arguments behind the path."""
    path, environment = write(multiboot_elf(), "test.flat"), write(b"A=1\nB=2\n", "env")
    entry = load(memory, path, cmdline="x  y", initrd=environment)
    assert (entry.mode, entry.ip) == (Mode.PROTECTED, 0x10000C)
    assert set(entry.registers) == {"rax", "rbx"}
    assert entry.registers["rax"] == LOADER_MAGIC
    told = guestview.multiboot(memory, entry.registers["rbx"])
    assert told.cmdline == bytes(path) + b" x  y"
    assert told.modules == [(0xFFF000, b"A=1\nB=2\n", bytes(environment))]
    assert told.mem == (576, 15 << 10), "KiB from 0 to what is reserved, KiB from 1 MiB on"
    assert told.loader == b"avmm"
    assert told.memory_map == [
        (0, 0x90000, 1),
        (0x90000, 0x7000, 2),
        (0x97000, 0x8C00, 1),
        (0x9FC00, 0x400, 2),
        (0xF0000, 0x10000, 2),
        (0x100000, 0xF00000, 1),
        (0xFFFBC000, 0x4000, 2),
    ]


def test_no_arguments_and_many_modules(memory: GuestMemory, write: Write) -> None:
    path = write(multiboot_elf(flags=3))
    modules = [write(b"%d" % i, f"module {i}") for i in range(20)]
    entry = load(memory, path, initrd=write(b"first", "initrd"), modules=modules)
    told = guestview.multiboot(memory, entry.registers["rbx"])
    assert told.cmdline == bytes(path)
    assert [content for _, content, _ in told.modules] == [b"first"] + [
        b"%d" % i for i in range(20)
    ]
    entry = load(memory, path)
    assert guestview.multiboot(memory, entry.registers["rbx"]).modules == []


def test_too_many_modules(memory: GuestMemory, write: Write) -> None:
    modules = [write(b"x", "m")] * 800
    with pytest.raises(ConfigError, match=r"the boot information has .* expected fewer modules"):
        load(memory, write(multiboot_elf()), modules=modules)


FIRST = 52 + 32
"""Where the data begins in an ELF of one segment."""


def with_header_at(offset: int, header: bytes, tail: bytes = b"\xf4" * 16) -> bytes:
    return bytes(Elf([Segment(header + tail)], bits=32, prefix=bytes(offset - FIRST)))


@pytest.mark.parametrize("offset", [FIRST, FIRST + 4, 4096, 8192 - 12])
def test_header_is_searched(memory: GuestMemory, write: Write, offset: int) -> None:
    decoy = multiboot_header(checksum=1)
    image = with_header_at(offset, multiboot_header())
    if offset - FIRST >= len(decoy):
        image = image[:FIRST] + decoy + image[FIRST + len(decoy) :]
    assert load(memory, write(image)).registers["rax"] == LOADER_MAGIC


@pytest.mark.parametrize(
    "image",
    [
        with_header_at(8192 - 8, multiboot_header()),
        with_header_at(8192, multiboot_header()),
        with_header_at(FIRST + 2, multiboot_header()),
        with_header_at(FIRST, multiboot_header(checksum=0)),
        with_header_at(FIRST, multiboot_header()[:11], b""),
    ],
    ids=["across the end", "behind the end", "unaligned", "checksum", "cut off"],
)
def test_no_header(memory: GuestMemory, write: Write, image: bytes) -> None:
    assert "without a PVH note or a multiboot header" in failure(memory, write(image))


def with_addresses(
    *, header: int, start: int, load_end: int, bss_end: int, entry: int, flags: int = 0
) -> bytes:
    return multiboot_header(flags | ADDRESSES, header, start, load_end, bss_end, entry)


def test_load_addresses(memory: GuestMemory, write: Write) -> None:
    header = with_addresses(
        header=0x200010, start=0x200008, load_end=0x200034, bss_end=0x205000, entry=0x200030
    )
    image = b"AAAAAAAAAAAAAAAA" + b"before.." + header + b"codecode"
    entry = load(memory, write(image))
    assert (entry.mode, entry.ip) == (Mode.PROTECTED, 0x200030)
    loaded = (b"before.." + header + b"codecode")[:0x2C]
    assert memory.read(0x200008, 0x40) == loaded + bytes(0x40 - len(loaded))
    room = 0x1000000 - 0x205000  # the bss is taken too
    initrd = write(bytes(room), "initrd")
    with closing(GuestMemory("16M")) as fresh:
        told = guestview.multiboot(
            fresh, load(fresh, write(image), initrd=initrd).registers["rbx"]
        )
        assert told.modules[0][0] == 0x205000
    with pytest.raises(ImageError, match=r"initrd .* for which there is no room"):
        load(memory, write(image), initrd=write(bytes(room + 1), "initrd"))


def test_zeros_mean_all_of_the_file(memory: GuestMemory, write: Write) -> None:
    header = with_addresses(header=0x200000, start=0x200000, load_end=0, bss_end=0, entry=0x200020)
    entry = load(memory, write(header + b"code" * 3000))
    assert entry.ip == 0x200020
    assert memory.read(0x200020, 12000) == b"code" * 3000


def test_addresses_serve_a_64_bit_elf(memory: GuestMemory, write: Write) -> None:
    at = 64 + 56
    header = with_addresses(
        header=0x300000 + at, start=0x300000, load_end=0, bss_end=0, entry=0x300000 + at
    )
    path = write(Elf([Segment(header + b"code")], machine=183))
    entry = load(memory, path)
    assert (entry.mode, entry.ip) == (Mode.PROTECTED, 0x300000 + at)
    assert memory.read(0x300000, 4) == b"\x7fELF"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"header": 0x1FFFFF}, "but its load_addr 0x200000 would lie before"),
        ({"header": 0x200004}, "its load_addr 0x200000 would lie before the file's first byte"),
        ({"load_end": 0x1FFFFF}, "load_end_addr 0x1fffff below load_addr 0x200000"),
        ({"load_end": 0x20002D}, "should be the 45 bytes at offset 0x0, but the file has only 44"),
        ({"load_end": 0xFFFFFFFF}, "but the file has only 44 bytes"),
        ({"bss_end": 0x20002B}, "bss_end_addr 0x20002b below the end of what is loaded"),
        ({"entry": 0x1FFFFF}, "entry point 0x1fffff in its multiboot header, outside"),
        ({"entry": 0x20002C}, "outside the image at 0x200000-0x20002c"),
        ({"bss_end": 0xFFFFFFFF}, "lies outside guest RAM"),
        ({"header": 0x94000, "start": 0x94000, "entry": 0x94000}, "overlaps avmm's boot info"),
    ],
)
def test_bad_addresses(
    memory: GuestMemory, write: Write, fields: dict[str, int], expected: str
) -> None:
    good = {"header": 0x200000, "start": 0x200000, "load_end": 0, "bss_end": 0, "entry": 0x200020}
    assert load(memory, write(with_addresses(**good) + bytes(12))).ip == 0x200020
    assert expected in failure(memory, write(with_addresses(**{**good, **fields}) + bytes(12)))


def test_header_that_is_cut_off(memory: GuestMemory, write: Write) -> None:
    header = with_addresses(header=0x200000, start=0x200000, load_end=0, bss_end=0, entry=0x200000)
    assert "that does not end within its first 31 bytes" in failure(memory, write(header[:31]))
    image = bytes(8192 - 28) + header
    assert "that does not end within its first 8192 bytes" in failure(memory, write(image))


@pytest.mark.parametrize("flags", [1 << 2, 1 << 3, 1 << 15, 0xFFFF])
def test_demands_that_cannot_be_fulfilled(memory: GuestMemory, write: Write, flags: int) -> None:
    text = failure(memory, write(multiboot_elf(flags=flags)))
    assert f"{flags & ~3:#x} cannot be fulfilled" in text
    assert ("video mode" in text) == bool(flags & 4)


def test_optional_flags_are_ignored(memory: GuestMemory, write: Write) -> None:
    assert load(memory, write(multiboot_elf(flags=0xFFFE0003))).ip == 0x10000C


def test_64_bit_elf(memory: GuestMemory, write: Write) -> None:
    text = failure(memory, write(multiboot_elf(bits=64)))
    assert "64-bit ELF with a multiboot header that has no load addresses" in text


def test_pvh_note_goes_first(memory: GuestMemory, write: Write) -> None:
    elf = pvh_elf()
    elf.segments[0] = Segment(multiboot_header() + bytes(16))
    entry = load(memory, write(elf))
    assert (entry.ip, set(entry.registers)) == (0x100004, {"rbx"})


def test_entry_is_translated(memory: GuestMemory, write: Write) -> None:
    elf = multiboot_elf()
    elf.segments[0].vaddr = 0xC0100000
    elf.entry = 0xC010000C
    assert load(memory, write(elf)).ip == 0x10000C


def test_path_counts_for_the_command_line(memory: GuestMemory, write: Write) -> None:
    path = write(multiboot_elf())
    room = 4095 - len(bytes(path)) - 1
    entry = load(memory, path, cmdline="x" * room)
    told = guestview.multiboot(memory, entry.registers["rbx"])
    assert told.cmdline == bytes(path) + b" " + b"x" * room
    with pytest.raises(ConfigError, match=r"is 4096 bytes .*expected at most 4095"):
        load(memory, path, cmdline="x" * (room + 1))


def test_kernel_linked_low_as_realmode_flat(
    memory: GuestMemory, compile_elf: Callable[..., Path]
) -> None:
    path = compile_elf(
        """
        .globl _start
        .text
        .long 0x1badb002, 0, -0x1badb002
        _start: hlt
        .section .note.GNU-stack,"",@progbits
        """,
        "-m32",
        "-Wl,-Ttext=0x8000",
    )
    entry = load(memory, path)
    assert (entry.mode, entry.ip) == (Mode.PROTECTED, 0x800C)
    assert memory.read(0x800C, 1) == b"\xf4"
