"""What a guest that was forked has written before: over the file that its RAM began as, in layers.

A fork has to see the pages that its guest has written since its RAM began, and neither may see
what the other writes from then on. So each fork puts the guest's own pages into a file, a layer,
from which both map them copy-on-write, as they map the rest from what lies below. Then they are
nobody's own any more: the next fork costs what was written since this one, and what many forks
have in common is in memory once.

Two things are bounded. A layer takes in those under it that are no more than twice its size, so
there are never more of them than a number of pages has binary digits, and no page is copied more
often than that. And each run of neighbouring pages is a mapping of its own, of which Linux gives a
process 65,530: where layers would be more than `_RUNS` of them, the new one takes in all others,
and pages between its own that nobody has written.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import islice, pairwise
from typing import Final, Self

from avmm.pages import PAGE, Bitmap, remap_private

_RUNS: Final = 256
"""The most runs of all layers of one guest: fifty forks of it have room in a process."""


class _Layer:
    """Pages at their own places in a sparse file; `held` are those that may be other than zero."""

    def __init__(self, fd: int, pages: Bitmap, held: Bitmap) -> None:
        self.fd = fd
        self.pages = pages
        self.held = held


class Layers:
    """One guest's layers, the newest last. `size` is RAM's, in bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._all: list[_Layer] = []

    def copy(self) -> Layers:
        """The same layers for a fork, to be closed by it."""
        other = Layers(self._size)
        for layer in self._all:
            other._all.append(_Layer(os.dup(layer.fd), layer.pages, layer.held))
        return other

    def map_over(self, ram: memoryview) -> None:
        """Map them, copy-on-write, over a private mapping of what lies below."""
        for layer in self._all:
            _map(ram, layer)

    def add(self, ram: memoryview, own: Bitmap, populated: Callable[[], Bitmap]) -> None:
        """Make the pages of `ram` that are its `own` a layer, and map them from there.

        `populated` tells which pages of `ram` may be other than zero. Nothing must write `ram`
        meanwhile. Raises `OSError` or `KvmError` where the host has no room; `ram` then is what
        it was.
        """
        kept, pages, held = list(self._all), own.copy(), own.copy()
        while kept and len(kept[-1].pages) <= 2 * len(pages):
            _take_in(kept, pages, held)
        if sum(_runs(layer.pages) for layer in kept) + _runs(pages) > _RUNS:
            while kept:
                _take_in(kept, pages, held)
            _fill_gaps(pages)
            held = pages.common(populated())
        new = _Layer(os.memfd_create("avmm-layer", os.MFD_CLOEXEC), pages, held)
        try:
            os.ftruncate(new.fd, self._size)
            for start, end in held.runs():
                _write(new.fd, ram[start * PAGE : end * PAGE], start * PAGE)
        except BaseException:
            os.close(new.fd)
            raise
        dropped, self._all = self._all[len(kept) :], [*kept, new]
        for layer in dropped:
            os.close(layer.fd)
        _map(ram, new)

    def populate(self, into: Bitmap) -> None:
        """Add the pages that a layer has, and that may be other than zero."""
        for layer in self._all:
            into.add(layer.held, 0)

    def close(self) -> None:
        """Close the files; idempotent. What is mapped stays mapped."""
        while self._all:
            os.close(self._all.pop().fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _take_in(kept: list[_Layer], pages: Bitmap, held: Bitmap) -> None:
    """The newest of the layers that were to be kept is to be part of a new one."""
    layer = kept.pop()
    pages.add(layer.pages, 0)
    held.add(layer.held, 0)


def _map(ram: memoryview, layer: _Layer) -> None:
    for start, end in layer.pages.runs():
        remap_private(ram[start * PAGE : end * PAGE], layer.fd, start * PAGE)


def _runs(pages: Bitmap) -> int:
    """How many runs they are, or more than are allowed."""
    return sum(1 for _ in islice(pages.runs(), _RUNS + 1))


def _fill_gaps(pages: Bitmap) -> None:
    """Add the smallest gaps between runs until there are few enough runs."""
    gaps = sorted(
        (after[0] - before[1], before[1]) for before, after in pairwise(list(pages.runs()))
    )
    for length, start in gaps[: max(0, len(gaps) + 1 - _RUNS)]:
        pages.mark(start * PAGE, length * PAGE)


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data = data[done:]
        offset += done
