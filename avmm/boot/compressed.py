"""Decompression of kernels on the host, because a guest would be slower at unpacking itself.

The formats are those that Linux's build offers for its payload, and those in which distributions
compress whole images. Each is recognised by its magic and decoded by a library, piece by piece,
into a memfd: a small file can claim to hold a thousand times its own size, so `limit` bounds what
comes out, and the decoders' own memory is bounded as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from avmm.errors import ImageError

MAGIC_SIZE: Final = 6
"""The longest magic."""
_CHUNK: Final = 1 << 18
_DECODER_MEMORY: Final = 1 << 28
"""The most that an xz or zstd dictionary may take; Linux's own kernels stay below half of it."""
_LZ4_LEGACY_BLOCK: Final = 8 << 20
"""The most bytes that a block of the legacy format holds. Compressed, it may be a little longer.
"""
_LZ4_LEGACY_BOUND: Final = _LZ4_LEGACY_BLOCK + _LZ4_LEGACY_BLOCK // 255 + 16


class Damaged(Exception):
    """The data are not valid in their format. The text says why."""


class CutOff(Exception):
    """The data end too early."""


class CompressedBytes(Protocol):
    """Compressed bytes, read once from their beginning to their end."""

    left: int

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end."""


class ImageFile(Protocol):
    """A file that contains compressed data, such as an `avmm.boot.image.Image`."""

    def read(self, offset: int, size: int, what: str) -> bytes: ...
    def error(self, text: str) -> ImageError: ...


class _Run:
    """A range of an image's bytes, which is read once."""

    def __init__(self, image: ImageFile, offset: int, size: int) -> None:
        self._image = image
        self._at = offset
        self.left = size

    def read(self, size: int) -> bytes:
        size = min(size, self.left)
        data = self._image.read(self._at, size, "compressed data") if size else b""
        self._at += size
        self.left -= size
        return data


@dataclass(frozen=True)
class Codec:
    """A compression format."""

    name: str
    magics: tuple[bytes, ...]
    decode: Callable[[CompressedBytes], Iterator[bytes]]
    """Yields the decompressed pieces, some of which may be empty. Raises `Damaged` and
    `CutOff`.
    """


def find(head: bytes) -> Codec | None:
    """The compression format of data that begin with these bytes. None if they are not
    compressed.
    """
    return next((codec for codec in CODECS if head.startswith(codec.magics)), None)


def named(name: str) -> Codec:
    """The first format with that name."""
    return next(codec for codec in CODECS if codec.name == name)


def decompress(
    image: ImageFile, codec: Codec, offset: int, size: int, limit: int, trailer: int = 0
) -> tuple[int, int]:
    """Decompress `size` bytes at `offset` of `image` into a memfd. Returns (descriptor,
    decompressed size in bytes).

    Zeros may follow the data, and the last `trailer` bytes may be anything. Raises `ImageError` if
    the data are damaged or cut off, if other data follow, or if they decompress to more than
    `limit` bytes.
    """
    if size > limit:
        raise image.error(
            f"has {size} bytes even when compressed with {codec.name}; at most {limit} are "
            "accepted"
        )
    source = _Run(image, offset, size - trailer)
    fd = os.memfd_create("avmm-image", os.MFD_CLOEXEC)
    total = 0
    try:
        try:
            for piece in codec.decode(source):
                total += len(piece)
                if total > limit:
                    raise image.error(
                        f"decompresses to more than {limit} bytes, which is the most for this "
                        "guest's RAM: it is a decompression bomb, or the kernel is far too "
                        "big"
                    )
                _write_all(image, fd, piece)
        except Damaged as error:
            raise image.error(f"is damaged ({codec.name}): {error}") from error.__cause__
        except CutOff:
            raise image.error(
                f"is cut off: its {codec.name} data do not end within {size} bytes"
            ) from None
        if total == 0:
            raise image.error(f"decompresses to nothing ({codec.name})")
        while rest := source.read(_CHUNK):
            if rest.strip(b"\0"):
                raise image.error(f"has more data after the end of its {codec.name} data")
    except BaseException:
        os.close(fd)
        raise
    return fd, total


def _write_all(image: ImageFile, fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except OSError as error:
            raise image.error(f"cannot be decompressed: {error.strerror}") from error


def _stream(source: CompressedBytes, decoder: Any, failure: type[Exception]) -> Iterator[bytes]:
    """Decompress with a decoder of bz2, lzma or lz4.frame, which have the same interface."""
    while not decoder.eof:
        data = b""
        if decoder.needs_input:
            data = source.read(_CHUNK)
            if not data:
                raise CutOff
        try:
            yield decoder.decompress(data, _CHUNK)
        except (failure, EOFError) as error:
            raise Damaged(str(error)) from error
    _check_unused(decoder.unused_data or b"")


def _check_unused(data: bytes) -> None:
    if data.strip(b"\0"):
        raise Damaged("there are more data after its end")


def _gzip(source: CompressedBytes) -> Iterator[bytes]:
    import zlib  # noqa: PLC0415 - each library only when it is needed

    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    while not inflate.eof:
        pending = inflate.unconsumed_tail or source.read(_CHUNK)
        try:
            piece = inflate.decompress(pending, _CHUNK)
        except zlib.error as error:
            raise Damaged(str(error)) from error
        if not (piece or pending or inflate.eof):
            raise CutOff
        yield piece
    _check_unused(inflate.unused_data)


def _bzip2(source: CompressedBytes) -> Iterator[bytes]:
    import bz2  # noqa: PLC0415

    return _stream(source, bz2.BZ2Decompressor(), OSError)


def _xz(source: CompressedBytes) -> Iterator[bytes]:
    import lzma  # noqa: PLC0415

    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_DECODER_MEMORY)
    return _stream(source, decoder, lzma.LZMAError)


def _lzma(source: CompressedBytes) -> Iterator[bytes]:
    import lzma  # noqa: PLC0415

    decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_DECODER_MEMORY)
    return _stream(source, decoder, lzma.LZMAError)


def _lz4(source: CompressedBytes) -> Iterator[bytes]:
    import lz4.frame  # noqa: PLC0415

    return _stream(source, lz4.frame.LZ4FrameDecompressor(), RuntimeError)


def _lz4_legacy(source: CompressedBytes) -> Iterator[bytes]:
    """lz4's doc/lz4_Frame_format.md, "Legacy frame": blocks up to the end, each of them after its
    size.
    """
    import lz4.block  # noqa: PLC0415

    source.read(4)
    while header := source.read(4):
        size = int.from_bytes(header, "little")
        if len(header) < 4 or size > source.left:
            raise CutOff
        if not 0 < size <= _LZ4_LEGACY_BOUND:
            raise Damaged(f"a block of {size} bytes, expected at most {_LZ4_LEGACY_BOUND}")
        try:
            yield lz4.block.decompress(source.read(size), uncompressed_size=_LZ4_LEGACY_BLOCK)
        except lz4.block.LZ4BlockError as error:
            raise Damaged(str(error)) from error


def _zstd(source: CompressedBytes) -> Iterator[bytes]:
    import zstandard  # noqa: PLC0415

    decoder = zstandard.ZstdDecompressor(max_window_size=_DECODER_MEMORY).decompressobj()
    while not decoder.eof:
        # One call returns everything that its input decompresses to, which is at most 2^17 times
        # as long. Small pieces of input keep that within the memory allowed for the decoder.
        data = source.read(1 << 10)
        if not data:
            raise CutOff
        try:
            yield decoder.decompress(data)
        except zstandard.ZstdError as error:
            raise Damaged(str(error)) from error
    _check_unused(decoder.unused_data)


CODECS: Final = (
    Codec("gzip", (b"\x1f\x8b\x08",), _gzip),
    Codec("xz", (b"\xfd7zXZ\0",), _xz),
    Codec("lzma", (b"\x5d\0\0",), _lzma),
    Codec("bzip2", (b"BZh",), _bzip2),
    Codec("lz4", (b"\x04\x22\x4d\x18",), _lz4),
    Codec("lz4", (b"\x02\x21\x4c\x18",), _lz4_legacy),
    Codec("zstd", (b"\x28\xb5\x2f\xfd",), _zstd),
)
"""RFC 1952 2.3.1; xz-file-format 2.1.1.1; lzma-file-format 1.1 (the usual properties byte);
bzip2; lz4_Frame_format; RFC 8878 3.1.1."""

NAMES: Final = tuple(dict.fromkeys(codec.name for codec in CODECS))
"""For messages."""
