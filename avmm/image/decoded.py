"""What packages and modules are compressed with, undone while it is read.

By the decoders of kernels (boot/compressed.py), whose memory is bounded, whatever dictionary the
data ask for. How much is read is the reader's own matter.
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
"""A format by the suffix that files in it have."""
_CHUNK: Final = 1 << 18


class Decoded:
    """The first `size` bytes of `file`, decompressed as a suffix says; "" is for plain ones.

    Raises `ValueError` for a suffix that is not known.
    """

    def __init__(self, file: IO[bytes], size: int, suffix: str) -> None:
        source = _Source(file, size)
        if not suffix:
            self._pieces = iter(lambda: source.read(_CHUNK), b"")
        elif suffix in _NAMES:
            self._pieces = compressed.named(_NAMES[suffix]).decode(source)
        else:
            raise ValueError(f"{suffix} is a compression that is not known")
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end. Raises `ValueError` where they are damaged."""
        while not self._rest:
            piece = self._next()
            if piece is None:
                return b""
            self._rest = memoryview(piece)
        data, self._rest = self._rest[:size], self._rest[size:]
        return bytes(data)

    def pieces(self) -> Iterator[bytes]:
        """All that is left, piece by piece. Raises `ValueError` where they are damaged."""
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
