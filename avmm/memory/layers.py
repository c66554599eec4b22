"""What a guest that was forked has written before: over the file that its RAM began as, in layers.

A fork has to see the pages that its guest has written since its RAM began, and neither may see
what the other writes from then on. So a fork puts the guest's own pages, where there are many
together, into a file, a layer, from which both map them copy-on-write, as they map the rest from
what lies below. Then they are nobody's own any more: the next fork costs what was written since
this one, and what many forks have in common is in memory once.

Each run of neighbouring pages is a mapping of its own, of which Linux gives a process 65,530. So
only long runs go into a layer, and no more than `_RUNS` in all; the rest is copied to each fork.
And a layer takes in those under it that are no more than twice its size: there are never more of
them than a number of pages has binary digits, and no page is copied more often than that.
"""

from __future__ import annotations

import os
from typing import Final, Self

from avmm.memory.pages import PAGE, Bitmap, remap_private

_RUNS: Final = 256
"""The most runs of all layers of one guest: fifty forks of it have room in a process."""
_LEAST: Final = 32
"""Pages in a run for which a mapping is worth while."""


class _Layer:
    """Pages at their own places in a sparse file."""

    def __init__(self, fd: int, pages: Bitmap) -> None:
        self.fd = fd
        self.pages = pages
        self.runs = sum(1 for _ in pages.runs())


class Layers:
    """One guest's layers, the newest last. `size` is RAM's, in bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._all: list[_Layer] = []

    def copy(self) -> Layers:
        """The same layers for a fork, to be closed by it. Raises `OSError`."""
        with Layers(self._size) as copied:
            for layer in self._all:
                copied._all.append(_Layer(os.dup(layer.fd), layer.pages))
            other = Layers(self._size)
            other._all, copied._all = copied._all, []
        return other

    def map_over(self, ram: memoryview) -> None:
        """Map them, copy-on-write, over a private mapping of what lies below."""
        for layer in self._all:
            _map(ram, layer)

    def add(self, ram: memoryview, own: Bitmap) -> list[tuple[int, int]]:
        """Make a layer of long runs of the pages of `ram` that are its `own`, and map them so.

        Gives the runs that stay its own. Nothing must write `ram` meanwhile. Raises `OSError` or
        `KvmError` where the host has no room; `ram` then holds what it held.
        """
        room = _RUNS - sum(layer.runs for layer in self._all)
        by_length = sorted(own.runs(), key=lambda run: run[0] - run[1])
        long = [run for run in by_length[:room] if run[1] - run[0] >= _LEAST]
        if not long:
            return by_length
        pages = Bitmap(own.pages)
        for start, end in long:
            pages.mark(start * PAGE, (end - start) * PAGE)
        kept = list(self._all)
        while kept and len(kept[-1].pages) <= 2 * len(pages):
            pages.add(kept.pop().pages, 0)
        new = _written(ram, self._size, pages)
        dropped, self._all = self._all[len(kept) :], [*kept, new]
        for layer in dropped:
            os.close(layer.fd)
        _map(ram, new)  # where it ends half-way the layer is there, and holds what `ram` does
        return by_length[len(long) :]

    def populate(self, into: Bitmap) -> None:
        """Add the pages that a layer has."""
        for layer in self._all:
            into.add(layer.pages, 0)

    def close(self) -> None:
        """Close the files; idempotent. What is mapped stays mapped."""
        while self._all:
            os.close(self._all.pop().fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_pages(ram: memoryview, pages: Bitmap, fd: int) -> None:
    """Write these pages of `ram` to their places in a file. Raises `OSError`."""
    for start, end in pages.runs():
        data, offset = ram[start * PAGE : end * PAGE], start * PAGE
        while data:
            done = os.pwrite(fd, data, offset)
            data = data[done:]
            offset += done


def _written(ram: memoryview, size: int, pages: Bitmap) -> _Layer:
    fd = os.memfd_create("avmm-layer", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        write_pages(ram, pages, fd)
    except BaseException:
        os.close(fd)
        raise
    return _Layer(fd, pages)


def _map(ram: memoryview, layer: _Layer) -> None:
    for start, end in layer.pages.runs():
        remap_private(ram[start * PAGE : end * PAGE], layer.fd, start * PAGE)
