"""PVH: the note is found among others, and the guest finds what it was promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support import guestview
from support.images import PT_NOTE, Elf, Segment, note, pvh_elf, pvh_note

from avmm.arch.x86_64.boot.load import load
from avmm.arch.x86_64.layout import RAM
from avmm.boot import Mode
from avmm.errors import ImageError
from avmm.memory.ram import GuestMemory

pytestmark = pytest.mark.timeout(60)
Write = Callable[..., Path]


@pytest.mark.parametrize("bits", [32, 64])
def test_entry_and_start_info(memory: GuestMemory, write: Write, bits: int) -> None:
    files = [write(b"initrd" * 1000, "initrd"), write(b"m" * 4096, "m1"), write(b"2", "m2")]
    entry = load(memory, write(pvh_elf(bits=bits)), cmdline="", initrd=files[0], modules=files[1:])
    assert (entry.mode, entry.ip) == (Mode.PROTECTED, 0x100004)
    assert set(entry.registers) == {"rbx"}
    assert memory.read(0x100000, 16) == b"\xf4" * 16
    told = guestview.start_info(memory, entry.registers["rbx"])
    assert told.cmdline == b""
    assert [content for _, content, _ in told.modules] == [f.read_bytes() for f in files]
    assert [name for _, _, name in told.modules] == [bytes(f) for f in files]
    assert [gpa for gpa, _, _ in told.modules] == [0xFFE000, 0xFFD000, 0xFFC000]
    assert told.memory_map == [
        (0, 0x90000, 1),
        (0x90000, 0x7000, 2),
        (0x97000, 0x8C00, 1),
        (0x9FC00, 0x400, 2),
        (0xF0000, 0x10000, 2),
        (0x100000, 0xF00000, 1),
        (0xFFFBC000, 0x4000, 2),
    ]


def test_ram_above_4_gib_is_told(write: Write) -> None:
    memory = GuestMemory("3200M", layout=RAM)
    try:
        entry = load(memory, write(pvh_elf()), initrd=write(b"i", "initrd"))
        told = guestview.start_info(memory, entry.registers["rbx"])
        assert told.memory_map[-1] == (4 << 30, 128 << 20, 1)
        assert told.modules[0][0] == 0xBFFFF000, "below the hole, though there is RAM above it"
    finally:
        memory.close()


def test_low_memory_stays_free(memory: GuestMemory, write: Write) -> None:
    elf = pvh_elf()
    elf.segments.append(Segment(b"low" * 0x5000, paddr=0x500, memsz=0x90000 - 0x500))
    load(memory, write(elf))
    elf.segments[-1].memsz = 0x90001 - 0x500
    with pytest.raises(ImageError, match=r"segment 2 .* overlaps avmm's boot information"):
        load(memory, write(elf))


def test_entry_above_4_gib(write: Write) -> None:
    memory = GuestMemory("3200M", layout=RAM)
    try:
        elf = pvh_elf(entry=4 << 30)
        elf.segments.append(Segment(b"high", paddr=4 << 30))
        with pytest.raises(ImageError, match="entry point 0x100000000; expected an address below"):
            load(memory, write(elf))
    finally:
        memory.close()


@pytest.mark.parametrize("size", [4, 8])
def test_note_sizes(memory: GuestMemory, write: Write, size: int) -> None:
    elf = Elf([Segment(b"x" * 16), Segment(pvh_note(0x100001, size), kind=PT_NOTE)])
    assert load(memory, write(elf)).ip == 0x100001


def test_notes_padded_to_8_bytes(memory: GuestMemory, write: Write) -> None:
    notes = note(b"GNU\0", 5, bytes(20), align=8)
    notes += note(b"Xen\0", 18, (0x100002).to_bytes(4, "little"), align=8)
    elf = Elf([Segment(b"x" * 16), Segment(notes, kind=PT_NOTE, align=8)])
    entry = load(memory, write(elf))
    assert (entry.mode, entry.ip) == (Mode.PROTECTED, 0x100002)


def test_notes_that_are_not_the_one(memory: GuestMemory, write: Write) -> None:
    others = note(b"Xen\0", 6, b"linux") + note(b"Linux\0", 18, bytes(8)) + note(b"Xe", 18, b"x")
    elf = Elf([Segment(b"x" * 16), Segment(others, kind=PT_NOTE)])
    assert load(memory, write(elf)).mode is Mode.LONG


@pytest.mark.parametrize(
    ("desc", "expected"),
    [
        (b"", "a PVH note of 0 bytes; expected 4 or 8"),
        (b"\0" * 5, "a PVH note of 5 bytes"),
        ((0x100010).to_bytes(4, "little"), "entry point 0x100010; expected an address below"),
        (bytes(8), "entry point 0x0; expected"),
        ((1 << 32 | 0x100000).to_bytes(8, "little"), "entry point 0x100100000; expected"),
    ],
)
def test_bad_notes(memory: GuestMemory, write: Write, desc: bytes, expected: str) -> None:
    path = write(Elf([Segment(b"x" * 16), Segment(note(b"Xen\0", 18, desc), kind=PT_NOTE)]))
    with pytest.raises(ImageError, match=expected) as caught:
        load(memory, path)
    assert str(caught.value).startswith(str(path))
