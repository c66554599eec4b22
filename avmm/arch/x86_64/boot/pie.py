"""Static PIEs: ELF kernels that are linked to no address (ET_DYN), as Rust's for `*-none` targets.

Such a file is loaded at the addresses that it names if these are RAM above 1 MiB. As a rule they
begin at 0, and the whole image is moved up to 1 MiB. Its relocations are applied either way, as
the dynamic linker would: the linker leaves it to them to fill in all absolute addresses. Only
relative ones exist in a static PIE (System V ABI, x86-64 supplement 1.0, 4.4; generic ABI,
"Relocation"; for DT_RELR "Relative Relocation Table").

The tables are hostile. A relocation may only change bytes of the image itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final, Self

from avmm.arch.x86_64 import layout
from avmm.boot.elf_headers import Elf, Segment
from avmm.memory.pages import PAGE
from avmm.memory.ram import GuestMemory

_MOST_ALIGNMENT: Final = 1 << 30

_NULL, _NEEDED, _PLT_BYTES = 0, 1, 2
_RELA, _RELA_BYTES, _REL, _REL_BYTES, _PLT = 7, 8, 17, 18, 23
_RELR_BYTES, _RELR = 35, 36
_MOST_ENTRIES: Final = 256
"""Entries of the dynamic section that are read; a static PIE has fewer than 20."""

_NONE, _RELATIVE = 0, 8
"""R_X86_64_* and R_386_* have the same numbers for these two."""
_WORD: Final = {32: "<I", 64: "<Q"}
_DYNAMIC: Final = {32: "<iI", 64: "<qQ"}
_RELA_ENTRY: Final = {32: "<IIi", 64: "<QQq"}
_REL_ENTRY: Final = {32: "<II", 64: "<QQ"}


def placed(elf: Elf, memory: GuestMemory) -> Elf:
    """The same image with the addresses at which it is going to be loaded. An image that is linked
    to fixed addresses is returned as it is. Raises `ImageError` if it cannot be moved."""
    if not elf.is_pie:
        return elf
    if _NEEDED in _dynamic(elf) or not elf.entry:
        raise elf.image.error("is a shared library; expected a kernel, or a static PIE")
    segments = elf.loadable
    start, end = min(s.paddr for s in segments), max(s.paddr + s.memsz for s in segments)
    if start >= layout.HIMEM and any(r.gpa <= start and end <= r.end for r in memory.ram):
        return elf
    if any(s.vaddr != s.paddr for s in segments):
        raise elf.image.error(
            f"is position-independent and would have to be moved from {start:#x}, but its "
            "virtual and physical addresses differ"
        )
    alignment = max(PAGE, *(s.align for s in segments))
    if alignment & alignment - 1 or alignment > _MOST_ALIGNMENT:
        raise elf.image.error(
            f"has a segment with an alignment of {alignment:#x}; expected a power of two of at "
            f"most {_MOST_ALIGNMENT:#x}"
        )
    moved = -(-layout.HIMEM // alignment) * alignment - start // alignment * alignment
    return replace(
        elf,
        segments=tuple(
            replace(s, vaddr=s.vaddr + moved, paddr=s.paddr + moved) for s in elf.segments
        ),
        entry=elf.entry + moved,
        moved_by=moved,
    )


def relocate(elf: Elf, memory: GuestMemory) -> None:
    """Apply the relocations of an image that is `placed` and loaded. Raises `ImageError` if there
    is one that a static PIE does not have, or that changes anything but the image."""
    if not elf.is_pie:
        return
    dynamic = _dynamic(elf)
    if dynamic.get(_PLT_BYTES, 0):
        raise elf.image.error("has a procedure linkage table; expected a static PIE")
    with _Loaded(elf, memory) as image:
        table = dynamic.get(_RELA, 0), dynamic.get(_RELA_BYTES, 0)
        for place, addend in image.with_addends(*table):
            image.put(place, elf.moved_by + addend)
        if not elf.moved_by:
            return  # the other kinds add to what is there
        for place in image.without(dynamic.get(_REL, 0), dynamic.get(_REL_BYTES, 0)):
            image.add(place)
        for place in image.compact(dynamic.get(_RELR, 0), dynamic.get(_RELR_BYTES, 0)):
            image.add(place)


def _dynamic(elf: Elf) -> Mapping[int, int]:
    """The dynamic section: tag to value."""
    found: dict[int, int] = {}
    form = struct.Struct(_DYNAMIC[elf.bits])
    for segment in elf.segments:
        if segment.kind == "PT_DYNAMIC":
            size = min(segment.filesz, _MOST_ENTRIES * form.size) // form.size * form.size
            for tag, value in form.iter_unpack(
                elf.image.read(segment.offset, size, "the dynamic section")
            ):
                if tag == _NULL:
                    break
                found.setdefault(tag, value)
    return found


class _Loaded:
    """An image in guest memory. The addresses that its methods get are those of the file."""

    def __init__(self, elf: Elf, memory: GuestMemory) -> None:
        self._elf = elf
        self._word = struct.Struct(_WORD[elf.bits])
        self._mask = (1 << elf.bits) - 1
        self._segments = [(s, memory.view(s.paddr, s.memsz)) for s in elf.loadable]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _segment, view in self._segments:
            view.release()

    def _find(self, address: int, size: int, what: str) -> tuple[memoryview, int]:
        """The segment with these bytes, and their offset in it."""
        at = address + self._elf.moved_by
        for segment, view in self._segments:
            if _covers(segment, at, size):
                return view, at - segment.vaddr
        raise self._elf.image.error(
            f"has {what} at {address:#x}, {size} bytes, which are not within one of its segments"
        )

    def put(self, address: int, value: int) -> None:
        view, at = self._find(address, self._word.size, "a relocation")
        self._word.pack_into(view, at, value & self._mask)

    def add(self, address: int) -> None:
        view, at = self._find(address, self._word.size, "a relocation")
        (value,) = self._word.unpack_from(view, at)
        self._word.pack_into(view, at, value + self._elf.moved_by & self._mask)

    def with_addends(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        """(address, addend) of a table of type DT_RELA."""
        for place, info, addend in self._table(_RELA_ENTRY, address, size):
            if self._is_relative(place, info):
                yield place, addend

    def without(self, address: int, size: int) -> Iterator[int]:
        """The addresses in a table of type DT_REL."""
        for place, info in self._table(_REL_ENTRY, address, size):
            if self._is_relative(place, info):
                yield place

    def compact(self, address: int, size: int) -> Iterator[int]:
        """The addresses in a table of type DT_RELR: an address, then bitmaps of the words behind
        it, which have their lowest bit set."""
        word, at = self._word.size, 0
        for (entry,) in self._table(_WORD, address, size):
            if not entry & 1:
                yield entry
                at = entry + word
                continue
            for bit in range(8 * word - 1):
                if entry >> bit + 1 & 1:
                    yield at + bit * word
            at += (8 * word - 1) * word

    def _table(
        self, forms: Mapping[int, str], address: int, size: int
    ) -> Iterator[tuple[int, ...]]:
        form = struct.Struct(forms[self._elf.bits])
        if not size:
            return
        view, at = self._find(address, size, "a table of relocations")
        if size % form.size:
            raise self._elf.image.error(
                f"has a table of relocations of {size} bytes; expected a multiple of {form.size}"
            )
        yield from form.iter_unpack(bytes(view[at : at + size]))

    def _is_relative(self, place: int, info: int) -> bool:
        kind = info & (0xFFFF_FFFF if self._elf.bits == 64 else 0xFF)
        if kind not in (_NONE, _RELATIVE):
            raise self._elf.image.error(
                f"has a relocation of type {kind} at {place:#x}; expected only relative ones, "
                f"type {_RELATIVE}, as in a static PIE"
            )
        return kind == _RELATIVE


def _covers(segment: Segment, at: int, size: int) -> bool:
    return segment.vaddr <= at and at + size <= segment.vaddr + segment.memsz
