"""Writing an initramfs: a cpio archive in the "newc" format.

The kernel's Documentation/driver-api/early-userspace/buffer-format.rst specifies it. The format is
written here, because that takes only 30 lines. The existing libraries read files from disk, and
need the right to make device nodes. This code needs neither.
"""

from __future__ import annotations

import os
import stat
from typing import IO, Final, Protocol

_TRAILER: Final = "TRAILER!!!"
_PIECE: Final = 1 << 20
MOST_BYTES: Final = 0xFFFF_FFFF
"""A file's size has eight hexadecimal digits."""


class Readable(Protocol):
    """What a file's contents are read from."""

    def read(self, size: int, /) -> bytes: ...


class Archive:
    """An archive that is being written to `out`; `close` ends it. Everything belongs to root."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._inode = 0
        self.bytes = 0
        """How much the files have in all."""
        self._folders: set[str] = set()

    def file(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """Add a regular file, and the folders that it is in."""
        self._make_folders(path)
        self._entry(path, stat.S_IFREG | mode, content)

    def copy(self, path: str, source: Readable, size: int, *, mode: int) -> None:
        """Add a regular file with the next `size` bytes of `source`. Raises `ValueError` if it has
        fewer, or if an archive cannot hold that many."""
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes; expected at most {MOST_BYTES}")
        self._make_folders(path)
        self._header(path, stat.S_IFREG | mode, size)
        left = size
        while left:
            piece = source.read(min(left, _PIECE))
            if not piece:
                raise ValueError(f"{size - left} bytes, but {size} a moment ago")
            self._out.write(piece)
            left -= len(piece)
        self._pad(size)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._make_folders(path)
        self._entry(path, stat.S_IFLNK | 0o777, os.fsencode(target))

    def folder(self, path: str, *, mode: int = 0o755) -> None:
        """Add a folder, unless it has been added before."""
        if path and path not in self._folders:
            self._make_folders(path)
            self._folders.add(path)
            self._entry(path, stat.S_IFDIR | mode, b"")

    def character_device(self, path: str, major: int, minor: int, *, mode: int = 0o600) -> None:
        """Add a device node."""
        self._make_folders(path)
        self._entry(path, stat.S_IFCHR | mode, b"", device=(major, minor))

    def close(self) -> None:
        """End the archive; the file stays open."""
        self._entry(_TRAILER, 0, b"")

    def _make_folders(self, path: str) -> None:
        self.folder(path.rpartition("/")[0])

    def _entry(
        self, path: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)
    ) -> None:
        self._header(path, mode, len(content), device)
        self._out.write(content)
        self._pad(len(content))

    def _header(self, path: str, mode: int, size: int, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = os.fsencode(path) + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = (self._inode, mode, 0, 0, links, 0, size, 0, 0, *device, len(name), 0)
        data = b"070701" + b"".join(b"%08X" % value for value in fields) + name
        self._out.write(data)
        self._pad(len(data))
        self.bytes += size

    def _pad(self, size: int) -> None:
        self._out.write(bytes(-size % 4))
