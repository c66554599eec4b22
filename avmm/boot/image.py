"""A kernel, initrd or module file, opened in a way in which a file that changes meanwhile does no
harm.

It is not mapped. If another process truncates a mapped file, SIGBUS kills the reader. Also, mapped
pages count as memory of this process. Headers are read with pread. Content is copied once, from
the page cache into guest memory, and every read is checked. So a file that changes its size is an
error like any other.

A compressed kernel is decompressed once into a memfd (`compressed`), which is then read in the
same way.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from types import TracebackType
from typing import Final

from avmm.boot import compressed
from avmm.boot.compressed import MAGIC_SIZE, Codec
from avmm.errors import ImageError

SLACK: Final = 256 << 20
"""By how many bytes a decompressed kernel may exceed guest RAM. Debug information is big, and is
not loaded.
"""

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

    def fileno(self) -> int:
        """The open file's descriptor."""
        return self._fd

    def error(self, text: str) -> ImageError:
        """An error about this file, for the caller to raise."""
        return ImageError(f"{self.name}: {text}")

    def read(self, offset: int, size: int, what: str) -> bytes:
        """The `size` bytes at `offset`, for small things such as headers. Messages call them
        `what`.

        Raises `ImageError` unless the file holds all of them.
        """
        self.check(offset, size, what)
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def head(self, size: int) -> bytes:
        """The first `size` bytes, or fewer if the file is shorter."""
        return self.read(0, min(size, self.size), "its beginning")

    def check(self, offset: int, size: int, what: str) -> None:
        """Raise `ImageError` unless the file holds the `size` bytes at `offset`."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.error(
                f"{what} should be the {size} bytes at offset {offset:#x}, but the file "
                f"has only {self.size} bytes"
            )

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`. Raises `ImageError` if the file ends before
        that.
        """
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
                    f"expected {len(view) - done} more bytes"
                )
            done += count

    def unpacked(
        self, codec: Codec, offset: int, size: int, limit: int, trailer: int = 0
    ) -> Image:
        """A new `Image` with the decompressed content of a range of this one; see
        `compressed.decompress`.
        """
        fd, total = compressed.decompress(self, codec, offset, size, limit, trailer)
        return Image(fd, total, self.name)


def open_image(path: str | os.PathLike[str], *, unpack_limit: int | None = None) -> Image:
    """Open a file. If `unpack_limit` is given, a compressed file is decompressed.

    Raises `ImageError` if it cannot be opened, is not a regular file or is empty, or if its
    compressed data are damaged or decompress to more than `unpack_limit` bytes.
    """
    name = os.fspath(path)
    image = _open(name)
    try:
        codec = compressed.find(image.head(MAGIC_SIZE))
        if unpack_limit is None or codec is None:
            return image
        unpacked = image.unpacked(codec, 0, image.size, unpack_limit)
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
