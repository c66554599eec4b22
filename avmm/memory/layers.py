"""Layers: what a forked guest has written since its RAM began, over the file that its RAM began
as.

A fork has to see the pages that the guest has written since its RAM began. After the fork, neither
may see what the other writes. So the fork puts long runs of the guest's own pages into a file, a
layer. Both map these pages from the layer, copy-on-write, as they map all other pages from what
lies below. After that these pages belong to neither. So the next fork costs only what was written
since this one, and what many forks have in common is in memory once.

Each run of neighbouring pages needs a mapping of its own, and Linux gives a process at most 65,530
mappings. So only long runs go into a layer, and no more than `_RUNS` in all; the rest is copied to
each fork. A new layer absorbs the layers under it that are at most twice its size. So there are
never more layers than the number of RAM's pages has binary digits, and no page is copied more
often than that.
"""

from __future__ import annotations

import os
from typing import Final, Self

from avmm.memory.pages import PAGE, Bitmap, remap_private

_RUNS: Final = 256
"""The most runs in all layers of one guest. Fifty forks of it then fit into one process."""
_LEAST: Final = 32
"""The fewest pages in a run for which a mapping is worthwhile."""


class _Layer:
    """Pages at their own places in a sparse file."""

    def __init__(self, fd: int, pages: Bitmap) -> None:
        self.fd = fd
        self.pages = pages
        self.runs = sum(1 for _ in pages.runs())


class Layers:
    """One guest's layers, the newest last. `size` is the size of RAM in bytes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._all: list[_Layer] = []

    def copy(self) -> Layers:
        """The same layers for a fork, which closes them. Raises `OSError`."""
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
        """Make a layer of the long runs among `own`, the pages of `ram` that are its own, and map
        them from that layer.

        Returns the runs that stay its own. Nothing may write to `ram` meanwhile. Raises `OSError`
        or `KvmError` if the host has no room; the contents of `ram` are then unchanged.
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
        _map(ram, new)  # if it stops half-way, the layer exists and holds the same as `ram`
        return by_length[len(long) :]

    def populate(self, into: Bitmap) -> None:
        """Add the pages that a layer has."""
        for layer in self._all:
            into.add(layer.pages, 0)

    def close(self) -> None:
        """Close the files; idempotent. Pages that are mapped stay mapped."""
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
