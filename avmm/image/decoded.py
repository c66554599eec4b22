"""Decompresses packages and modules while they are read.

It uses the decoders for kernels (avmm/boot/compressed.py). Their memory is bounded, whatever
dictionary the data ask for. The reader decides how much to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Final

from avmm.boot import compressed

_NAMES: Final = {
    ".gz": "gzip",
    ".xz": "xz",
    ".lzma": "lzma",
    ".bz2": "bzip2",
    ".zst": "zstd",
}
"""The compression formats, by the suffixes of file names."""
_CHUNK: Final = 1 << 18


class Decoded:
    """Reads the first `size` bytes of `file`, decompressed as the suffix says. The suffix "" means
    that it is not compressed.

    Raises `ValueError` for a suffix that is not known.
    """

    def __init__(self, file: IO[bytes], size: int, suffix: str) -> None:
        source = _Source(file, size)
        if not suffix:
            self._pieces = iter(lambda: source.read(_CHUNK), b"")
        elif suffix in _NAMES:
            self._pieces = compressed.named(_NAMES[suffix]).decode(source)
        else:
            raise ValueError(f"{suffix} is not a known compression")
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end. Raises `ValueError` if the data are damaged."""
        while not self._rest:
            piece = self._next()
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        data, self._rest = self._rest[:size], self._rest[size:]
        return bytes(data)

    def pieces(self) -> Iterator[bytes]:
        """Everything that is left, piece by piece. Raises `ValueError` if the data are damaged."""
        return iter(lambda: self.read(_CHUNK), b"")

    def _next(self) -> bytes | None:
        try:
            return next(self._pieces, None)
        except compressed.Damaged as error:
            raise ValueError(str(error)) from error
        except compressed.CutOff:
            raise ValueError("the compressed data end too early") from None


class _Source:
    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file = file
        self.left = size

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self.left))
        self.left -= len(data)
        return data
