"""`load` as a whole: which format is taken, flat images, modules, and words for all else."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import guestview
from support.images import pvh_elf

from avmm.arch.x86_64 import layout
from avmm.arch.x86_64.boot.load import load
from avmm.arch.x86_64.mptable import mp_table
from avmm.boot import FlatOptions, Mode
from avmm.errors import ConfigError, ImageError
from avmm.memory.ram import GuestMemory

pytestmark = pytest.mark.timeout(60)
Write = Callable[..., Path]


@pytest.mark.parametrize("mode", list(Mode))
def test_flat(memory: GuestMemory, write: Write, mode: Mode) -> None:
    path = write(b"\x1f\x8b\x08 flat code", "flat.bin")
    entry = load(memory, path, flat=FlatOptions(mode, 0x7C00))
    assert (entry.mode, entry.ip) == (mode, 0x7C00)
    assert memory.read(0x7C00, 13) == b"\x1f\x8b\x08 flat code"
    assert set(entry.registers) == ({"rdi", "rsi", "rsp"} if mode is Mode.LONG else set())


def test_flat_in_the_least_ram(write: Write) -> None:
    memory = GuestMemory("4K")
    try:
        path = write(bytes([1]) * 4096)
        for mode in (Mode.REAL, Mode.PROTECTED):
            assert load(memory, path, flat=FlatOptions(mode, 0)).ip == 0
        assert memory.read(0, 4096) == bytes([1]) * 4096
        with pytest.raises(ImageError, match="guest RAM ends at 0x1000, before avmm's MP table"):
            load(memory, path, cpus=2, flat=FlatOptions(Mode.REAL, 0))
        with pytest.raises(ImageError, match=f"{path} at 0x1-0x1001 lies outside"):
            load(memory, path, flat=FlatOptions(Mode.REAL, 1))
    finally:
        memory.close()


@pytest.mark.parametrize(
    ("mode", "address"),
    [(Mode.REAL, 1 << 20), (Mode.REAL, -1), (Mode.PROTECTED, 1 << 32), (Mode.LONG, 1 << 32)],
)
def test_flat_where_it_cannot_be(
    memory: GuestMemory, write: Write, mode: Mode, address: int
) -> None:
    with pytest.raises(ConfigError, match=f"entered at {address:#x} in {mode.value} mode"):
        load(memory, write(b"x"), flat=FlatOptions(mode, address))


def test_flat_takes_no_command_line_but_in_long_mode(memory: GuestMemory, write: Write) -> None:
    path = write(b"x")
    for mode in (Mode.REAL, Mode.PROTECTED):
        with pytest.raises(ConfigError, match="a command line cannot be passed to a flat"):
            load(memory, path, cmdline="x", flat=FlatOptions(mode, 0))
        with pytest.raises(ConfigError, match="an initrd or modules cannot be passed"):
            load(memory, path, modules=[path], flat=FlatOptions(mode, 0))
    entry = load(memory, path, cmdline="hi", initrd=path, flat=FlatOptions(Mode.LONG, 0))
    told = guestview.start_info(memory, entry.registers["rdi"])
    assert (told.cmdline, len(told.modules)) == (b"hi", 1)


def test_gzip_and_strings_for_paths(memory: GuestMemory, write: Write) -> None:
    path = write(gzip.compress(bytes(pvh_elf())))
    assert load(memory, str(path)).mode is Mode.PROTECTED


def test_initrd_stays_as_it_is(memory: GuestMemory, write: Write) -> None:
    data = gzip.compress(b"initrd")
    entry = load(memory, write(pvh_elf()), initrd=write(data, "initrd"))
    [(_, content, _)] = guestview.start_info(memory, entry.registers["rbx"]).modules
    assert content == data


def test_initrd_that_does_not_fit(memory: GuestMemory, write: Write, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        ImageError, match=f"{initrd} has {1 << 40} bytes, for which there is no room"
    ):
        load(memory, write(pvh_elf()), initrd=initrd)
    with pytest.raises(ImageError, match="/nothing: cannot be opened"):
        load(memory, write(pvh_elf()), initrd="/nothing")
    with pytest.raises(ImageError, match="empty: is empty"):
        load(memory, write(pvh_elf()), modules=[write(b"", "empty")])


@pytest.mark.parametrize("cpus", [1, 4, 254])
def test_mp_table(memory: GuestMemory, write: Write, cpus: int) -> None:
    load(memory, write(pvh_elf()), cpus=cpus)
    expected = mp_table(cpus)
    assert memory.read(layout.MP_FLOATING_POINTER, len(expected)) == expected


@pytest.mark.parametrize("cpus", [0, 255])
def test_number_of_cpus(memory: GuestMemory, write: Write, cpus: int) -> None:
    with pytest.raises(ConfigError, match=f"{cpus} CPUs"):
        load(memory, write(pvh_elf()), cpus=cpus)


def test_command_line(memory: GuestMemory, write: Write) -> None:
    path = write(pvh_elf(system=b"Other\0"))

    def told(cmdline: str) -> bytes:
        entry = load(memory, path, cmdline=cmdline)
        return guestview.start_info(memory, entry.registers["rbx"]).cmdline

    assert told("x" * 4095) == b"x" * 4095
    assert told("ä\udcff") == b"\xc3\xa4\xff", "bytes of argv that are no UTF-8 come through"
    with pytest.raises(ConfigError, match=r"is 4096 bytes .*expected at most 4095"):
        told("ä" * 2048)
    with pytest.raises(ConfigError, match="contains a NUL at byte 1"):
        told("a\0b")
    with pytest.raises(ConfigError, match="cannot be encoded"):
        told("\ud800")


def at(offset: int, data: bytes, size: int = 0x9000) -> bytes:
    return (bytes([0x90]) * offset + data).ljust(size, b"\x90")


LOOKS = {
    "script": (b"#!/bin/sh\necho\n", "a shell script"),
    "text": (b"BOOT_IMAGE=/vmlinuz\n", "looks like text"),
    "arm64": (b"MZ" + at(0x36, b"ARM\x64"), "a Linux kernel Image for aarch64"),
    "efi": (at(0, b"MZ\x90"), "an EFI or Windows program"),
    "lzop": (b"\x89LZO\0\r\n\x1a\n", "data that were compressed with lzop: decompress them first"),
    "cpio": (b"070701" + b"0" * 100, "a cpio archive"),
    "disk": (at(510, b"\x55\xaa"), "a boot sector or disk image"),
    "twice": (gzip.compress(gzip.compress(b"x")), "looks like gzip that was compressed twice"),
    "zeros": (bytes(4096), "all zeros"),
    "multiboot2": (at(64, b"\xd6\x50\x52\xe8"), "a multiboot 2 kernel"),
    "noise": (b"\1\2\3\4", "nothing that avmm knows: it starts with 01 02 03 04"),
    "one byte": (b"\0", "all zeros"),
}


@pytest.mark.parametrize("case", LOOKS)
def test_unknown_formats(memory: GuestMemory, write: Write, case: str) -> None:
    data, expected = LOOKS[case]
    path = write(data)
    with pytest.raises(ImageError) as caught:
        load(memory, path)
    assert str(caught.value).startswith(f"{path}: looks like ")
    assert expected in str(caught.value)
    assert "Expected an ELF (PVH, multiboot or 64-bit), a multiboot image or a bzImage" in str(
        caught.value
    )


def test_importing_is_light() -> None:
    code = "import sys, avmm.arch.x86_64.boot.load; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"elftools" not in found.stdout
