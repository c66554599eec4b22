"""Reads and checks ELF headers, segments and notes, so that the loaders may rely on them.

pyelftools defines the structures. Nothing else of it is used, because its `ELFFile` would also
import its DWARF code and take twice the memory. It is imported only when an ELF file is read.

The header is hostile: the table of program headers may be anywhere and of any length, sizes may be
absurd, and segments may overlap. All of this is checked here against the file. `Claims` checks the
segments against guest RAM.

(System V ABI, "ELF-64 Object File Format", version 1.5, and the 32-bit format before it.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from avmm.boot.image import Image

MAGIC: Final = b"\x7fELF"
MAX_PROGRAM_HEADERS: Final = 128
"""Kernels have fewer than 20; the format allows billions."""
MAX_NOTES: Final = 1 << 16
"""The most bytes of notes that a file may have."""

_EHDR_SIZE: Final = {32: 52, 64: 64}
_PHDR_SIZE: Final = {32: 32, 64: 56}
_MACHINE: Final = {32: "EM_386", 64: "EM_X86_64"}
PF_X: Final = 1
"""In `Segment.flags`: executable."""
_TYPES: Final = {
    "ET_REL": "an object file; expected a linked executable",
    "ET_CORE": "a core dump; expected an executable",
}


@dataclass(frozen=True, slots=True)
class Segment:
    """A program header. The file is known to hold its `filesz` bytes."""

    index: int
    kind: str | int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    flags: int
    align: int


@dataclass(frozen=True, slots=True)
class Note:
    """An entry of a PT_NOTE segment."""

    owner: bytes
    kind: int
    desc: bytes


@dataclass(frozen=True, slots=True)
class Elf:
    """The headers of an executable for this architecture."""

    image: Image
    bits: int
    """32 or 64."""
    segments: tuple[Segment, ...]
    """All of them, in the file's order."""
    entry: int
    """`e_entry` as in the file, or where it was moved to; see `elf.physical_entry`."""
    is_pie: bool = False
    """Is it linked to no fixed address (ET_DYN)?"""
    moved_by: int = 0
    """How far the addresses of its segments are above those in the file."""

    @property
    def loadable(self) -> tuple[Segment, ...]:
        return tuple(s for s in self.segments if s.kind == "PT_LOAD" and s.memsz)


def parse(image: Image) -> Elf:
    """Read the headers. Raises `ImageError` if they are not those of a kernel for x86."""
    ident = image.read(0, 16, "the ELF identification")
    if ident[:4] != MAGIC:
        raise image.error(f"is not an ELF file: it starts with {ident[:4]!r}, expected {MAGIC!r}")
    bits = {1: 32, 2: 64}.get(ident[4])
    if bits is None:
        raise image.error(f"has ELF class {ident[4]}; expected 1 (32-bit) or 2 (64-bit)")
    if ident[5] not in (1, 2):
        raise image.error(f"has ELF data encoding {ident[5]}; expected 1 (little endian)")
    structs = Structs(image, bits, little_endian=ident[5] == 1)
    header = structs.header(image.read(0, _EHDR_SIZE[bits], "the ELF header"))
    _check_header(image, bits, ident[5], header)
    segments = tuple(_segments(image, bits, header, structs))
    for segment in segments:
        if segment.kind == "PT_INTERP":
            raise image.error("is a dynamically linked program (it has PT_INTERP), not a kernel")
    if not any(segment.kind == "PT_LOAD" and segment.memsz for segment in segments):
        raise image.error("has no loadable segment (PT_LOAD)")
    return Elf(image, bits, segments, int(header["e_entry"]), header["e_type"] == "ET_DYN")


def _check_header(image: Image, bits: int, encoding: int, header: Any) -> None:
    machine = header["e_machine"]
    if machine not in _MACHINE.values() or encoding != 1:
        endian = "little" if encoding == 1 else "big"
        name = machine.removeprefix("EM_") if isinstance(machine, str) else f"machine {machine}"
        raise image.error(
            f"is a {bits}-bit {endian} endian ELF for {name}; "
            f"expected a little endian one for x86-64"
        )
    if machine != _MACHINE[bits]:
        raise image.error(f"is a {bits}-bit ELF for {machine}; expected {_MACHINE[bits]}")
    if header["e_type"] not in ("ET_EXEC", "ET_DYN"):
        what = _TYPES.get(header["e_type"], f"of type {header['e_type']}; expected ET_EXEC")
        raise image.error(f"is an ELF, but {what}")


def _segments(image: Image, bits: int, header: Any, structs: Structs) -> Iterator[Segment]:
    count, size = header["e_phnum"], header["e_phentsize"]
    if count == 0:
        raise image.error("has no program headers, so nothing says what to load")
    if count > MAX_PROGRAM_HEADERS:
        raise image.error(
            f"has {count} program headers; at most {MAX_PROGRAM_HEADERS} are accepted"
        )
    if size != _PHDR_SIZE[bits]:
        raise image.error(f"has program headers of {size} bytes; expected {_PHDR_SIZE[bits]}")
    table = image.read(header["e_phoff"], count * size, "the program header table")
    for index in range(count):
        raw = structs.program_header(table[index * size :][:size])
        segment = Segment(
            index,
            raw["p_type"],
            raw["p_offset"],
            raw["p_vaddr"],
            raw["p_paddr"],
            raw["p_filesz"],
            raw["p_memsz"],
            raw["p_flags"],
            raw["p_align"],
        )
        if segment.kind in ("PT_LOAD", "PT_NOTE"):
            image.check(segment.offset, segment.filesz, f"segment {index}")
        if segment.kind == "PT_LOAD" and segment.filesz > segment.memsz:
            raise image.error(
                f"segment {index} has {segment.filesz} bytes in the file, more than its "
                f"{segment.memsz} in memory"
            )
        yield segment


def notes(elf: Elf) -> Iterator[Note]:
    """The notes of all PT_NOTE segments. Raises `ImageError` if one is malformed.

    Names and descriptors are padded to 4 bytes, or to 8 in a segment with that alignment (gABI,
    "Note Section").
    """
    structs = Structs(elf.image, elf.bits, little_endian=True)
    left = MAX_NOTES
    for segment in elf.segments:
        if segment.kind != "PT_NOTE":
            continue
        where = f"note segment {segment.index}"
        left -= segment.filesz
        if left < 0:
            raise elf.image.error(f"has more than {MAX_NOTES} bytes of notes")
        data = elf.image.read(segment.offset, segment.filesz, where)
        align = 8 if segment.align == 8 else 4
        at = 0
        while len(data) - at >= 12:
            raw = structs.note_header(data[at : at + 12])
            name_at = at + 12
            desc_at = at + -(-(12 + raw["n_namesz"]) // align) * align
            end = desc_at + raw["n_descsz"]
            if end > len(data):
                raise elf.image.error(
                    f"{where} has a note at offset {at:#x} that ends at {end:#x}, past the "
                    f"segment's {len(data):#x} bytes"
                )
            kind = raw["n_type"]
            if isinstance(
                kind, int
            ):  # pyelftools replaces the numbers of GNU's types with names; these are not needed
                owner = data[name_at : name_at + raw["n_namesz"]].rstrip(b"\0")
                yield Note(owner, kind, data[desc_at:end])
            at = -(-end // align) * align


def is_linux(elf: Elf) -> bool:
    """Is it a Linux kernel? Those have notes of the owner "Linux" (include/linux/elfnote-lto.h,
    build-salt.h, from 4.19 on). Raises `ImageError` if a note is malformed."""
    return any(note.owner == b"Linux" for note in notes(elf))


class Structs:
    """pyelftools' definitions for one class and byte order. Its errors are turned into
    `ImageError`s.
    """

    def __init__(self, image: Image, bits: int, *, little_endian: bool) -> None:
        # This is imported here and not above, because it costs a megabyte and 15 ms, which only
        # users of ELF images should pay.
        from elftools.construct import ConstructError  # noqa: PLC0415
        from elftools.elf.structs import ELFStructs  # noqa: PLC0415

        self._image = image
        self._malformed = ConstructError
        self._structs = ELFStructs(little_endian=little_endian, elfclass=bits)
        self._structs.create_basic_structs()
        self._structs.create_advanced_structs()

    @property
    def section_size(self) -> int:
        """The size of a section header in bytes."""
        return int(self._structs.Elf_Shdr.sizeof())

    @property
    def symbol_size(self) -> int:
        """The size of a symbol in bytes."""
        return int(self._structs.Elf_Sym.sizeof())

    def section(self, data: bytes) -> Any:
        return self._parse(self._structs.Elf_Shdr, data)

    def symbol(self, data: bytes) -> Any:
        return self._parse(self._structs.Elf_Sym, data)

    def header(self, data: bytes) -> Any:
        return self._parse(self._structs.Elf_Ehdr, data)

    def program_header(self, data: bytes) -> Any:
        return self._parse(self._structs.Elf_Phdr, data)

    def note_header(self, data: bytes) -> Any:
        return self._parse(self._structs.Elf_Nhdr, data)

    def _parse(self, struct: Any, data: bytes) -> Any:
        try:
            return struct.parse(data)
        except self._malformed as error:
            raise self._image.error(f"has a malformed {struct.name}: {error}") from error
