"""A kernel, initrd or module file, opened so that reading it cannot hurt.

Why not mmap: a file that another process truncates while it is mapped kills the reader with
SIGBUS, and mapped pages count as ours. Headers are read with pread, and content goes from the
page cache straight into guest memory: one copy, checked, and a file that changes its size is
an error like any other.

A gzip'ed kernel is decompressed once, piece by piece, into a memfd, which is then read in the
same way. `limit` bounds it: a small file can claim to hold a thousand times its own size.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final

from avmm.errors import ImageError

GZIP_MAGIC: Final = b"\x1f\x8b\x08"
"""RFC 1952, 2.3.1: the ID bytes and the only method there is."""
GZIP_SLACK: Final = 256 << 20
"""How much bigger than guest RAM a decompressed kernel may be: debug information is big, and
is not loaded."""
_CHUNK: Final = 1 << 18

_KINDS: Final[tuple[tuple[Callable[[int], bool], str], ...]] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class Image:
    """The content of a file: `size` bytes, read by offset. Close it, or use it in `with`."""

    def __init__(self, fd: int, size: int, name: str) -> None:
        self._fd = fd
        self.size = size
        self.name = name
        """The path as the user gave it, for messages and for the guest."""

    def __enter__(self) -> Image:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def error(self, text: str) -> ImageError:
        """An error about this file, to be raised."""
        return ImageError(f"{self.name}: {text}")

    def read(self, offset: int, size: int, what: str) -> bytes:
        """The `size` bytes at `offset`, which are `what`; for small things such as headers.

        Raises `ImageError` unless the file holds all of them.
        """
        self.check(offset, size, what)
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def head(self, size: int) -> bytes:
        """The first `size` bytes, or fewer where the file is shorter."""
        return self.read(0, min(size, self.size), "its beginning")

    def check(self, offset: int, size: int, what: str) -> None:
        """Raise `ImageError` unless the file holds the `size` bytes at `offset`."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.error(
                f"{what} should be the {size} bytes at offset {offset:#x}, but the file has "
                f"{self.size} bytes"
            )

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with what is at `offset`; raises `ImageError` where the file ends."""
        done = 0
        while done < len(view):
            with view[done:] as rest:
                try:
                    count = os.preadv(self._fd, [rest], offset + done)
                except OSError as error:
                    raise self.error(f"cannot be read: {error.strerror}") from error
            if count == 0:
                raise self.error(
                    f"ended at offset {offset + done:#x} while it was read; "
                    f"expected {len(view) - done} bytes more"
                )
            done += count


def open_image(path: str | os.PathLike[str], *, gunzip_limit: int | None = None) -> Image:
    """Open a file; with a `gunzip_limit`, one that is gzip'ed is decompressed.

    Raises `ImageError` where it cannot be opened, is no regular file or is empty, and where
    the gzip'ed data is damaged or comes to more than `gunzip_limit` bytes.
    """
    name = os.fspath(path)
    image = _open(name)
    try:
        if gunzip_limit is None or image.head(len(GZIP_MAGIC)) != GZIP_MAGIC:
            return image
        unpacked = _gunzip(image, gunzip_limit)
    except BaseException:
        image.close()
        raise
    image.close()
    return unpacked


def _open(name: str) -> Image:
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for one.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise ImageError(f"{name}: cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise ImageError(f"{name!r}: cannot be opened: {error}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            kind = next((text for test, text in _KINDS if test(status.st_mode)), "something else")
            raise ImageError(f"{name}: is {kind}; expected a regular file")
        if status.st_size == 0:
            raise ImageError(f"{name}: is empty")
    except BaseException:
        os.close(fd)
        raise
    return Image(fd, status.st_size, name)


def _gunzip(source: Image, limit: int) -> Image:
    """Decompress all of `source` (one gzip member, zeros may follow) into a memfd."""
    if source.size > limit:
        raise source.error(f"is {source.size} bytes even as gzip; the most taken is {limit}")
    size = 0
    fd = os.memfd_create("avmm-image", os.MFD_CLOEXEC)
    try:
        for piece in _inflated(source):
            size += len(piece)
            if size > limit:
                raise source.error(
                    f"decompresses to more than {limit} bytes, the most taken for this guest's "
                    f"RAM: a decompression bomb, or far too big a kernel"
                )
            _write_all(source, fd, piece)
        if size == 0:
            raise source.error("is gzip of nothing")
    except BaseException:
        os.close(fd)
        raise
    return Image(fd, size, source.name)


def _inflated(source: Image) -> Iterator[bytes]:
    """The decompressed content in pieces of at most `_CHUNK` bytes."""
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    at = 0
    while not inflate.eof:
        pending = inflate.unconsumed_tail
        if not pending:
            pending = source.read(at, min(_CHUNK, source.size - at), "gzip data")
            at += len(pending)
        try:
            piece = inflate.decompress(pending, _CHUNK)
        except zlib.error as error:
            raise source.error(f"is damaged gzip: {error}") from error
        if not (piece or pending or inflate.eof):
            raise source.error(f"is cut off: its gzip data goes on after {source.size} bytes")
        yield piece
    trailing = inflate.unused_data
    while not trailing.strip(b"\0"):
        if at == source.size:
            return
        trailing = source.read(at, min(_CHUNK, source.size - at), "padding")
        at += len(trailing)
    raise source.error("has more data after the end of its gzip member")


def _write_all(source: Image, fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except OSError as error:
            raise source.error(f"cannot be decompressed: {error.strerror}") from error
