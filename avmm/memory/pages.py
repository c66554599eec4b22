"""Sets of pages of guest RAM, and what is done with them in C (avmm/native/pages.h).

Pages are counted in RAM without its hole, as in the mapping: page n begins at byte 4096 * n of
`GuestMemory.whole`.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from avmm.kvm import KvmError
from avmm.native._native import ffi, lib

PAGE: Final = lib.AVMM_PAGE
"""Bytes of a page, of which guest RAM consists: 4096."""
_RUN: Final = struct.Struct("<QII")
"""A run as it travels: its first page, how many, and of which kind."""
RUN_BYTES: Final = _RUN.size
COPY_ON_WRITE: Final = mmap.MAP_PRIVATE | lib.MAP_NORESERVE
"""How RAM that begins as a file is mapped. No swap is reserved for pages that may never be
written."""
_WORD: Final = 64
_RUNS_ONLY: Final = (64 << 20) // PAGE
_ENTRIES: Final = 64 * 1024
"""How many entries of pagemap are read at once."""


class Bitmap:
    """A set of pages, with one bit for each. `mark` and `move_into` may run at the same time in
    different threads."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._words = -(-pages // _WORD)
        self.data = bytearray(8 * self._words)
        self._pointer = ffi.cast("uint64_t *", ffi.from_buffer(self.data))

    def mark(self, offset: int, length: int) -> None:
        """Add the pages of these bytes of RAM, which must lie in it."""
        lib.avmm_dirty_mark(self._pointer, offset, length)

    def move_into(self, other: Bitmap) -> None:
        """Move all pages of this set into `other`."""
        lib.avmm_dirty_take(self._pointer, other._pointer, self._words)

    def add(self, other: Bitmap, first: int) -> None:
        """Add what is in `other`, whose page 0 is our page `first`, a multiple of 64."""
        lib.avmm_pages_add(other._pointer, self._pointer + first // _WORD, other._words)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first page, page after the last) of each run of neighbours."""
        end = ffi.new("uint64_t *")
        while (at := lib.avmm_pages_run(self._pointer, end[0], self.pages, end)) < self.pages:
            yield at, end[0]

    def __len__(self) -> int:
        return lib.avmm_pages_count(self._pointer, self._words)


class Packed(NamedTuple):
    """Some pages: runs as they travel, and the contents of those that are not zero."""

    runs: memoryview
    data: memoryview

    @property
    def pages(self) -> int:
        """How many pages' contents these are."""
        return len(self.data) // PAGE

    def each(self) -> Iterator[tuple[int, int, bool]]:
        """(first page, how many, whether they have contents) of each run."""
        for page, count, kind in _RUN.iter_unpack(self.runs):
            yield page, count, kind == lib.AVMM_RUN_DATA


class Packer:
    """Takes pages out of a bitmap, some at a time. What it returns is valid until the next
    call."""

    def __init__(
        self, ram: memoryview, most_data: int = 256, most_runs: int = 4096, *, copies: bool = True
    ) -> None:
        """With `copies`, `next` also returns the pages' contents. Without, it returns only runs,
        of up to 64 MiB in total."""
        self._ram = ffi.cast("uint8_t *", ffi.from_buffer(ram))
        self._most = (most_data if copies else _RUNS_ONLY, most_runs)
        # A mapping gets its pages when they are written, in the thread that packs. A `bytearray`
        # of this size would be written to here, which takes a millisecond.
        self._data = memoryview(mmap.mmap(-1, most_data * PAGE) if copies else b"")
        self._into = ffi.cast("uint8_t *", ffi.from_buffer(self._data) if copies else 0)
        self._runs = bytearray(most_runs * RUN_BYTES)
        self._cursor = ffi.new("uint64_t *")
        self._count = ffi.new("uint32_t *")

    def rewind(self) -> None:
        """Begin with the first page again."""
        self._cursor[0] = 0

    def next(self, bitmap: Bitmap, *, skip_zeros: bool = False) -> Packed | None:
        """The next pages, which leave the bitmap; None after the last.

        With `skip_zeros`, zero pages are left out. Use it if the receiver already has zeros there.
        """
        most_data, most_runs = self._most
        while self._cursor[0] < bitmap.pages:
            copied = lib.avmm_pages_pack(
                self._ram,
                bitmap._pointer,
                bitmap.pages,
                self._cursor,
                ffi.cast("struct avmm_run *", ffi.from_buffer(self._runs)),
                most_runs,
                self._into,
                most_data,
                skip_zeros,
                self._count,
            )
            if self._count[0]:
                return Packed(
                    memoryview(self._runs)[: self._count[0] * RUN_BYTES],
                    self._data[: copied * PAGE],
                )
        return None


def unpack(ram: memoryview, fd: int, runs: memoryview, data: memoryview) -> bool:
    """Put pages into RAM, which is a shared mapping of the whole file `fd`. If the runs do not lie
    in RAM or do not fit the contents, returns False and writes nothing. Raises `KvmError` if the
    host has no memory for them."""
    if len(runs) % RUN_BYTES or len(data) % PAGE:
        return False
    answer = lib.avmm_pages_unpack(
        ffi.from_buffer("uint8_t[]", ram),
        len(ram) // PAGE,
        fd,
        ffi.cast("struct avmm_run *", ffi.from_buffer(runs)),
        len(runs) // RUN_BYTES,
        ffi.from_buffer("uint8_t[]", data),
        len(data) // PAGE,
    )
    if answer and answer != -errno.EINVAL:
        raise KvmError("pwrite to RAM", -answer)
    return answer == 0


def address(view: memoryview) -> int:
    """The address of the view in this process."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(view)))


def remap_private(ram: memoryview, fd: int, offset: int) -> None:
    """Map the file over RAM, at RAM's present address, copy-on-write. Raises `KvmError` if that
    fails."""
    if (answer := lib.avmm_map_private(address(ram), len(ram), fd, offset)) < 0:
        raise KvmError("mmap", -answer)


def own_pages(ram: memoryview, into: Bitmap) -> None:
    """Add the pages that a private mapping has copied, so that they are no longer its file's."""
    first = address(ram) // PAGE
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for at in range(0, into.pages, _ENTRIES):
            count = min(_ENTRIES, into.pages - at)
            entries = os.pread(pagemap.fileno(), 8 * count, 8 * (first + at))
            pointer = ffi.cast("uint64_t *", ffi.from_buffer(entries))
            lib.avmm_pagemap_own(pointer, at, len(entries) // 8, into._pointer)
